"""The adapter alone as a GGUF LoRA, which llama.cpp loads beside the base's own GGUF."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..model.adapter import open_adapter
from ..model.check import check_weights
from .merge import ADAPTER, Weights, find_changes, read_config
from .serving import LLAMA_CPP, ServingError, llama_cpp_command

PAIRED = "llama"
"""The architecture that rotates neighbouring features of a head, where transformers rotates features half a head apart:
in its GGUFs the rows of q and k stand in another order."""
MAGIC = b"GGUF"


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows (heads * size, ...) of q or k in llama.cpp's order: of each head 0, size/2, 1, size/2 + 1, ..."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _heads(path: str, config: PreTrainedConfig) -> int | None:
    """Heads of a layer whose rows llama.cpp has in pairs; None for the others."""
    kinds = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return kinds.get(path.rsplit(".", 1)[-1]) if LLAMA_CPP[config.model_type] == PAIRED else None


@dataclass(frozen=True)
class GGUFLora:
    """What was written: the file, the layers that it adapts, its bytes, and the line that serves it."""

    file: str
    layers: int
    bytes: int
    command: str


def _refuse_file(file: Path) -> None:
    if file.is_dir():
        raise ServingError(f"{file} is a folder: name a file, such as adapter.gguf")
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise ServingError(f"{file} is there and no GGUF: choose another name")


def write_gguf_lora(
    repo_or_dir: str | Path,
    file: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    **hub_kwargs: Any,
) -> GGUFLora:
    """Write a LoRA adapter as a GGUF that llama.cpp loads beside the base's own, in fp32. Of the base its config is
    read, never its weights.

    rsLoRA and ranks or alphas by layer are in B: llama.cpp multiplies B A by alpha / rank, with one alpha for all.

    Args:
        repo_or_dir, base_model, revision, hub_kwargs: see `open_adapter`.
        file: where it goes; an earlier GGUF is replaced once the new one is whole.

    Raises:
        AdapterError: as `open_adapter`.
        ServingError: naming what cannot be served so, or what is missing.
    """
    try:
        import gguf
    except ImportError:
        raise ServingError("writing a GGUF needs its package: run `pip install gguf`") from None
    file = Path(file)
    _refuse_file(file)
    adapter = open_adapter(repo_or_dir, base_model=base_model, revision=revision, **hub_kwargs)
    command = llama_cpp_command(adapter.folder, adapter.record, str(file))
    if (weights := check_weights(adapter.folder / ADAPTER)).verdict == "wrong":
        raise ServingError(f"{repo_or_dir} cannot be converted: {weights.found}")
    peft, config, given = read_config(adapter.folder), adapter.scaled_config, Weights([adapter.folder / ADAPTER])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    architecture = LLAMA_CPP[config.model_type]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    places = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    # llama.cpp takes 0 for "no alpha", and a scale of 1.
    alpha = float(peft.lora_alpha) or 1.0
    part = file.with_name(f".{file.name}.part")
    writer = gguf.GGUFWriter(part, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    # For whoever gets the file alone.
    writer.add_description(llama_cpp_command(adapter.folder, adapter.record).replace(" \\\n ", ""))
    changes = find_changes(peft, model, given)
    for name, change in changes.items():
        path = name.removesuffix(".weight")
        place = places.get_name(path)
        if change.transposed or place is None:
            raise ServingError(f"{path} is adapted, and llama.cpp takes no LoRA there: merge it into the base instead")
        a, b = (given.read(key).float() for key in change.shapes)
        b = b * ((change.scale or 0.0) * len(a) / alpha)
        if heads := _heads(path, config):
            b = in_pairs(b, heads)
        writer.add_tensor(f"{place}.weight.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{place}.weight.lora_b", b.contiguous().numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return GGUFLora(str(file), len(changes), file.stat().st_size, command)
