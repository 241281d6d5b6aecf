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
) -> dict[str, Any]:
    """Measure every task at every length (tokens) and return the results, written to `path` after each length.

    `header` holds model, adapter, versions, seed and settings. A results file at `path` with the same header is gone
    on with; one with another header is started over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**header, "cells": []}
    if path.is_file():
        earlier = read_results(path)
        if {key: earlier[key] for key in HEADER} == json.loads(json.dumps(header)):
            results = earlier
    done = {(cell["task"], cell["length"]) for cell in results["cells"]}
    pending = [(name, length) for name in tasks for length in lengths if (name, length) not in done]
    bar = tqdm(pending, desc=f"evaluate {header['model']}", unit="cell", disable=not pending, delay=0)
    for name, length in bar:
        bar.set_postfix(task=name, length=length)
        start = time.perf_counter()
        cells = list(tasks[name](model, tokenizer, length, samples, header["seed"]))
        seconds = (time.perf_counter() - start) / max(1, len(cells))
        results["cells"] += [{"task": name, "length": length, **cell, "seconds": round(seconds, 3)} for cell in cells]
        _write(path, results)
    if not path.is_file():
        _write(path, results)
    return results


def mean_by(cells: list[dict[str, Any]], key: str) -> dict[Any, float]:
    """Accuracy of all samples pooled, for each value of `key` (length or depth)."""
    right, asked = defaultdict(float), defaultdict(int)
    for cell in cells:
        right[cell[key]] += cell["value"] * cell["samples"]
        asked[cell[key]] += cell["samples"]
    return {value: right[value] / asked[value] for value in sorted(asked)}
