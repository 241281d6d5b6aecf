"""Runs tasks over lengths and keeps what is measured in a JSON file that a killed run goes on from."""

from __future__ import annotations

import json
import os
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
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [key for key in (*HEADER, "cells") if key not in results]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of `cream-peft evaluate`: {error}") from error
    if missing:
        raise ValueError(f"{path} is not a results file of `cream-peft evaluate`: {', '.join(missing)} missing")
    return results


def _write(path: Path, results: dict[str, Any]) -> None:
    # Replaced whole, so that a kill leaves the old file or the new one, never half of one.
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


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
    on with; one with another header is started over. `options`: task -> keyword arguments of its own.
    """
    path, options = Path(path), options or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**header, "cells": []}
    if path.is_file():
        earlier = read_results(path)
        if {key: earlier[key] for key in HEADER} == json.loads(json.dumps(header)):
            results = earlier
    pending = [(name, length) for name in tasks for length in lengths]
    # By tokens, not by cells: one at 32K takes as long as eight at 4K.
    total = sum(length for _, length in pending)
    label = header["settings"].get("label") or header["model"]
    with tqdm(total=total, desc=f"evaluate {label}", unit="tok", unit_scale=True, delay=0) as bar:
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
