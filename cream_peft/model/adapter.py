"""A trained adapter: found, checked against its base, and loaded with the RoPE it was trained with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .. import rope
from ..errors import about
from .base import embeddings_of, load_base, load_tokenizer, resolve_base
from .record import FINGERPRINT_TOLERANCE, REQUIRED_FILES, AdapterError, Record, fingerprint

ADAPTER_FILES = [*REQUIRED_FILES, "config.json", "*token*", "*.jinja"]
CHECKPOINTS = ["last-checkpoint/*", "checkpoint-*/*"]
SHAPE_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE_FIELDS += ("num_attention_heads", "num_key_value_heads", "head_dim")
HUB_OPTIONS = ("token", "cache_dir", "trust_remote_code")


@dataclass
class Adapter:
    """A trained adapter, opened but not loaded, and the base that it belongs to."""

    folder: Path
    """Its files on this disk."""
    record: Record
    base_name: str
    """Hub id or folder of the base."""
    base_options: dict[str, Any]
    """revision, token, ... to open the base with."""
    base_config: PreTrainedConfig
    """The base's own config, unscaled, as found at base_name."""
    scaled_config: PreTrainedConfig
    """The config of the base that the adapter was trained on, its RoPE scaled."""

    def refuse_other_weights(self, embeddings: torch.Tensor) -> None:
        """Refuse a base with other weights than those trained on, such as a chat model in place of its base model.

        Raises:
            AdapterError: if the fingerprint of its input embeddings differs by more than rounding.
        """
        wanted, found = torch.tensor(self.record.base_fingerprint), torch.tensor(fingerprint(embeddings))
        if len(found) == len(wanted) and (found - wanted).norm() > FINGERPRINT_TOLERANCE * wanted.norm():
            raise AdapterError(
                f"{self.base_name} has other weights than the base this adapter was trained on "
                f"({self.record.base_model}): its embeddings differ. Pass base_model with the right one"
            )


def adapter_folder(repo_or_dir: str | Path, **hub_kwargs: Any) -> Path:
    """The local folder of an adapter: itself, or the snapshot of a Hub repository."""
    if Path(repo_or_dir).is_dir():
        return Path(repo_or_dir)
    with about(str(repo_or_dir)):
        hub_kwargs |= {"allow_patterns": ADAPTER_FILES, "ignore_patterns": CHECKPOINTS}
        return Path(snapshot_download(str(repo_or_dir), **hub_kwargs))


def _refuse_other_base(found: PreTrainedConfig, trained: PreTrainedConfig, record: Record, name: str) -> None:
    scaled = rope.scaled_config(found, record.target_length, record.rope_scaling_type)
    pairs = [(field, getattr(scaled, field, None), getattr(trained, field, None)) for field in SHAPE_FIELDS]
    pairs.append(("max_position_embeddings", rope.pretrained_window(found), record.pretrained_window))
    pairs.append(("rope_parameters", scaled.rope_parameters, trained.rope_parameters))
    for field, got, wanted in pairs:
        if got != wanted:
            raise AdapterError(
                f"{name} is not the base this adapter was trained on: its {field} is {got}, trained with {wanted}. "
                "Pass base_model with the right Hub id or folder"
            )


def open_adapter(
    repo_or_dir: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Adapter:
    """Find an adapter and its base, and make sure that they belong together; no weights of the base are read.

    Args:
        repo_or_dir: Hub id or local folder of the adapter.
        base_model: Hub id or folder to take the base from, instead of the one that the adapter names.
        revision: branch, tag or commit of the adapter's repository. The base's is the one trained on.
        hub_kwargs: token, cache_dir.

    Raises:
        AdapterError: when files are missing, or when the base differs in a field that matters; the field is named.
    """
    folder = adapter_folder(repo_or_dir, revision=revision, **hub_kwargs)
    record = Record.read(folder, str(repo_or_dir))
    if record.merged:
        raise AdapterError(
            f"{repo_or_dir} is a merged model, not an adapter: load it with AutoModelForCausalLM.from_pretrained"
        )
    if base_model is None and record.base_is_local:
        raise AdapterError(
            f"{repo_or_dir} was trained on a local base, the folder {record.base_model!r}: say where it lies "
            "with base_model (on a command line --base_model), or train with base_model_id, its Hub id"
        )
    base_options = hub_kwargs | ({"trust_remote_code": True} if trust_remote_code else {})
    if base_model is None and record.base_revision:
        base_options["revision"] = record.base_revision
    name, trained = base_model or record.base_model, rope.load_base_config(folder)
    with about(name):
        base_config = AutoConfig.from_pretrained(resolve_base(name), **base_options)
    _refuse_other_base(base_config, trained, record, name)
    return Adapter(folder, record, name, base_options, base_config, trained)


def load_adapter(
    repo_or_dir: str | Path,
    *,
    base_model: str | None = None,
    load_in_4bit: bool = True,
    revision: str | None = None,
    **model_kwargs: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter on its base with the RoPE it was trained with.

    Args:
        repo_or_dir, base_model, revision: see `open_adapter`.
        load_in_4bit: NF4 base, or one in `dtype`.
        model_kwargs: for `load_base` (dtype, attn_implementation, token, device_map, ...).

    Raises:
        AdapterError: when files are missing, or when the base differs in a field that matters; the field is named.
    """
    hub_kwargs = {key: model_kwargs.pop(key) for key in HUB_OPTIONS if key in model_kwargs}
    adapter = open_adapter(repo_or_dir, base_model=base_model, revision=revision, **hub_kwargs)
    model = load_base(
        adapter.base_name,
        target_length=adapter.record.target_length,
        rope_scaling_type=adapter.record.rope_scaling_type,
        load_in_4bit=load_in_4bit,
        config=copy.deepcopy(adapter.base_config),
        **adapter.base_options,
        **model_kwargs,
    )
    adapter.refuse_other_weights(embeddings_of(model))
    return PeftModel.from_pretrained(model, str(adapter.folder)).eval(), load_tokenizer(str(adapter.folder))
