"""Runs tasks over lengths and keeps what is measured in a JSON file that a killed run goes on from."""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

HEADER = ("model", "adapter", "versions", "seed", "settings")


def read_results(path: str | Path) -> dict[str, Any]:
    """One results file: {"model", "adapter", "versions", "seed", "settings", "cells"}.

    Raises:
        ValueError: if the file is not one.
    """
    lost = f"{path} is not a results file of `cream-peft evaluate`, as they lie in its --output_dir"
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [key for key in (*HEADER, "cells") if key not in results]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{lost}: {error}") from error
    if missing:
        raise ValueError(f"{lost}: {', '.join(missing)} missing")
    return results


def file_name(label: str) -> str:
    """The name of a label's results file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label) + ".json"


def _write(path: Path, results: dict[str, Any]) -> None:
    # Replaced whole, so that a kill leaves the old file or the new one, never half of one.
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _refuse_other_settings(path: Path, earlier: dict[str, Any], header: dict[str, Any], tasks: list[str]) -> None:
    """A ValueError that names what differs between the results in a file and those that would be added to it."""
    found = {**earlier, **earlier["settings"]}
    wanted = {**header, **header["settings"]}
    measured = {cell["task"] for cell in earlier["cells"]}
    differing = [key for key in wanted if key not in ("settings", "options") and found.get(key) != wanted[key]]
    for task in measured & set(tasks):
        was, now = (one.get("options", {}).get(task, {}) for one in (found, wanted))
        for key in was | now:
            if was.get(key) != now.get(key):
                differing.append(f"{key} of {task}")
                found[differing[-1]], wanted[differing[-1]] = was.get(key), now.get(key)
    if measured and differing:
        key = differing[0]
        was = f" ({found.get(key)}, now {wanted[key]})" if isinstance(wanted[key], int | str | list) else ""
        raise ValueError(
            f"{path} was measured with other settings, {key}{was}: choose another --output_dir, or delete it"
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Callable[..., Iterable[dict[str, Any]]]],
    *,
    lengths: list[int],
    samples: int,
    path: str | Path,
    header: dict[str, Any],
    options: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure every task at every length (tokens) and return the results, written to `path` after each cell.

    `header` holds model, adapter, versions, seed and settings. A results file at `path` with the same header is gone
    on with; its other tasks and lengths stay. `options`: task -> keyword arguments of its own.

    Raises:
        ValueError: if the file at `path` was measured otherwise: nothing that was measured is thrown away.
    """
    path, options = Path(path), options or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**header, "cells": []}
    if path.is_file():
        earlier = read_results(path)
        _refuse_other_settings(path, earlier, json.loads(json.dumps(header)), list(tasks))
        results["cells"] = earlier["cells"]
        others = earlier["settings"].get("options", {})
        results["settings"] = {**header["settings"], "options": others | header["settings"].get("options", {})}
    pending = [(name, length) for name in tasks for length in lengths]
    # By tokens, not by cells: one at 32K takes as long as eight at 4K.
    total = sum(length for _, length in pending)
    label = header["settings"].get("label") or header["model"]
    shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, desc=f"evaluate {label}", bar_format=shape, delay=0) as bar:
        for name, length in pending:
            bar.set_postfix(task=name, length=length)
            done = [cell["depth"] for cell in results["cells"] if (cell["task"], cell["length"]) == (name, length)]
            start = time.perf_counter()
            given = {"done": done, **options.get(name, {})}
            for cell in tasks[name](model, tokenizer, length, samples, header["seed"], **given):
                seconds = round(time.perf_counter() - start, 3)
                results["cells"].append({"task": name, "length": length, **cell, "seconds": seconds})
                _write(path, results)
                start = time.perf_counter()
            bar.update(length)
    if not path.is_file():
        _write(path, results)
    return results


def mean_by(cells: list[dict[str, Any]], key: str) -> dict[Any, float]:
    """Mean over all samples pooled, for each value of `key` (length or depth)."""
    right, asked = defaultdict(float), defaultdict(int)
    for cell in cells:
        right[cell[key]] += cell["value"] * cell["samples"]
        asked[cell[key]] += cell["samples"]
    return {value: right[value] / asked[value] for value in sorted(asked)}
