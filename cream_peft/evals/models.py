"""The models named on a command line: found, described for results, and loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import rope
from ..errors import about
from ..model.adapter import adapter_folder, load_adapter
from ..model.base import load_base, load_tokenizer, resolve_base
from ..model.record import Record, adapter_sha256, is_adapter
from .results import Settings


@dataclass(frozen=True)
class ModelSpec:
    """One model to measure: `[LABEL=]MODEL[+linear|+ntk|+yarn]`."""

    label: str
    name: str
    """Hub id or folder of an adapter, a base or a merged model."""
    rope_scaling_type: str | None = None
    """Of a base; an adapter brings its own."""

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
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


@dataclass(frozen=True)
class OpenedModel:
    """A model whose config was read, and none of its weights."""

    spec: ModelSpec
    adapter: Path | None
    """Folder of the adapter; None for a base or a merged model."""
    base: str
    """Hub id or folder of the base."""
    config: PreTrainedConfig
    settings: Settings

    def load(self, base_model: str | None = None) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """The model with its RoPE scaled, and its tokenizer. An adapter's base is taken from `base_model` if given."""
        in_4bit = bool(self.settings.load_in_4bit)
        if self.adapter:
            return load_adapter(self.adapter, base_model=base_model, load_in_4bit=in_4bit)
        name, target, scaling = self.spec.name, self.settings.target_length, self.spec.rope_scaling_type
        model = load_base(name, target_length=target, rope_scaling_type=scaling, load_in_4bit=in_4bit)
        return model.eval(), load_tokenizer(name)


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


def open_model(spec: ModelSpec, load_in_4bit: bool = True) -> OpenedModel:
    """Find a model and read its config. Of a base as it is the target length stays None."""
    folder, name = _adapter(spec.name), spec.name
    if folder and spec.rope_scaling_type:
        raise ValueError(f"{name} is an adapter and brings its RoPE scaling: leave out +{spec.rope_scaling_type}")
    is_ours = folder is not None or (Path(name) / "cream.json").is_file()
    record = Record.read(folder or Path(name), name) if is_ours else None
    with about(name):
        config = rope.load_base_config(folder) if folder else AutoConfig.from_pretrained(resolve_base(name))
    settings = Settings(label=spec.label, load_in_4bit=load_in_4bit, rope_scaling_type=spec.rope_scaling_type)
    if record is None:
        settings = replace(settings, pretrained_window=rope.pretrained_window(config))
        return OpenedModel(spec, None, name, config, settings)
    settings = replace(
        settings,
        pretrained_window=record.pretrained_window,
        target_length=record.target_length,
        rope_scaling_type=record.rope_scaling_type,
        adapter_sha256=adapter_sha256(folder) if folder else record.adapter_sha256,
    )
    return OpenedModel(spec, folder, record.base_model, config, settings)


def open_models(
    texts: Iterable[str], *, target_length: int | None = None, load_in_4bit: bool = True, within_window: bool = False
) -> list[OpenedModel]:
    """The models that are compared, in order.

    A base's target is `target_length` (tokens), else that of the adapters beside it, if they have one in common, else 8
    windows. `within_window`: the target of a base whose RoPE is not scaled is its window.

    Raises:
        ValueError: a model that is not there, or two models of one label.
    """
    specs = [ModelSpec.parse(text) for text in texts]
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two models have the same label ({', '.join(labels)}): write LABEL=MODEL")
    opened = [open_model(spec, load_in_4bit) for spec in specs]
    trained = {model.settings.target_length for model in opened} - {None}
    beside = trained.pop() if len(trained) == 1 else None
    for place, model in enumerate(opened):
        if model.settings.target_length is None:
            window = model.settings.pretrained_window or 0
            usual = window if within_window and not model.spec.rope_scaling_type else beside
            target = target_length or usual or rope.DEFAULT_FACTOR * window
            opened[place] = replace(model, settings=replace(model.settings, target_length=target))
    return opened
