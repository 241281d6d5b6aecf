"""Models named on the command line, measured with the tasks of evals, and put in one table."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from . import rope
from .adapter import adapter_folder, is_adapter, load_adapter, read_description
from .card import adapter_sha256
from .config import DEFAULT_FACTOR
from .errors import about
from .evals import TASKS, evaluate, mean_by
from .model import load_base, load_tokenizer, resolve_base
from .provenance import machine, versions


@dataclass
class Subject:
    """One model to measure: `[LABEL=]MODEL[+linear|+ntk|+yarn]`."""

    label: str
    name: str
    rope_scaling_type: str | None

    @classmethod
    def parse(cls, text: str) -> Subject:
        label, _, rest = text.rpartition("=")
        if not rest:
            raise ValueError(f"--compare {text!r} names no model: write MODEL or LABEL=MODEL")
        name, plus, scaling = rest.partition("+")
        if plus and Path(rest).exists():
            name, plus, scaling = rest, "", ""
        if plus and scaling not in rope.ROPE_SCALING_TYPES:
            allowed = ", ".join(rope.ROPE_SCALING_TYPES)
            raise ValueError(f"{text}: unknown RoPE scaling {scaling!r}: use one of {allowed}")
        return cls(label or rest.rstrip("/").split("/")[-1], name, scaling or None)


def _adapter(name: str) -> Path | None:
    """The folder of an adapter, None for a base model. A folder that holds neither is refused."""
    path = Path(name)
    if is_adapter(path):
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} holds neither an adapter (adapter_config.json) nor a model (config.json)")
        return None
    if path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"no such model folder: {name}")
    if Path(resolve_base(name)).is_dir() or "/" not in name:
        return None
    from huggingface_hub import file_exists

    with about(name):
        return adapter_folder(name) if file_exists(name, "adapter_config.json") else None


def _measure(subject: Subject, options: Namespace) -> dict[str, Any]:
    folder = _adapter(subject.name)
    settings: dict[str, Any] = {"label": subject.label, "samples": options.samples, "load_in_4bit": not options.no_4bit}
    if folder is not None:
        if subject.rope_scaling_type:
            raise ValueError(
                f"{subject.name} is an adapter and brings its RoPE scaling: leave out +{subject.rope_scaling_type}"
            )
        description = read_description(folder, subject.name)
        window, target = description["pretrained_window"], description["target_length"]
        settings["adapter_sha256"] = adapter_sha256(folder)
        settings["rope_scaling_type"] = description["rope_scaling_type"]
        model, tokenizer = load_adapter(folder, base_model=options.base_model, load_in_4bit=not options.no_4bit)
        base, adapter = description["base_model"], subject.name
    else:
        with about(subject.name):
            window = rope.pretrained_window(AutoConfig.from_pretrained(resolve_base(subject.name)))
        target = options.target_length or DEFAULT_FACTOR * window
        settings["rope_scaling_type"] = subject.rope_scaling_type
        model = load_base(
            subject.name,
            target_length=target,
            rope_scaling_type=subject.rope_scaling_type,
            load_in_4bit=not options.no_4bit,
        ).eval()
        tokenizer, base, adapter = load_tokenizer(subject.name), subject.name, None
    lengths = options.lengths or [window * 2**power for power in range(20) if window * 2**power <= target]
    settings |= {"pretrained_window": window, "target_length": target, "machine": machine()}
    # Names only: results are published, local paths are not.
    header = {
        "model": Path(base).name if Path(base).exists() else base,
        "adapter": adapter and (Path(adapter).name if Path(adapter).exists() else adapter),
        "versions": versions(),
        "seed": options.seed,
        "settings": settings,
    }
    path = Path(options.output_dir) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', subject.label)}.json"
    tasks = {name: TASKS[name] for name in options.tasks}
    return evaluate(model, tokenizer, tasks, lengths=lengths, samples=options.samples, path=path, header=header)


def evaluate_models(options: Namespace) -> dict[str, dict[str, Any]]:
    """Label -> results for every model in `options.compare`, each kept in its own file of `options.output_dir`.

    Raises:
        ValueError: on an unknown task, a length or number of samples below 1, or two models of one label.
    """
    for task in options.tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    if options.samples < 1 or any(length < 1 for length in options.lengths or []):
        raise ValueError("--samples and --lengths must be at least 1")
    subjects = [Subject.parse(text) for text in options.compare]
    labels = [subject.label for subject in subjects]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two models have the same label ({', '.join(labels)}): write LABEL=MODEL")
    return {subject.label: _measure(subject, options) for subject in subjects}


def table_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The table's lines: a block a task, a row a model and length, accuracy over all depths and at each depth."""
    lines = []
    width = max(len(label) for label in results)
    for task in sorted({cell["task"] for result in results.values() for cell in result["cells"]}):
        cells = {label: [c for c in result["cells"] if c["task"] == task] for label, result in results.items()}
        depths = sorted({cell["depth"] for found in cells.values() for cell in found})
        lines.append(f"{task}: accuracy by length (tokens) and depth")
        head = " ".join(f"{depth:>5.0%}" for depth in depths)
        lines.append(f"{'model':<{width}}  {'length':>7}  {'all':>5}  {head}")
        for label, found in cells.items():
            for length, value in mean_by(found, "length").items():
                here = mean_by([cell for cell in found if cell["length"] == length], "depth")
                row = " ".join(f"{here[depth]:>5.2f}" if depth in here else "    -" for depth in depths)
                lines.append(f"{label:<{width}}  {length:>7,}  {value:>5.2f}  {row}")
            lines.append("")
    return lines
