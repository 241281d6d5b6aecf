"""A few values of every kind of layer of a base, by which bases of one shape are told apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..families import decoder_name

VALUES = 8
"""Of each kind of layer, such as the q_proj of all layers; spread over one tensor."""
RELATIVE, ABSOLUTE = 0.005, 1e-7
"""Rounding to bfloat16 (2**-8) or float16, and to the four digits recorded, moves a value less."""

Read = Callable[[str, int], list[float] | None]
"""Takes the name of a tensor and a number of values; None where it cannot be read."""


def weight_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Tensor name, as the text decoder alone has it -> the safetensors file in `folder` that holds it, and its name
    there. Damaged files are left to whoever loads them."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
        if whole.is_file():
            with safe_open(whole, "pt") as file:
                return {decoder_name(name): (whole, name) for name in file.keys()}  # noqa: SIM118 - not a dict
        files = json.loads(index.read_text())["weight_map"]
        return {decoder_name(name): (folder / file, name) for name, file in files.items()}
    return {}


def spread(tensor: Any, shape: Iterable[int], count: int) -> list[float] | None:
    """`count` values spread over a tensor, or over a slice of a safetensors file, of this shape."""
    rows, *rest = shape
    columns = int(torch.tensor(rest).prod()) if rest else 1
    if rows * columns < count:
        return None
    places = torch.linspace(0, rows * columns - 1, count, dtype=torch.float64).long().tolist()
    values = [tensor[place // columns : place // columns + 1].reshape(-1)[place % columns] for place in places]
    return [float(f"{float(value):.4g}") for value in values] if values[0].is_floating_point() else None


def from_files(files: Mapping[str, tuple[Path, str]]) -> Read:
    """Values from safetensors files, see `weight_files`. A row of a tensor is read for each."""

    def read(name: str, count: int) -> list[float] | None:
        with contextlib.suppress(KeyError, OSError, SafetensorError):
            path, stored = files[name]
            with safe_open(path, "pt") as file:
                part = file.get_slice(stored)
                return spread(part, part.get_shape(), count)
        return None

    return read


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own weights by the names that its files have, adapted or not."""
    found = {}
    for name, parameter in model.named_parameters():
        if not re.search(r"lora_|modules_to_save|token_adapter", name):
            plain = re.sub(r"^base_model\.model\.|\.(base_layer|original_module)(?=\.)", "", name)
            found[plain] = parameter
    return found


def from_model(model: nn.Module, files: Mapping[str, tuple[Path, str]]) -> Read:
    """Values of a loaded model; those of its quantized weights, which differ, are taken from the base's files."""
    weights, stored = _weights(model), from_files(files)

    def read(name: str, count: int) -> list[float] | None:
        weight = weights.get(name)
        if weight is None:
            return None
        if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
            return stored(name, count)
        # Of a model in shards or without weights there is nothing to compare.
        return None if weight.is_meta or not weight.numel() else spread(weight.detach(), weight.shape, count)

    return read


def fingerprint(model: nn.Module, files: Mapping[str, tuple[Path, str]]) -> dict[str, list[float]]:
    """Tensor name -> some of its values, for one tensor of each kind; `files` are those of the model's base."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in _weights(model):
        kinds[re.sub(r"\d+", "N", name)].append(name)
    read = from_model(model, files)
    found = {names[len(names) // 2]: read(names[len(names) // 2], VALUES) for names in kinds.values()}
    return {name: values for name, values in found.items() if values}


def digest(folder: Path) -> str | None:
    """A SHA-256 of some values of each tensor in the safetensors files of a folder; None where there are none."""
    files = weight_files(folder)
    read = from_files(files)
    values = {name: read(name, VALUES) for name in sorted(files)}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest() if values else None


def differing(wanted: Mapping[str, list[float]], read: Read) -> str | None:
    """The first tensor whose values are others than those recorded, by more than rounding; None if there is none."""
    for name, values in wanted.items():
        found = read(name, len(values)) if values else None
        if found is not None and not torch.allclose(
            torch.tensor(found), torch.tensor(values), rtol=RELATIVE, atol=ABSOLUTE
        ):
            return name
    return None
