"""The 4-bit base with its RoPE scaled, its tokenizer, LoRA on it, and a trained adapter loaded back."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import rope
from .errors import about
from .tiny import TINY_ID, base_folder

logger = logging.getLogger(__name__)

REQUIRED_FILES = ["adapter_config.json", "adapter_model.safetensors", "base_config/config.json", "cream.json"]
ADAPTER_FILES = [*REQUIRED_FILES, "*token*", "*.jinja"]
SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class AdapterError(ValueError):
    """An adapter folder that is incomplete, or a base that is not the one it was trained on."""


def resolve_base(name: str) -> str:
    """Where to load `name` from: the embedded model has a name of its own, the rest stand for themselves."""
    return str(base_folder()) if name == TINY_ID else name


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    # torch counts slow emulation in unless told otherwise.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def default_attention(dtype: torch.dtype) -> str:
    """flash_attention_2 where it is installed and can run, else sdpa."""
    can_run = torch.cuda.is_available() and dtype != torch.float32
    return "flash_attention_2" if can_run and importlib.util.find_spec("flash_attn") else "sdpa"


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


def keep_4bit_trainable_on_cpu(model: nn.Module) -> None:
    """Switch off the packed AVX512-BF16 product of bitsandbytes: after one evaluation it has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_base(
    name: str,
    *,
    target_length: int | None = None,
    rope_scaling_type: str | None = None,
    load_in_4bit: bool = True,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base model, scaled to `target_length` tokens and quantized, ready for an adapter.

    Embeddings, norms and head are loaded in `dtype` and stay there: no fp32 copies are made. `config` is the unscaled
    config to use instead of the one found beside the weights; other keyword arguments go to from_pretrained.

    Raises:
        RopeError: a base without RoPE, or a scaling that does not fit it.
        OSError: a base that cannot be found or reached.
    """
    source = resolve_base(name)
    hub_kwargs = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code", "cache_dir") if key in kwargs}
    with about(name):
        unscaled = config if config is not None else AutoConfig.from_pretrained(source, **hub_kwargs)
    scaled = rope.scaled_config(unscaled, target_length or rope.pretrained_window(unscaled), rope_scaling_type)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype or default_dtype()
    if load_in_4bit:
        kwargs.setdefault("quantization_config", quantization_config(dtype))
    if torch.cuda.is_available():
        kwargs.setdefault("device_map", {"": torch.cuda.current_device()})
    with about(name):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=scaled,
            dtype=dtype,
            attn_implementation=attn_implementation or default_attention(dtype),
            **kwargs,
        )
    # transformers keeps the path it loaded from; the embedded model goes by its name.
    model.config._name_or_path = name
    model.unscaled_config = unscaled
    keep_4bit_trainable_on_cpu(model)
    rope.check_scaling(model, scaled)
    return model


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The base's tokenizer. A missing pad token becomes the end token: masks are made from lengths, never from ids,
    and the embeddings are never resized (PEFT would then save whole embedding matrices)."""
    with about(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(name), **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def lora_config(arguments: Any) -> LoraConfig:
    """LoRA from a recipe's model arguments (TRL's ModelConfig names)."""
    # TRL unwraps a list of one, and PEFT would take the name for a pattern of whole paths.
    modules = arguments.lora_target_modules
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=[modules] if isinstance(modules, str) and modules.isidentifier() else modules,
        target_parameters=arguments.lora_target_parameters,
        modules_to_save=arguments.lora_modules_to_save,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        task_type="CAUSAL_LM",
    )


def adapter_folder(repo_or_dir: str | Path, **hub_kwargs: Any) -> Path:
    """The local folder of an adapter: itself, or the snapshot of a Hub repository."""
    if Path(repo_or_dir).is_dir():
        return Path(repo_or_dir)
    return Path(snapshot_download(str(repo_or_dir), allow_patterns=ADAPTER_FILES, **hub_kwargs))


def is_adapter(repo_or_dir: str | Path) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(repo_or_dir) / "adapter_config.json").is_file()


def _refuse_other_base(found: PreTrainedConfig, trained: PreTrainedConfig, scaling: dict[str, Any], name: str) -> None:
    scaled = rope.scaled_config(found, scaling["target_length"], scaling["rope_scaling_type"])
    pairs = [(field, getattr(scaled, field, None), getattr(trained, field, None)) for field in SHAPE_FIELDS]
    pairs.append(("rope_parameters", scaled.rope_parameters, trained.rope_parameters))
    for field, got, wanted in pairs:
        if got != wanted:
            raise AdapterError(
                f"{name} is not the base this adapter was trained on: its {field} is {got}, trained with {wanted}. "
                "Pass base_model with the right Hub id or folder"
            )


def read_description(folder: Path, name: str) -> dict[str, Any]:
    """What cream.json says of the adapter in `folder`, once all of its files are there. `name` is for the error."""
    for required in REQUIRED_FILES:
        if not (folder / required).is_file():
            raise AdapterError(
                f"{name} has no {required}: it is not a complete adapter of cream-peft. A plain PEFT adapter "
                "does not say how its base was scaled; train it again with `cream-peft train`"
            )
    try:
        return json.loads((folder / "cream.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"cream.json of {name} is damaged ({error}): train the adapter again") from error


def load_adapter(
    repo_or_dir: str | Path, *, base_model: str | None = None, load_in_4bit: bool = True, **model_kwargs: Any
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter on its base with the RoPE it was trained with.

    Args:
        repo_or_dir: Hub id or local folder of the adapter.
        base_model: Hub id or folder to take the base from, instead of the one the adapter names.
        load_in_4bit: NF4 base, or one in `dtype`.
        model_kwargs: for `load_base` (dtype, attn_implementation, token, device_map, ...).

    Raises:
        AdapterError: when files are missing, or when the base differs in a field that matters; the field is named.
    """
    hub_kwargs = {key: model_kwargs[key] for key in ("token", "cache_dir") if key in model_kwargs}
    folder = adapter_folder(repo_or_dir, **hub_kwargs)
    if "trust_remote_code" in model_kwargs:
        hub_kwargs["trust_remote_code"] = model_kwargs["trust_remote_code"]
    description = read_description(folder, str(repo_or_dir))
    name = (
        base_model
        or json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    )
    if base_model is None and description.get("base_is_local"):
        raise AdapterError(
            f"{repo_or_dir} was trained on a local base, the folder {name!r}: say where it lies with base_model "
            "(evaluate: --base_model), or train with base_model_id, its Hub id"
        )
    trained = rope.load_base_config(folder)
    with about(name):
        unscaled = AutoConfig.from_pretrained(resolve_base(name), **hub_kwargs)
    _refuse_other_base(unscaled, trained, description, name)
    model = load_base(
        name,
        target_length=description["target_length"],
        rope_scaling_type=description["rope_scaling_type"],
        load_in_4bit=load_in_4bit,
        config=copy.deepcopy(unscaled),
        **model_kwargs,
    )
    adapted = PeftModel.from_pretrained(model, str(folder))
    return adapted.eval(), load_tokenizer(str(folder))
