"""What a downloaded adapter is, and what happens to those who load it in the usual way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from .. import rope
from .adapter import adapter_folder, open_adapter
from .record import read_description

PRIVATE_FILES = ("training_args.bin", "optimizer.pt")


def describe_rope(config: PreTrainedConfig) -> str:
    """RoPE of a config in one line."""
    parameters = dict(config.rope_parameters)
    kind, theta = parameters.pop("rope_type", "default"), parameters.pop("rope_theta")
    rest = "".join(f", {key} {value:g}" for key, value in parameters.items() if isinstance(value, int | float))
    return f"{kind}, theta {theta:,.0f}{rest}, max_position_embeddings {config.max_position_embeddings:,}"


def _row(item: str, verdict: str, found: str) -> dict[str, str]:
    return {"item": item, "verdict": verdict, "found": found}


def _weights(path: Path) -> dict[str, str]:
    """Whether the adapter's tensors are finite, and have moved: lora_B starts at zero."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        return _row("adapter weights", "wrong", f"{damaged[0]} holds values that are not finite: train it again")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if ups and not any(tensor.any() for tensor in ups):
        return _row("adapter weights", "wrong", "lora_B is zero throughout: the adapter does nothing, it never trained")
    size = sum(tensor.numel() for tensor in tensors.values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return _row("adapter weights", "ok", f"{len(tensors)} tensors, {size / 1e6:.2f} M parameters, {', '.join(kinds)}")


def _private_files(folder: Path) -> list[dict[str, str]]:
    return [
        _row("other files", "wrong", f"{name} may hold tokens and paths: remove it before sharing")
        for name in PRIVATE_FILES
        if (folder / name).exists()
    ]


def _check_merged(folder: Path, description: dict[str, Any]) -> list[dict[str, str]]:
    config, scaling = rope.load_base_config(folder / "config.json"), description["rope_scaling_type"]
    kind = scaling if scaling in ("linear", "yarn") else config.rope_parameters["rope_type"]
    reached, target = config.max_position_embeddings, description["target_length"]
    if config.rope_parameters["rope_type"] != kind or reached != target:
        found = f"{describe_rope(config)}: config.json is not that of the merge ({scaling}, {target:,} tokens)"
        return [_row("RoPE", "wrong", f"{found}: merge again")]
    return [
        _row("kind", "ok", f"a merged model of {description['base_model']}"),
        _row("extended", "ok", f"{description['pretrained_window']:,} to {target:,} tokens"),
        _row("RoPE", "ok", describe_rope(config)),
        _row("plain load", "ok", "AutoModelForCausalLM.from_pretrained is right as it is"),
        *_private_files(folder),
    ]


def check_adapter(repo_or_dir: str | Path, *, base_model: str | None = None, **hub_kwargs: Any) -> list[dict[str, str]]:
    """Findings on an adapter or a merged model: item, verdict (ok, trap, wrong), what was found. Reads no base weights.

    Raises:
        AdapterError: if the adapter is not complete, such as one that plain PEFT saved, or the base is not the one
            trained on.
    """
    folder = adapter_folder(repo_or_dir, **hub_kwargs)
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        return _check_merged(folder, read_description(folder, str(repo_or_dir)))
    adapter = open_adapter(repo_or_dir, base_model=base_model, **hub_kwargs)
    description, trained, plain = adapter.description, adapter.scaled_config, adapter.base_config
    rows = [
        _row("files", "ok", "complete"),
        _row("base", "ok", f"{adapter.base_name}, shape and vocabulary as trained on"),
        _row("extended", "ok", f"{description['pretrained_window']:,} to {description['target_length']:,} tokens"),
        _row("RoPE trained with", "ok", describe_rope(trained)),
        _weights(adapter.folder / "adapter_model.safetensors"),
        *_private_files(adapter.folder),
    ]
    if plain.rope_parameters == trained.rope_parameters:
        rows.append(_row("plain PEFT load", "ok", "the base's RoPE is not scaled, so nothing is lost"))
    else:
        window = description["pretrained_window"]
        rows.append(_row(
            "plain PEFT load", "trap",
            f"{describe_rope(plain)}: UNSCALED. PeftModel and AutoModelForCausalLM give this without a word; it looks "
            f"right on short prompts and is not the model that was trained. Beyond {window:,} tokens it fails. Use "
            f"cream_peft.load_adapter, or pass config=AutoConfig.from_pretrained({str(repo_or_dir)!r}, "
            "subfolder='base_config')",
        ))  # fmt: skip
    return rows
