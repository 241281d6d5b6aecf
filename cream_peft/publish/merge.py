"""A LoRA adapter merged into its base: a plain model whose config.json carries the RoPE scaling, in little memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .. import rope
from ..errors import about
from ..model.adapter import Adapter, open_adapter, refuse_other_weights
from ..model.base import GIB, load_tokenizer, make_tokenizer_readable, resolve_base
from ..model.record import adapter_sha256
from .card import write_card

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
"""transformers 5 does not save it, and without it llama.cpp's converter makes tokens that cut the text otherwise."""
DTYPES = ("bfloat16", "float16", "float32")
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of PEFT's init_lora_weights that leave the base's weights alone."""
UNSCALED = "rotary_emb.inv_freq"  # in the files of older Llamas; every runtime computes it from the config instead


class MergeError(ValueError):
    """An adapter, a base or a folder that cannot be merged as asked."""


class Weights:
    """The tensors of safetensors files. `like` has them by name without data: their shapes and dtypes."""

    def __init__(self, files: list[Path]):
        self.like: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    names = [name for name in opened.keys() if not name.endswith(UNSCALED)]  # noqa: SIM118
                    self.like |= {name: torch.empty_like(opened.get_tensor(name), device="meta") for name in names}
            except (SafetensorError, FileNotFoundError) as error:
                raise MergeError(f"{file.name} is missing or damaged ({error}): get the model again") from error
            self._files |= dict.fromkeys(names, file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Its bytes are read on use, and its file stays mapped only as long as the tensor lives."""
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)


def _base_folder(adapter: Adapter) -> Path:
    """The local folder of the base's weights: given, embedded, or a snapshot of its Hub repository."""
    source = Path(resolve_base(adapter.base_name))
    if source.is_dir():
        return source
    options = {key: value for key, value in adapter.base_options.items() if key != "trust_remote_code"}
    # Some repositories hold their weights a second time, in a folder or in a consolidated file.
    options["allow_patterns"] = ["*.safetensors", INDEX, GENERATION, SENTENCEPIECE]
    options["ignore_patterns"] = ["*/*", "consolidated*"]
    with about(adapter.base_name):
        return Path(snapshot_download(adapter.base_name, **options))


def _base_weights(folder: Path, name: str) -> Weights:
    if (folder / WEIGHTS).is_file():
        return Weights([folder / WEIGHTS])
    if not (folder / INDEX).is_file():
        raise MergeError(f"{name} holds no {WEIGHTS}: load it, write it with save_pretrained, give that as base_model")
    files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return Weights([folder / file for file in sorted(set(files))])


def _fill(wrapped: PeftModel, file: Path) -> None:
    """Put the adapter's tensors into its layers, or name the one that is missing or left over in a MergeError."""
    state = wrapped.state_dict(keep_vars=True)
    names = {id(parameter): name for name, parameter in state.items()}
    expected = get_peft_model_state_dict(wrapped, state, save_embedding_layers=False)
    # PEFT saves the base's own embeddings beside a LoRA on them.
    try:
        saved = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(".base_layer.weight")}
    except SafetensorError as error:  # only the header was looked at before
        raise MergeError(f"{file.name} is damaged ({error}): get the adapter again") from error
    for key in sorted(saved.keys() | expected.keys()):
        if key not in saved or key not in expected or saved[key].shape != expected[key].shape:
            trouble = "has no place in the base, or another shape" if key in saved else "is missing"
            raise MergeError(f"{key} of adapter_model.safetensors {trouble}: it does not fit adapter_config.json")
    tensors = {names[id(parameter)]: saved[key] for key, parameter in expected.items()}
    wrapped.load_state_dict(tensors, strict=False, assign=True)


def _wrap(adapter: Adapter, base: Weights) -> PeftModel:
    """The model and the adapter; only the adapter's tensors have data, and theirs is read on use."""
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if getattr(config, "init_lora_weights", None) not in PLAIN_INITS or config.layer_replication:
        kind = f"{config.peft_type.value}, init_lora_weights {getattr(config, 'init_lora_weights', None)!r}"
        raise MergeError(f"the adapter is not LoRA alone ({kind}, or layer_replication): use load_adapter")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(adapter.scaled_config), trust_remote_code="trust_remote_code" in adapter.base_options
        )
    embeddings = model.get_input_embeddings()
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embeddings)
    if name in base.like:
        embeddings.weight = nn.Parameter(base.read(name), requires_grad=False)
        refuse_other_weights(model, adapter)
        model.to("meta")
    wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
    _fill(wrapped, adapter.folder / "adapter_model.safetensors")
    return wrapped


def _changes(wrapped: PeftModel, base: Weights) -> dict[str, LoraLayer | nn.Parameter]:
    """For every tensor of the base that changes the layer that computes it, or what takes its place (modules_to_save).
    A MergeError names a tensor of the adapter that is neither, or one of the base that cannot change."""
    model, changes, known = wrapped.get_base_model(), {}, set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear | nn.Embedding):
            changes[f"{path}.weight"] = module
            known |= {id(parameter) for name, parameter in module.named_parameters() if not name.endswith("bias")}
        elif isinstance(module, ModulesToSaveWrapper):
            parameters = dict(module.modules_to_save[module.active_adapters[0]].named_parameters())
            changes |= {f"{path}.{name}": parameter for name, parameter in parameters.items()}
            known |= {id(parameter) for parameter in parameters.values()}
    for name, parameter in wrapped.named_parameters():
        if not parameter.is_meta and id(parameter) not in known:
            raise MergeError(f"{name} is of a kind that cannot be merged: use load_adapter")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = {f"{path}.weight" for path, module in model.named_modules() if module in ends}
    for name in changes:
        if name in tied and model.config.tie_word_embeddings:
            raise MergeError(f"{name} is adapted, but the base ties its embeddings and its head: use load_adapter")
        if name not in base.like:
            raise MergeError(f"{name} is adapted, but not in the base's files: write base_model with save_pretrained")
    return changes


@torch.no_grad()
def _changed(name: str, change: LoraLayer | nn.Parameter, base: Weights) -> torch.Tensor:
    """The base's tensor `name` as the adapter changes it: merged by PEFT in fp32."""
    if isinstance(change, nn.Parameter):
        return change.data
    layer = change.get_base_layer()
    layer.weight = nn.Parameter(base.read(name), requires_grad=False)
    try:
        change.float().merge(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise MergeError(f"{name} cannot be merged: {' '.join(str(error).split())}") from error
    return layer.weight.data


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _describe(folder: Path, adapter: Adapter, base_folder: Path, architecture: str, dtype: str) -> None:
    """Write everything but the weights; config.json last, because nothing loads without it."""
    target, window = adapter.description["target_length"], adapter.description["pretrained_window"]
    tokenizer = load_tokenizer(str(adapter.folder))
    # Below the target it is the base's window, and 1e30 is none; another one is somebody's choice.
    if not target <= tokenizer.model_max_length < 1e20:
        tokenizer.model_max_length = target
    tokenizer.save_pretrained(folder)
    make_tokenizer_readable(folder)
    if (base_folder / SENTENCEPIECE).is_file():
        shutil.copyfile(base_folder / SENTENCEPIECE, folder / SENTENCEPIECE)
    if (base_folder / GENERATION).is_file():
        generation = json.loads((base_folder / GENERATION).read_text(encoding="utf-8"))
        # Llama-2's ends generation at the base's window.
        if generation.get("max_length") == window:
            generation["max_length"] = target
        _write_json(folder / GENERATION, generation)
    made_of = {"merged": True, "dtype": dtype, "adapter_sha256": adapter_sha256(adapter.folder)}
    description = adapter.description | made_of
    _write_json(folder / "cream.json", description)
    write_card(folder, description)
    own = {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    _write_json(folder / "config.json", rope.published_config(adapter.scaled_config) | own)


def _refuse_output(output: Path, base_folder: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if output.is_file():
        raise MergeError(f"{output} is a file: name a folder for the merged model")
    note = output / "cream.json"
    merged = note.is_file() and json.loads(note.read_text(encoding="utf-8")).get("merged")
    if not merged or output.samefile(base_folder):
        raise MergeError(f"{output} is neither empty nor an earlier merge: choose another output_dir (--output)")


def _peak_memory() -> float | None:
    """The most memory that this process has had resident so far, mapped files included, in GiB; None off Linux."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return round(int(found[1]) * 1024 / GIB, 2) if found else None


def _write_weights(
    folder: Path, base: Weights, changes: dict[str, LoraLayer | nn.Parameter], max_shard_size: int | str
) -> dict[str, Any]:
    """Write the tensors of `base`, in the dtypes of base.like and changed by the adapter, a shard at a time."""
    replaced = [isinstance(change, nn.Parameter) for change in changes.values()]
    split = split_torch_state_dict_into_shards(base.like, max_shard_size=max_shard_size)
    free, needed = shutil.disk_usage(folder).free, split.metadata["total_size"]
    if free < needed:
        raise MergeError(f"{folder.parent} has {free / GIB:.1f} GiB free and the model takes {needed / GIB:.1f} GiB")
    with tqdm(total=len(base.like), desc="merge", unit="tensor") as bar:
        for file, names in split.filename_to_tensors.items():
            bar.set_postfix_str(file)
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                # Popped and deleted, so that the layer goes with all that it keeps, and so does the tensor in fp32.
                tensor = _changed(name, changes.pop(name), base) if name in changes else base.read(name)
                shard[name] = tensor.to(base.like[name].dtype).contiguous()
                del tensor
                if shard[name].dtype == torch.float16 and not torch.isfinite(shard[name]).all():
                    raise MergeError(f"{name} holds values beyond float16: use dtype bfloat16 or float32")
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return {
        "parameters": sum(like.numel() for like in base.like.values()),
        "bytes": needed,
        "shards": len(split.filename_to_tensors),
        "merged_layers": len(replaced) - sum(replaced),
        "replaced_tensors": sum(replaced),
        "dtype": str(max(base.like.values(), key=torch.numel).dtype).removeprefix("torch."),
    }


def merge_adapter(
    repo_or_dir: str | Path,
    output_dir: str | Path,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "1GB",
    revision: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Merge a LoRA adapter into its unquantized base: a model that any runtime loads with its RoPE scaled.

    PEFT merges each layer in fp32; one output file is in memory at a time, never the model.

    Args:
        repo_or_dir: Hub id or local folder of the adapter.
        output_dir: where the model goes; made in a folder beside it, then renamed. An earlier merge is replaced.
        base_model: Hub id or folder to take the base from, instead of the one that the adapter names.
        dtype: bfloat16, float16 or float32 for all weights. None keeps what the base's files have, float32 included.
        max_shard_size: of one output file, in bytes or as "1GB" (10**9). Peak memory grows with it.
        revision, hub_kwargs: of the adapter's repository; token, cache_dir, trust_remote_code.

    Returns:
        output_dir, parameters, bytes (of weights), shards, merged_layers and replaced_tensors (together all that the
        adapter holds), dtype (of the largest tensor), seconds, peak_memory_gib (see `_peak_memory`).

    Raises:
        AdapterError: as `open_adapter`, or if the base's weights are not those trained on.
        MergeError: naming what cannot be merged, read or written.
    """
    start = time.perf_counter()
    if isinstance(max_shard_size, str) and not re.fullmatch(r"[\d.]+ *[KMGT]i?B", max_shard_size, re.IGNORECASE):
        raise MergeError(f"max_shard_size {max_shard_size!r} is no size: write 500MB or 2GB")
    if dtype not in (None, *DTYPES):
        raise MergeError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}, or leave it out to keep the base's")
    adapter = open_adapter(repo_or_dir, base_model=base_model, revision=revision, **hub_kwargs)
    if getattr(adapter.base_config, "quantization_config", None):
        raise MergeError(f"{adapter.base_name} is quantized: pass the 16-bit model it was made from as base_model")
    output, base_folder = Path(output_dir).absolute(), _base_folder(adapter)
    _refuse_output(output, base_folder)
    base = _base_weights(base_folder, adapter.base_name)
    wrapped = _wrap(adapter, base)
    changes, architecture = _changes(wrapped, base), type(wrapped.get_base_model()).__name__
    del wrapped
    if dtype:
        floating = {name: like for name, like in base.like.items() if like.is_floating_point()}
        base.like |= {name: like.to(getattr(torch, dtype)) for name, like in floating.items()}
    scratch = output.with_name(f".{output.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        summary = _write_weights(scratch, base, changes, max_shard_size)
        _describe(scratch, adapter, base_folder, architecture, summary["dtype"])
        shutil.rmtree(output, ignore_errors=True)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"output_dir": str(output_dir), **summary, "seconds": seconds, "peak_memory_gib": _peak_memory()}
