"""A LoRA adapter merged into its base: a plain model whose config.json carries the RoPE scaling, in little memory."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import rope
from ..errors import about
from ..families import decoder_name
from ..model.adapter import Adapter, eos_token_id, open_adapter
from ..model.base import GIB, resolve_base
from ..model.check import check_weights
from ..model.fingerprint import from_files, weight_files
from ..model.misfit import KEEPS_BASE
from ..model.record import adapter_sha256, write_json
from ..model.tokenizer import make_tokenizer_readable
from .card import CARD, write_card
from .output import MergeError, in_place_of, refuse_output

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, PREFIX, MAGNITUDE = "adapter_model.safetensors", "base_model.model.", "lora_magnitude_vector"
GENERATION = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
"""transformers 5 does not save it, and without it llama.cpp's converter makes tokens that cut the text otherwise."""
DTYPES = ("bfloat16", "float16", "float32")
UNDERSTOOD = re.compile(
    "peft_type|task_type|peft_version|auto_mapping|base_model_name_or_path|revision|inference_mode|runtime_config|r|"
    "lora_alpha|rank_pattern|alpha_pattern|use_rslora|use_dora|lora_dropout|eva_config|megatron_config|megatron_core|"
    "target_modules|target_parameters|exclude_modules|layers_to_transform|layers_pattern|modules_to_save|"
    "fan_in_fan_out|ensure_weight_tying|bias|lora_bias|trainable_token_indices"
)
"""The fields of LoraConfig that are followed here, have no effect on a merge, or train tensors that are refused by name
(the last three). Any other must have its default."""
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE)
LEFT_OUT = ("rotary_emb.inv_freq", ".base_layer.weight")
"""Of older Llamas, where every runtime computes it from the config; and what PEFT saves beside a LoRA on embeddings."""


class Weights:
    """The tensors of safetensors files. `like` has them by name without data: their shapes and dtypes. Of an image and
    text model they are those of its decoder alone, by its names."""

    def __init__(self, files: list[Path]):
        self.like: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for stored in opened.keys():  # noqa: SIM118 - not a dict
                        if not stored.endswith(LEFT_OUT):
                            name = decoder_name(stored)
                            self.like[name] = torch.empty_like(opened.get_tensor(stored), device="meta")
                            self._places[name] = (file, stored)
            except (SafetensorError, FileNotFoundError) as error:
                raise MergeError(f"{file.name} is missing or damaged ({error}): get the model again") from error
        if any(name != stored for name, (_, stored) in self._places.items()):
            own = {name for name, (_, stored) in self._places.items() if name != stored or name == "lm_head.weight"}
            self.like = {name: like for name, like in self.like.items() if name in own}

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Its bytes are read on use, and its file stays mapped only as long as the tensor lives."""
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(stored)


def _base_folder(adapter: Adapter) -> Path:
    """The local folder of the base's weights: given, embedded, or a snapshot of its Hub repository."""
    source = Path(resolve_base(adapter.base_name))
    if source.is_dir():
        return source
    options = {key: value for key, value in adapter.base_options.items() if key != "trust_remote_code"}
    # Some repositories hold their weights a second time, in a folder or in a consolidated file.
    options |= {"allow_patterns": ["*.safetensors", INDEX, GENERATION, SENTENCEPIECE]}
    with about(adapter.base_name):
        return Path(snapshot_download(adapter.base_name, ignore_patterns=["*/*", "consolidated*"], **options))


def _base_weights(folder: Path, name: str) -> Weights:
    if (folder / WEIGHTS).is_file():
        return Weights([folder / WEIGHTS])
    if not (folder / INDEX).is_file():
        raise MergeError(f"{name} holds no {WEIGHTS}: load it, write it with save_pretrained, give that as base_model")
    files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return Weights([folder / file for file in sorted(set(files))])


@dataclass(frozen=True)
class Change:
    """What the adapter makes of one tensor of the base: W + scale B A, or a replacement (modules_to_save)."""

    shapes: dict[str, tuple[int, ...]]
    """Of the adapter's tensors, by name: A, B and, for DoRA, the magnitudes; or the replacement."""
    scale: float | None = None
    transposed: bool = False
    """Embeddings are: they have a column for each output."""


def _lora(module: nn.Linear | nn.Embedding, path: str, config: LoraConfig) -> Change:
    """The change that LoRA makes of `module`, by PEFT's rules."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key([*ranks], path), config.r)
    alpha = alphas.get(get_pattern_key([*alphas], path), config.lora_alpha)
    transposed = isinstance(module, nn.Embedding)
    outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
    first, second = PARTS[2:4] if transposed else PARTS[:2]
    start = f"{PREFIX}{path}."
    shapes: dict[str, tuple[int, ...]] = {start + first: (rank, inputs), start + second: (outputs, rank)}
    if config.use_dora:
        shapes[start + MAGNITUDE] = (outputs,)
    return Change(shapes, alpha / (math.sqrt(rank) if config.use_rslora else rank), transposed)


def read_config(folder: Path) -> LoraConfig:
    config, default = PeftConfig.from_pretrained(str(folder)), LoraConfig()
    for name, value in vars(config).items():
        known = value in (*KEEPS_BASE, "eva") if name == "init_lora_weights" else UNDERSTOOD.fullmatch(name)
        if config.peft_type != default.peft_type or not (known or value == getattr(default, name)):
            raise MergeError(f"the adapter is not LoRA alone ({config.peft_type}, {name} {value!r}): use load_adapter")
    return cast(LoraConfig, config)


def find_changes(
    config: LoraConfig, model: PreTrainedModel, given: Weights, base: Weights | None = None
) -> dict[str, Change]:
    """The base's tensors that the adapter changes. A MergeError names one that cannot change, one that the adapter's
    file lacks or has in surplus, or one that is not in the files of `base`."""
    changes: dict[str, Change] = {}
    for path, module in model.named_modules():
        if any(path.endswith(name) for name in config.modules_to_save or ()):
            for name, tensor in module.state_dict().items():
                changes[f"{path}.{name}"] = Change({f"{PREFIX}{path}.{name}": tuple(tensor.shape)})
        elif isinstance(module, nn.Linear | nn.Embedding) and (
            check_target_module_exists(config, path)
            or any(f".{path}.weight".endswith(f".{name}") for name in config.target_parameters or ())
        ):
            changes[f"{path}.weight"] = _lora(module, path, config)
    expected = {key: shape for change in changes.values() for key, shape in change.shapes.items()}
    for key in sorted(given.like.keys() | expected.keys()):
        if key not in expected and not key.endswith(PARTS):
            raise MergeError(f"{key} is of a kind that cannot be merged: use load_adapter")
        if key not in given.like or expected.get(key) != tuple(given.like[key].shape):
            trouble = "has no place in the base, or another shape" if key in given.like else "is missing"
            raise MergeError(f"{key} of {ADAPTER} {trouble}: it does not fit adapter_config.json")
    ends, whole = (model.get_input_embeddings(), model.get_output_embeddings()), model.state_dict()
    tied = {f"{path}.weight" for path, module in model.named_modules() if module in ends}
    for name in changes:
        if name in tied and model.config.tie_word_embeddings:
            raise MergeError(f"{name} is adapted, but the base ties its embeddings and its head: use load_adapter")
        if base and (name not in base.like or base.like[name].shape != whole[name].shape):
            raise MergeError(f"{name} is adapted, but not in the base's files: write base_model with save_pretrained")
    return changes


def _changed(name: str, change: Change, base: Weights, given: Weights) -> torch.Tensor:
    """The base's tensor `name` as the adapter changes it, in fp32, by PEFT's steps and so equal to its merge."""
    if change.scale is None:
        return given.read(*change.shapes)
    a, b, *magnitude = (given.read(key).float() for key in change.shapes)
    weight = base.read(name).float()
    merged = (weight.T if change.transposed else weight) + b @ a * change.scale
    if magnitude:
        # DoRA: each output's weights get the length that was learnt.
        merged = (magnitude[0] / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
    if not torch.isfinite(merged).all():
        raise MergeError(f"{name} cannot be merged: NaNs or infinities come out, the adapter seems to be broken")
    return merged.T if change.transposed else merged


def _describe(folder: Path, adapter: Adapter, base_folder: Path, architecture: str, dtype: str) -> None:
    """Write everything but the weights."""
    target, window = adapter.record.target_length, adapter.record.pretrained_window
    tokenizer, config = adapter.tokenizer(), rope.published_config(adapter.scaled_config)
    tokenizer.save_pretrained(folder)
    make_tokenizer_readable(folder, target)
    if (base_folder / SENTENCEPIECE).is_file():
        shutil.copyfile(base_folder / SENTENCEPIECE, folder / SENTENCEPIECE)
    if (base_folder / GENERATION).is_file():
        generation = json.loads((base_folder / GENERATION).read_text(encoding="utf-8"))
        # Llama-2's ends generation at the base's window.
        if generation.get("max_length") == window:
            generation["max_length"] = max(target, window)
        generation["eos_token_id"] = eos_token_id(generation.get("eos_token_id"), tokenizer)
        write_json(folder / GENERATION, generation)
    record = replace(adapter.record, merged=True, dtype=dtype, adapter_sha256=adapter_sha256(adapter.folder))
    record.write(folder)
    own = {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    own["eos_token_id"] = eos_token_id(config.get("eos_token_id"), tokenizer)
    write_json(folder / "config.json", config | own)
    write_card(folder, record)


def _peak_memory() -> float | None:
    """The most memory that this process has had resident so far, mapped files included, in GiB; None off Linux."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return round(int(found[1]) * 1024 / GIB, 2) if found else None


@dataclass(frozen=True)
class Merged:
    """What a merge left: `bytes` of weights, merged_layers and replaced_tensors (together all that the adapter holds),
    dtype of the largest tensor, peak_memory_gib (see `_peak_memory`)."""

    output_dir: str
    parameters: int
    bytes: int
    shards: int
    merged_layers: int
    replaced_tensors: int
    dtype: str
    seconds: float
    peak_memory_gib: float | None


def _write_weights(
    folder: Path, base: Weights, given: Weights, changes: dict[str, Change], max_shard_size: int | str
) -> tuple[int, int]:
    """Write the tensors of `base`, in the dtypes of base.like and changed by the adapter, a shard at a time; their
    bytes, and the number of files."""
    split = split_torch_state_dict_into_shards(base.like, max_shard_size=max_shard_size)
    free, needed = shutil.disk_usage(folder).free, split.metadata["total_size"]
    if free < needed:
        raise MergeError(f"{folder.parent} has {free / GIB:.1f} GiB free and the model takes {needed / GIB:.1f} GiB")
    with tqdm(total=len(base.like), desc="merge", unit="tensor") as bar:
        for file, names in split.filename_to_tensors.items():
            bar.set_postfix_str(file)
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                tensor = _changed(name, changes[name], base, given) if name in changes else base.read(name)
                shard[name] = tensor.to(base.like[name].dtype).contiguous()
                del tensor  # in fp32
                if shard[name].dtype == torch.float16 and not torch.isfinite(shard[name]).all():
                    raise MergeError(f"{name} holds values beyond float16: use dtype bfloat16 or float32")
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return needed, len(split.filename_to_tensors)


def merge_adapter(
    repo_or_dir: str | Path,
    output_dir: str | Path,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "1GB",
    revision: str | None = None,
    **hub_kwargs: Any,
) -> Merged:
    """Merge a LoRA adapter into its unquantized base: a model that any runtime loads with its RoPE scaled.

    Each tensor is merged in fp32; one output file is in memory at a time, never the model.

    Args:
        repo_or_dir, base_model, revision, hub_kwargs: see `open_adapter`.
        output_dir: where the model goes; made in a folder beside it, then renamed. An earlier merge is replaced, and
            anything else refused.
        dtype: bfloat16, float16 or float32 for all weights. None keeps what the base's files have, float32 included.
        max_shard_size: of one output file, in bytes or as "1GB" (10**9). Peak memory grows with it.

    Raises:
        AdapterError: as `open_adapter`, or if the base's weights are not those trained on.
        MergeError: naming what cannot be merged, read or written.
    """
    start = time.perf_counter()
    if isinstance(max_shard_size, str) and not re.fullmatch(r"[\d.]+ *[KMGT]i?B", max_shard_size, re.IGNORECASE):
        raise MergeError(f"max_shard_size {max_shard_size!r} is no size: write 500MB or 2GB")
    if dtype not in (None, *DTYPES):
        raise MergeError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}, or leave it out to keep the base's")
    output = Path(output_dir).resolve()
    refuse_output(output)
    adapter = open_adapter(repo_or_dir, base_model=base_model, revision=revision, **hub_kwargs)
    base_folder = _base_folder(adapter)
    if output == base_folder.resolve():
        raise MergeError(f"{output} holds the base: choose another output_dir (--output)")
    base, given = _base_weights(base_folder, adapter.base_name), Weights([adapter.folder / ADAPTER])
    if (weights := check_weights(adapter.folder / ADAPTER)).verdict == "wrong":
        raise MergeError(f"{repo_or_dir} cannot be merged: {weights.found}")
    config, remote = read_config(adapter.folder), adapter.base_options["trust_remote_code"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(adapter.scaled_config), trust_remote_code=remote)
    adapter.refuse_other_weights(from_files(weight_files(base_folder)))
    changes = find_changes(config, model, given, base)
    if dtype:
        wanted = getattr(torch, dtype)
        base.like = {name: like.to(wanted) if like.is_floating_point() else like for name, like in base.like.items()}
    main_dtype = str(max(base.like.values(), key=torch.numel).dtype).removeprefix("torch.")
    with in_place_of(output) as scratch:
        size, shards = _write_weights(scratch, base, given, changes, max_shard_size)
        if (output / CARD).is_file():
            # For what a person wrote on it.
            shutil.copyfile(output / CARD, scratch / CARD)
        _describe(scratch, adapter, base_folder, type(model).__name__, main_dtype)
    replaced = sum(change.scale is None for change in changes.values())
    return Merged(
        output_dir=str(output_dir),
        parameters=sum(like.numel() for like in base.like.values()),
        bytes=size,
        shards=shards,
        merged_layers=len(changes) - replaced,
        replaced_tensors=replaced,
        dtype=main_dtype,
        seconds=round(time.perf_counter() - start, 1),
        peak_memory_gib=_peak_memory(),
    )
