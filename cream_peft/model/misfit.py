"""Whether the files of an adapter, which may come from anywhere, fit one another and their base."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .. import rope
from .base import check_module_names
from .fields import known_fields, shown
from .record import REQUIRED_FILES, AdapterError, read_json
from .tokenizer import ends_in_time

if TYPE_CHECKING:
    from .adapter import Adapter

CONFIG, WEIGHTS, BASE_CONFIG = REQUIRED_FILES[:3]
SHAPE_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE_FIELDS += ("num_attention_heads", "num_key_value_heads", "head_dim")
KEEPS_BASE = (True, False, "gaussian", "orthogonal")
"""LoRA's init_lora_weights that leave the base's weights as they are."""
RIGHT_BASE = "Give the right one, a Hub id or a folder, as base_model (in a recipe: model_name_or_path)"
REPEATS = ("pissa", "olora")
"""Those that change them, to the same again when the adapter is loaded."""


def read_scaled_config(folder: Path, name: str, base: PreTrainedConfig | None, base_name: str) -> PreTrainedConfig:
    """base_config/, once the shape that it states is the base's: of another one nothing is built. None: a base that
    cannot be read."""
    content = read_json(folder, BASE_CONFIG, name)
    own = base.to_dict() if base else content
    for field in SHAPE_FIELDS:
        found, wanted = own.get(field), content.get(field)
        if wanted is not None and type(found) is not type(wanted):
            kind = type(found).__name__
            raise AdapterError(f"{BASE_CONFIG} of {name}: {field} is {shown(wanted)}, and must be {kind}: get it again")
        if wanted is not None and found != wanted:
            raise AdapterError(
                f"{base_name} is not the base this adapter was trained on: its {field} is {found!r}, trained with "
                f"{shown(wanted)} ({BASE_CONFIG}). {RIGHT_BASE}"
            )
    try:
        return rope.load_base_config(folder)
    except Exception as error:  # every type of config checks itself in its own way
        said = " ".join(str(error).split())
        raise AdapterError(f"{BASE_CONFIG} of {name} is no config ({said:.200}): get the adapter again") from None


def read_peft_config(folder: Path, name: str) -> PeftConfig:
    content = read_json(folder, CONFIG, name)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(str(content.get("peft_type")))
    if kind is None:
        raise AdapterError(
            f"{CONFIG} of {name}: peft_type is {content.get('peft_type')!r:.40}, which PEFT does not know"
        )
    if content.get("megatron_config"):
        raise AdapterError(f"{CONFIG} of {name}: megatron_config names code to import, which is not done: remove it")
    try:
        # Its hint leaves out the numbers that PEFT allows.
        if re.fullmatch(r"pissa_niter_\d+", str(content.get("init_lora_weights"))):
            content.pop("init_lora_weights")
        known_fields(kind, content, null_is_default=False)
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # each kind of config checks itself
        raise AdapterError(f"{CONFIG} of {name}: {' '.join(str(error).split()):.300}: get the adapter again") from None


def _shapes(peft_config: PeftConfig, scaled_config: PreTrainedConfig, trusted: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter of this config on a base of that one, without data."""
    peft_config = copy.deepcopy(peft_config)
    if isinstance(peft_config, LoraConfig):
        peft_config.init_lora_weights = False
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(scaled_config), trust_remote_code=trusted)
        model = get_peft_model(base, peft_config)
        check_module_names(model)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _may_not_end(peft_config: PeftConfig) -> bool:
    """Whether it has a regular expression that repeats anything, or any number of layers. Trying it in a child process
    takes as long as the rest again, and where the machine is busy honest names would run out of time."""
    fields = peft_config.to_dict()
    values = [value for name, value in fields.items() if value and re.search("modules|pattern|parameters", name)]
    words = [str(word) for value in values for word in ([value] if isinstance(value, str) else value)]
    return bool(fields.get("layer_replication")) or any(re.search(r"[*+{]", word) for word in words)


def refuse_misfit(adapter: Adapter, name: str) -> None:
    """Refuse tensors that have no place on the base, which PEFT would leave out without a word, and missing ones."""

    def expected() -> dict[str, tuple[int, ...]]:
        return _shapes(adapter.peft_config, adapter.scaled_config, adapter.base_options["trust_remote_code"])

    if _may_not_end(adapter.peft_config) and not ends_in_time(expected):
        raise AdapterError(f"{CONFIG} of {name} takes too long to be applied to {adapter.base_name}: do not use it")
    try:
        wanted = expected()
    except Exception as error:
        said = " ".join(str(error).split())
        raise AdapterError(f"{CONFIG} of {name} does not fit {adapter.base_name}: {said:.300}") from None
    with safe_open(adapter.folder / WEIGHTS, "pt") as file:
        names = file.keys()
        found = {key: tuple(file.get_slice(key).get_shape()) for key in names}
    for key in sorted(wanted.keys() | found.keys()):
        # PEFT saves adapted embeddings themselves too, beside their LoRA.
        if wanted.get(key) == found.get(key) or (key not in wanted and key.endswith(".base_layer.weight")):
            continue
        trouble = f"has no place in {adapter.base_name}" if key in found else "is missing"
        if key in found and key in wanted:
            trouble = f"has another shape in {adapter.base_name}, {wanted[key]} and not {found[key]}"
        raise AdapterError(f"{key} of {WEIGHTS} in {name} {trouble}: it does not fit {CONFIG}; get the adapter again")


def refuse_unrepeatable(peft_config: PeftConfig | None) -> None:
    """Refuse a LoRA whose init_lora_weights change the base otherwise at each load: a random or a data-driven one.

    Raises:
        ValueError: naming those that can be had.
    """
    init = getattr(peft_config, "init_lora_weights", True)
    if init not in (*KEEPS_BASE, *REPEATS):
        allowed = ", ".join(map(str, (*KEEPS_BASE, *REPEATS)))
        raise ValueError(
            f"init_lora_weights={init}: the loaded adapter would not be the trained one: use one of {allowed}"
        )
