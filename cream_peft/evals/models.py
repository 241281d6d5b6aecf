"""The models named on a command line: found, described for results, and loaded."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import rope
from ..errors import about
from ..model.adapter import adapter_folder, load_adapter
from ..model.base import load_base, load_tokenizer, resolve_base
from ..model.record import adapter_sha256, is_adapter, read_description
from ..rope import DEFAULT_FACTOR
from .runner import file_name


@dataclass
class Subject:
    """One model to measure: `[LABEL=]MODEL[+linear|+ntk|+yarn]`."""

    label: str
    name: str
    rope_scaling_type: str | None
    target_length: int | None = None
    """Of a base: that of the adapters it stands beside, if they have one in common."""

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


def open_subject(
    subject: Subject, options: Namespace, factor: int = DEFAULT_FACTOR
) -> tuple[Path | None, dict[str, Any], str, PreTrainedConfig]:
    """(adapter's folder or None, settings, base's name, base's config), before any weights are read.

    A base's target is that of the adapters beside it, else `factor` windows, where no --target_length is given. With a
    factor of 1 it is the window.
    """
    folder = _adapter(subject.name)
    settings: dict[str, Any] = {"label": subject.label, "load_in_4bit": not options.no_4bit}
    if folder is None:
        with about(subject.name):
            config = AutoConfig.from_pretrained(resolve_base(subject.name))
        window = rope.pretrained_window(config)
        merged = Path(subject.name) / "cream.json"
        if merged.is_file():
            description = read_description(merged.parent, subject.name)
            settings |= {key: description[key] for key in ("pretrained_window", "target_length", "rope_scaling_type")}
            settings["adapter_sha256"] = description.get("adapter_sha256")
            return None, settings, description["base_model"], config
        settings |= {"rope_scaling_type": subject.rope_scaling_type, "pretrained_window": window}
        beside = subject.target_length if factor > 1 else None
        settings["target_length"] = options.target_length or beside or factor * window
        return None, settings, subject.name, config
    if subject.rope_scaling_type:
        raise ValueError(
            f"{subject.name} is an adapter and brings its RoPE scaling: leave out +{subject.rope_scaling_type}"
        )
    description = read_description(folder, subject.name)
    settings |= {key: description[key] for key in ("pretrained_window", "target_length", "rope_scaling_type")}
    settings["adapter_sha256"] = adapter_sha256(folder)
    return folder, settings, description["base_model"], rope.load_base_config(folder)


def load_subject(
    subject: Subject, folder: Path | None, settings: dict[str, Any], options: Namespace
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    in_4bit = not options.no_4bit
    if folder is not None:
        return load_adapter(folder, base_model=options.base_model, load_in_4bit=in_4bit)
    scaling = {"target_length": settings["target_length"], "rope_scaling_type": subject.rope_scaling_type}
    model = load_base(subject.name, **scaling, load_in_4bit=in_4bit).eval()
    return model, load_tokenizer(subject.name)


def public_name(name: str) -> str:
    """A name for results, which are published: local paths are not."""
    return Path(name).name if Path(name).exists() else name


def result_file(subject: Subject, options: Namespace) -> Path:
    return Path(options.output_dir) / file_name(subject.label)


def subjects_of(options: Namespace) -> list[Subject]:
    subjects = [Subject.parse(text) for text in options.compare]
    labels = [subject.label for subject in subjects]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two models have the same label ({', '.join(labels)}): write LABEL=MODEL")
    opened = [open_subject(subject, options)[1] for subject in subjects]
    targets = {settings["target_length"] for settings in opened if "adapter_sha256" in settings}
    for subject in subjects:
        subject.target_length = next(iter(targets)) if len(targets) == 1 else None
    return subjects
