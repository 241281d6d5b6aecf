"""What a downloaded adapter is, and what happens to those who load it in the usual way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from .. import rope
from .adapter import adapter_folder, open_adapter
from .record import Record, is_adapter

PRIVATE_FILES = ("training_args.bin", "optimizer.pt")
UNSCALED = (
    "{rope}: UNSCALED. PeftModel and AutoModelForCausalLM give this without a word; it looks right on short prompts "
    "and is not the model that was trained. Beyond {window:,} tokens it fails. Use cream_peft.load_adapter, or pass "
    "config=AutoConfig.from_pretrained({name!r}, subfolder='base_config')"
)


@dataclass(frozen=True)
class Finding:
    """One line of what `cream-peft check` prints."""

    item: str
    verdict: str
    """ok, trap (silent and wrong for those who load it in the usual way) or wrong."""
    found: str


def describe_rope(config: PreTrainedConfig) -> str:
    """RoPE of a config in one line."""
    parameters = dict(config.rope_parameters or {})
    kind, theta = parameters.pop("rope_type", "default"), parameters.pop("rope_theta")
    rest = "".join(f", {key} {value:g}" for key, value in parameters.items() if isinstance(value, int | float))
    return f"{kind}, theta {theta:,.0f}{rest}, max_position_embeddings {config.max_position_embeddings:,}"


def check_weights(path: Path) -> Finding:
    """Whether the adapter's tensors are finite, and have moved: lora_B starts at zero."""
    item = "adapter weights"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        return Finding(item, "wrong", f"{damaged[0]} holds values that are not finite: train it again")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if ups and not any(tensor.any() for tensor in ups):
        return Finding(item, "wrong", "lora_B is zero throughout: the adapter does nothing, it never trained")
    size = sum(tensor.numel() for tensor in tensors.values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return Finding(item, "ok", f"{len(tensors)} tensors, {size / 1e6:.2f} M parameters, {', '.join(kinds)}")


def _private_files(folder: Path) -> list[Finding]:
    found = [name for name in PRIVATE_FILES if (folder / name).exists()]
    return [Finding("other files", "wrong", f"{n} may hold tokens and paths: remove it before sharing") for n in found]


def _check_merged(folder: Path, record: Record) -> list[Finding]:
    config, scaling, target = (
        rope.load_base_config(folder / "config.json"),
        record.rope_scaling_type,
        record.target_length,
    )
    kind = scaling if scaling in ("linear", "yarn") else config.rope_parameters["rope_type"]
    if config.rope_parameters["rope_type"] != kind or config.max_position_embeddings != target:
        found = f"{describe_rope(config)}: config.json is not that of the merge ({scaling}, {target:,} tokens)"
        return [Finding("RoPE", "wrong", f"{found}: merge again")]
    return [
        Finding("kind", "ok", f"a merged model of {record.base_model}"),
        Finding("extended", "ok", f"{record.pretrained_window:,} to {target:,} tokens"),
        Finding("RoPE", "ok", describe_rope(config)),
        Finding("plain load", "ok", "AutoModelForCausalLM.from_pretrained is right as it is"),
        *_private_files(folder),
    ]


def check_adapter(repo_or_dir: str | Path, *, base_model: str | None = None, **hub_kwargs: Any) -> list[Finding]:
    """Findings on an adapter or a merged model. Reads no weights of the base.

    Raises:
        AdapterError: if the adapter is not complete, such as one that plain PEFT saved, or the base is not the one
            trained on.
    """
    folder = adapter_folder(repo_or_dir, **hub_kwargs)
    if not is_adapter(folder) and (folder / "config.json").is_file():
        return _check_merged(folder, Record.read(folder, str(repo_or_dir)))
    adapter = open_adapter(repo_or_dir, base_model=base_model, **hub_kwargs)
    record, trained, plain = adapter.record, adapter.scaled_config, adapter.base_config
    load = Finding("plain PEFT load", "ok", "the base's RoPE is not scaled, so nothing is lost")
    if plain.rope_parameters != trained.rope_parameters:
        said = UNSCALED.format(rope=describe_rope(plain), window=record.pretrained_window, name=str(repo_or_dir))
        load = Finding("plain PEFT load", "trap", said)
    return [
        Finding("files", "ok", "complete"),
        Finding("base", "ok", f"{adapter.base_name}, shape and vocabulary as trained on"),
        Finding("extended", "ok", f"{record.pretrained_window:,} to {record.target_length:,} tokens"),
        Finding("RoPE trained with", "ok", describe_rope(trained)),
        check_weights(adapter.folder / "adapter_model.safetensors"),
        *_private_files(adapter.folder),
        load,
    ]
