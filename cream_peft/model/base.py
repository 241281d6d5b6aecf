"""The 4-bit base with its RoPE scaled."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from .. import rope
from ..errors import about
from ..families import decoder_config, family_of, head_size, key_mapping
from ..terminal import did_you_mean
from ..tiny import TINY_ID, base_folder
from .attention import FLASH_CAPABILITY, FLASH_HEAD_SIZE, use_repeating_sdpa

GIB = 2**30
EMBEDDED_CONFIGS = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
"""Hub id -> config of the recipes' bases, so that planning needs no network."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def resolve_base(name: str) -> str:
    """Where to load `name` from: the embedded model has a name of its own, the rest stand for themselves."""
    return str(base_folder()) if name == TINY_ID else name


def local_snapshot(name: str, revision: str | None = None, cache_dir: Any = None) -> Path | None:
    """The folder of a base on this disk: its own, or the snapshot in the Hub's cache; None if there is none yet."""
    source = Path(resolve_base(name))
    if source.is_dir():
        return source
    found = try_to_load_from_cache(name, "config.json", revision=revision, cache_dir=cache_dir)
    return Path(found).parent if isinstance(found, str) else None


def base_commit(name: str, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """The commit of a base in the Hub's cache; None of a folder, and of what is not there yet."""
    found = local_snapshot(name, revision, cache_dir)
    return found.name if found and not Path(resolve_base(name)).is_dir() else None


def refuse_quantized(config: PreTrainedConfig, name: str) -> None:
    """Raise a ValueError for a base whose files are quantized (bnb-4bit, GPTQ, AWQ, FP8, ...)."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = (settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method", "unknown method")
        raise ValueError(
            f"{name} is quantized already ({method}): use the 16-bit model "
            "that it was made from, which is put into 4 bits here (model_name_or_path in training, else base_model)"
        )


def read_config(name: str, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedConfig:
    """The config of a base's text decoder, out of `config` or else of what lies at a Hub id or folder; a ValueError if
    it is quantized or not loaded alone."""
    found = config or AutoConfig.from_pretrained(resolve_base(name), **kwargs)
    refuse_quantized(found, name)
    return rope.whole_window(decoder_config(found))


WHOLE_DTYPE = torch.float32
"""Of weights that are all trained: in bf16 most updates are rounded away."""
CPU = {"": "cpu"}
"""Where a model is loaded that is to stay off a GPU."""


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    # torch counts slow emulation in unless told otherwise.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def expand_cuda_segments() -> None:
    """Let torch's CUDA allocator grow its segments, which leaves less unused, unless the user has set the allocator up.
    Not through the environment: importing bitsandbytes wakes CUDA, and by then that has been read."""
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return
    # torch 2.13 deprecates the second name, which alone torch 2.6 has.
    names = ((torch._C, "_accelerator_setAllocatorSettings"), (torch.cuda.memory, "_set_allocator_settings"))
    change = next(getattr(module, name) for module, name in names if hasattr(module, name))
    change("expandable_segments:True")


def default_attention(dtype: torch.dtype, config: PreTrainedConfig, on_gpu: bool) -> str:
    """flash_attention_2 where it is installed and can run, else sdpa. gpt-oss, whose attention has sinks, has neither:
    flex_attention on a GPU, which holds no matrix of scores, else eager."""
    if family_of(config.model_type).has_sinks:
        return "flex_attention" if on_gpu else "eager"
    can_run = on_gpu and is_flash_attn_2_available() and dtype != torch.float32
    can_run = can_run and head_size(config) <= FLASH_HEAD_SIZE
    can_run = can_run and torch.cuda.get_device_capability() >= FLASH_CAPABILITY
    return "flash_attention_2" if can_run else "sdpa"


def quantization_config(
    dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True, storage: torch.dtype | None = None
) -> BitsAndBytesConfig:
    """4-bit NF4 with double quantization (QLoRA, arXiv 2305.14314), computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def quantization_of(model: PreTrainedModel) -> dict[str, Any]:
    """How a base in 4 bits was quantized, in the keys of a recipe; empty of another."""
    found: Any = getattr(model.config, "quantization_config", None)
    if not getattr(model, "is_loaded_in_4bit", False) or not isinstance(found, BitsAndBytesConfig):
        return {}
    kind, is_double = found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant
    return {"bnb_4bit_quant_type": kind, "use_bnb_nested_quant": is_double}


def base_options(arguments: Any, use_cpu: bool = False) -> dict[str, Any]:
    """`load_base`'s options of a recipe's model arguments (TRL's ModelConfig names)."""
    usual = default_dtype() if arguments.use_peft and not use_cpu else WHOLE_DTYPE
    dtype = getattr(torch, arguments.dtype) if arguments.dtype not in (None, "auto") else usual
    options = {"dtype": dtype, "load_in_4bit": arguments.load_in_4bit}
    options["attn_implementation"] = arguments.attn_implementation
    if use_cpu:
        options["device_map"] = CPU
    if arguments.load_in_4bit:
        storage = getattr(torch, arguments.bnb_4bit_quant_storage or "", None)
        kind, double = arguments.bnb_4bit_quant_type, arguments.use_bnb_nested_quant
        options["quantization_config"] = quantization_config(dtype, kind, double, storage)
    return options


def keep_4bit_trainable_on_cpu(model: nn.Module) -> None:
    """Switch off the packed AVX512-BF16 product of bitsandbytes: after one evaluation it has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # ty: ignore[invalid-assignment] - no tensor, no module


def keep_adapter_in_fp32(model: nn.Module, given: dict[str, torch.Tensor]) -> None:
    """Undo TRL's cast of QLoRA adapters to bf16, where most updates at usual learning rates are rounded away. `given`
    holds an adapter's values from before the cast, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = given.get(name, parameter.data).to(parameter.device, torch.float32)


def check_module_names(model: PeftModel) -> None:
    """Refuse an adapter one of whose modules the base has not; PEFT passes over it if it finds another of them.

    Raises:
        ValueError: naming the module and what it may have been meant for.
    """
    config = model.active_peft_config
    paths = [name for name, _ in model.named_modules()]
    # PEFT's own rules: a module's whole name, or the end of it.
    for field, dot in (("target_modules", "."), ("modules_to_save", "")):
        names = getattr(config, field, None) or ()
        # A text is a pattern, which PEFT refuses if nothing matches it.
        for name in () if isinstance(names, str) else sorted(names):
            if not any((dot + path).endswith(dot + name) for path in paths):
                known = {part for path in paths for part in path.split(".")}
                hint = did_you_mean(name.rpartition(".")[2], known)
                raise ValueError(f"lora_{field}: the base has no module {name!r}{hint}")


def load_base(
    name: str,
    *,
    target_length: int | None = None,
    rope_scaling_type: str | None = None,
    load_in_4bit: bool = True,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
    quantization: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base model, scaled to `target_length` tokens and quantized, ready for an adapter.

    Embeddings, norms and head are loaded in `dtype` and stay there: no fp32 copies are made. `config` is the unscaled
    config to use instead of the one found beside the weights; of a base that nests its decoder in text_config, that
    decoder alone is loaded. `quantization`: see `quantization_of`. With a `state_dict` too nothing is read from `name`.
    Other keyword arguments go to from_pretrained, which quantizes one weight at a time. The model's config._commit_hash
    is the commit of a base from the Hub.

    Raises:
        RopeError: a base without RoPE, or a scaling that does not fit it.
        ValueError: a base that is quantized already.
        OSError: a base that cannot be found or reached.
    """
    source = resolve_base(name)
    kwargs.setdefault("trust_remote_code", False)
    hub_kwargs = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code", "cache_dir") if key in kwargs}
    with about(name):
        unscaled = read_config(name, config, **hub_kwargs)
    commit = base_commit(name, kwargs.get("revision"), kwargs.get("cache_dir"))
    if commit:
        # Its branch may move on before the weights are read.
        kwargs["revision"] = commit
    scaled = rope.scaled_config(unscaled, target_length or rope.pretrained_window(unscaled), rope_scaling_type)
    on_gpu = torch.cuda.is_available() and kwargs.get("device_map") != CPU
    dtype = cast(torch.dtype, getattr(torch, str(dtype), dtype) or (default_dtype() if on_gpu else torch.float32))
    if load_in_4bit:
        known: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True} | (quantization or {})
        kind, is_double = known["bnb_4bit_quant_type"], known["use_bnb_nested_quant"]
        kwargs.setdefault("quantization_config", quantization_config(dtype, kind, is_double))
    # ZeRO-3 places the shards itself.
    if on_gpu and not is_deepspeed_zero3_enabled():
        kwargs.setdefault("device_map", {"": torch.cuda.current_device()})
    # The auto class takes no weights without a name.
    is_given = "state_dict" in kwargs
    kwargs = key_mapping(scaled) | kwargs
    loader = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(scaled)] if is_given else AutoModelForCausalLM)
    with about(name):
        model = loader.from_pretrained(
            None if is_given else source,
            config=scaled,
            dtype=dtype,
            attn_implementation=attn_implementation or default_attention(dtype, scaled, on_gpu),
            **kwargs,
        )
    # transformers keeps the path it loaded from; the embedded model goes by its name.
    model.config._name_or_path = name
    # transformers 5 does not say it.
    model.config._commit_hash = commit
    model.unscaled_config = unscaled
    keep_4bit_trainable_on_cpu(model)
    use_repeating_sdpa()
    rope.check_scaling(model, scaled)
    return model


def embedded_config(model_id: str) -> PreTrainedConfig | None:
    """The config of one of the recipes' bases; None for any other."""
    fields = EMBEDDED_CONFIGS.get(model_id)
    return AutoConfig.for_model(**copy.deepcopy(fields)) if fields else None
