"""The models named on a command line: found, described for results, and loaded."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import rope
from ..errors import about, missing_folder
from ..model.adapter import Adapter, adapter_folder, open_adapter, warn_of_fewer_bits
from ..model.base import base_commit, load_base, read_config, resolve_base
from ..model.check import check_weights
from ..model.fingerprint import digest
from ..model.record import Record, adapter_sha256, is_adapter
from ..model.tokenizer import load_tokenizer
from .results import Settings, file_name

logger = logging.getLogger(__name__)


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
        parts = text.split("=")
        for count in range(len(parts)):
            # A folder may have the sign in its name, as runs/lr=1e-4 has.
            if Path(("=".join(parts[count:])).partition("+")[0]).is_dir():
                label, rest = "=".join(parts[:count]), "=".join(parts[count:])
                break
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
    adapter: Adapter | None
    """None for a base or a merged model."""
    base: str
    """Hub id or folder of the base."""
    config: PreTrainedConfig
    settings: Settings
    context_length: int | None = None
    """Tokens of a training example, of what was trained within the window of its base."""

    def load(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """The model with its RoPE scaled, and its tokenizer. What nobody holds any longer makes room for it."""
        # A 4-bit model refers to itself.
        gc.collect()
        torch.cuda.empty_cache()
        in_4bit, dtype = bool(self.settings.load_in_4bit), self.settings.dtype
        if self.adapter:
            return self.adapter.load(in_4bit, dtype=dtype)
        name, target, scaling = self.spec.name, self.settings.target_length, self.spec.rope_scaling_type
        options: dict[str, Any] = {"rope_scaling_type": scaling, "load_in_4bit": in_4bit, "target_length": target}
        return load_base(name, dtype=dtype, **options, **self._at).eval(), self.tokenizer()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone."""
        return self.adapter.tokenizer() if self.adapter else load_tokenizer(self.spec.name, **self._at)

    @property
    def _at(self) -> dict[str, Any]:
        return {"revision": self.settings.base_revision} if self.settings.base_revision else {}


def results_files(opened: Iterable[OpenedModel], output_dir: str, ending: str = "") -> dict[str, Path]:
    """Label -> the file of a model's results.

    Raises:
        ValueError: if two have one file.
    """
    labels = [model.spec.label for model in opened]
    files = {label: Path(output_dir) / file_name(label + ending) for label in labels}
    if len(set(files.values())) < len(files):
        raise ValueError(f"two labels have one results file ({', '.join(files)}): choose others, LABEL=MODEL")
    return files


def _folder(name: str) -> Path | None:
    """Where the files lie that describe a model: its own folder, or the snapshot of its repository on the Hub, without
    the weights of whole models. None for the embedded model, and for an id without an owner, such as gpt2."""
    path = Path(name)
    if not path.is_dir():
        if missing := missing_folder(name):
            raise ValueError(f"{name}: {missing}")
        return None if Path(resolve_base(name)).is_dir() or "/" not in name else adapter_folder(name)
    if not is_adapter(path) and not (path / "config.json").is_file():
        raise ValueError(f"{name} holds neither an adapter (adapter_config.json) nor a model (config.json)")
    return path


def open_model(
    spec: ModelSpec, load_in_4bit: bool = True, base_model: str | None = None, dtype: str | None = None
) -> OpenedModel:
    """Find a model and read its config. Of a base as it is the target length stays None.

    An adapter's base is taken from `base_model` if given.
    """
    adapter, name, folder = None, spec.name, _folder(spec.name)
    is_here = Path(name).is_dir()
    scaling = spec.rope_scaling_type
    settings = Settings(label=spec.label, load_in_4bit=load_in_4bit, dtype=dtype, rope_scaling_type=scaling)
    if folder and is_adapter(folder):
        if spec.rope_scaling_type:
            raise ValueError(f"{name} is an adapter and brings its RoPE scaling: leave out +{spec.rope_scaling_type}")
        adapter = open_adapter(name, base_model=base_model)
        if (weights := check_weights(adapter.folder / "adapter_model.safetensors")).verdict == "wrong":
            raise ValueError(f"{name} is not measured: {weights.found}")
        if not adapter.record.is_of(adapter.folder):
            raise ValueError(f"{name} is not measured: its cream.json was written for other weights")
        record, config, own = adapter.record, adapter.scaled_config, adapter_sha256(adapter.folder)
    else:
        record = Record.read(folder, name, is_here) if folder and (folder / "cream.json").is_file() else None
        own = record.adapter_sha256 if record else None
        with about(name):
            config = read_config(name, trust_remote_code=False)
    if record is None:
        weights, window = digest(Path(name)) if is_here else None, rope.pretrained_window(config)
        known = {"pretrained_window": window, "base_sha256": weights, "base_revision": base_commit(name)}
        settings = replace(settings, **known)
        return OpenedModel(spec, None, name, config, settings)
    warn_of_fewer_bits(record, spec.label, load_in_4bit)
    settings = replace(
        settings,
        pretrained_window=record.pretrained_window,
        target_length=record.target_length,
        rope_scaling_type=record.rope_scaling_type,
        adapter_sha256=own,
    )
    fed = record.positions.context_length if record.is_within_window else None
    return OpenedModel(spec, adapter, record.base_model, config, settings, fed)


def open_models(
    texts: Iterable[str],
    *,
    target_length: int | None = None,
    base_model: str | None = None,
    load_in_4bit: bool = True,
    dtype: str | None = None,
    within_window: bool = False,
) -> list[OpenedModel]:
    """The models that are compared, in order, each with its base found.

    A base's target is `target_length` (tokens), else that of the adapters beside it, if they have one in common, else 8
    windows. `base_model` is the base of all adapters, instead of those that they name. `dtype` is of what is not
    quantized, see `load_base`. `within_window`: the target of a base whose RoPE is not scaled is its window.

    Raises:
        ValueError: a model that is not there, or two models of one label.
    """
    specs = [ModelSpec.parse(text) for text in texts]
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two models have the same label ({', '.join(labels)}): write LABEL=MODEL")
    opened = [open_model(spec, load_in_4bit, base_model, dtype) for spec in specs]
    trained = {model.settings.target_length for model in opened if model.settings.target_length}
    beside = min(trained) if len(trained) == 1 else None
    for place, model in enumerate(opened):
        if model.settings.target_length is None:
            window = model.settings.pretrained_window or 0
            usual = window if within_window and not model.spec.rope_scaling_type else beside
            target = target_length or usual or rope.DEFAULT_FACTOR * window
            if model.spec.rope_scaling_type and not target_length and len(trained) > 1:
                told = (specs[place].label, f"{target:,}", ", ".join(f"{one:,}" for one in sorted(trained)))
                logger.warning("%s is scaled for %s tokens, the adapters for %s: see --target_length", *told)
            if model.spec.rope_scaling_type and target <= window:
                raise ValueError(
                    f"{specs[place].label}: RoPE scaling does nothing up to {target:,} tokens, since the window is "
                    f"{window:,}: leave out +{model.spec.rope_scaling_type}, or set a longer --target_length"
                )
            opened[place] = replace(model, settings=replace(model.settings, target_length=target))
    return opened
