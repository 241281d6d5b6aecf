"""What is special about a model family: where its decoder's config is, and which RoPE its far-seeing layers have.

A longer window concerns the layers of full attention. A sliding layer never looks further back than its window, and
keeps its RoPE wherever the family gives each kind of layer its own; a linear-attention layer has no positions. Families
not named here are scaled if they have one RoPE over whole heads and no sliding layers. See recipes/families.md.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What is unlike Llama in a decoder of transformers."""

    whole: str = ""
    """model_type of the image and text model around it: the decoder alone is loaded."""
    is_renamed: bool = False
    """That model's files name the decoder's tensors as transformers' decoder does not know them."""
    is_partial: bool = False
    """The first part of each head rotates (partial_rotary_factor)."""
    is_per_layer_type: bool = False
    """rope_parameters hold a RoPE for each kind of layer."""
    slides: bool = False
    """Some layers slide and the others see everything."""
    has_sinks: bool = False
    """Attention has sinks, which sdpa and flash attention 2 have not."""
    has_one_theta: bool = False
    """transformers 4 and vLLM read one theta for all kinds of layers."""
    has_whole_window: bool = False
    """max_position_embeddings is the whole window, and not what linear's factor multiplies."""
    in_transformers_4: bool = True
    """transformers 4.57 has it."""


FAMILIES = {
    "gemma3_text": Family(whole="gemma3", is_renamed=True, is_per_layer_type=True, slides=True, has_whole_window=True),
    "gemma4_text": Family(
        whole="gemma4", is_renamed=True, is_partial=True, is_per_layer_type=True, slides=True, in_transformers_4=False
    ),
    "glm4": Family(is_partial=True),
    "gpt_oss": Family(slides=True, has_sinks=True),
    "olmo3": Family(is_per_layer_type=True, slides=True, has_one_theta=True),
    "qwen3_5_text": Family(whole="qwen3_5", is_partial=True, in_transformers_4=False),
    "qwen3_5_moe_text": Family(whole="qwen3_5_moe", is_partial=True, in_transformers_4=False),
    "qwen3_next": Family(is_partial=True),
}
"""model_type -> family, of those that need more than one RoPE over whole heads in layers that all see everything."""

NESTED = tuple(family.whole for family in FAMILIES.values() if family.whole)

NO_ROPE_AFAR = ("cohere2", "cohere2_moe", "exaone4", "llama4_text")
"""The layers that see everything have no positions."""

RENAMED = {r"^(language_model\.model|model\.language_model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""How the files of NESTED models begin a tensor's name, and how the decoder alone does."""

REMEDY = "take a decoder of a family in recipes/families.md"


class RopeError(ValueError):
    """A base, a length or a model that the RoPE scaling asked for does not fit."""


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text decoder: `config` itself, or the one in its text_config.

    Raises:
        RopeError: if that decoder cannot be loaded alone.
    """
    text = getattr(config, "text_config", None)
    if text is None:
        return config
    if config.model_type not in NESTED:
        raise RopeError(
            f"model_type {config.model_type!r} nests its decoder in text_config, and is not one of those that are "
            f"loaded without the rest ({', '.join(NESTED)}): {REMEDY}"
        )
    return text


def decoder_name(stored: str) -> str:
    """The decoder's name for a tensor that the files of a model call `stored`."""
    for pattern, own in RENAMED.items():
        stored = re.sub(pattern, own, stored)
    return stored


def family_of(model_type: str) -> Family:
    """The family's entry, empty for a decoder like Llama."""
    return FAMILIES.get(model_type, Family())


def key_mapping(config: PreTrainedConfig) -> dict[str, dict[str, str]]:
    """from_pretrained's key_mapping, where the decoder needs it: without it a Gemma decoder is loaded with random
    weights, and a warning."""
    return {"key_mapping": dict(RENAMED)} if family_of(config.model_type).is_renamed else {}


def far_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope_parameters of the layers that see everything."""
    found = config.rope_parameters
    return found[FULL] if isinstance(found.get(FULL), dict) else found


def with_far_parameters(config: PreTrainedConfig, far: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters of `config` with those of the layers that see everything replaced."""
    is_nested = isinstance(config.rope_parameters.get(FULL), dict)
    return dict(config.rope_parameters) | {FULL: far} if is_nested else far


def far_layer(config: PreTrainedConfig) -> Any:
    """The config as the layers that see everything have it; Gemma 4's have larger heads than the others."""
    return cast(Any, config.per_layer_config)[FULL] if getattr(config, "is_heterogeneous", False) else config


def head_size(config: PreTrainedConfig) -> int:
    """Features of a head in the layers that see everything."""
    config = far_layer(config)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def slowest_exponent(config: PreTrainedConfig, far: dict[str, Any]) -> float:
    """e, where theta^-e is the frequency of the slowest pair that rotates: (d - 2) / d for d rotating features, and for
    proportional RoPE, whose frequencies are those of the whole head, (d - 2) / head size."""
    size = head_size(config)
    rotating = int(size * far.get("partial_rotary_factor", 1.0))
    return (rotating - 2) / (size if far.get("rope_type") == "proportional" else rotating)


def refuse_unknown(config: PreTrainedConfig, target_length: int) -> None:
    """Raise a RopeError for a base whose far-seeing layers would not be scaled as rope.py says, or for one of which no
    layer sees `target_length` tokens.

    transformers masks by the token's index, not by its position, so training at context_length <= sliding_window
    never meets the mask, and the model still cannot look back further once the input is long. Qwen's configs hold
    None unless use_sliding_window is set, and only the layers called sliding_attention then slide.
    """
    kind, parameters = config.model_type, getattr(config, "rope_parameters", None)
    family = family_of(kind)
    layers = getattr(config, "layer_types", None) or [SLIDING]
    if not parameters:
        raise RopeError(f"model_type {kind!r} has no rope_parameters: {REMEDY}")
    if kind in NO_ROPE_AFAR:
        raise RopeError(
            f"model_type {kind!r} has no positions in the layers that see the whole context, so there is nothing to "
            f"scale and nothing that drawn positions could teach: {REMEDY}"
        )
    per_layer = sorted(key for key, value in parameters.items() if isinstance(value, dict))
    if per_layer and (not family.is_per_layer_type or FULL not in per_layer or FULL not in layers):
        raise RopeError(f"model_type {kind!r} has rope_parameters per layer type ({', '.join(per_layer)}): {REMEDY}")
    share = far_parameters(config).get("partial_rotary_factor", 1.0)
    if share != 1.0 and not family.is_partial:
        raise RopeError(f"model_type {kind!r} rotates a part of each head (partial_rotary_factor {share}): {REMEDY}")
    window = getattr(config, "sliding_window", None)
    sees_all = family.slides and FULL in layers
    if window is not None and SLIDING in layers and window < target_length and not sees_all:
        raise RopeError(
            f"sliding_window is {window}, below target_length {target_length}: the model would not look back further; "
            "use a base without it (mistralai/Mistral-7B-v0.3), or a config of sliding_window None"
        )


def keys_of_transformers_4(config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE and number of experts of a scaled `config` under the names that transformers 4 reads; families that it has
    not are left out."""
    family = family_of(config.model_type)
    if not family.in_transformers_4:
        return {}
    far = far_parameters(config)
    scaling = {key: value for key, value in far.items() if key != "rope_theta"}
    keys = {"rope_theta": far["rope_theta"], "rope_scaling": None if far["rope_type"] == "default" else scaling}
    if family.is_per_layer_type and not family.has_one_theta:
        keys["rope_local_base_freq"] = config.rope_parameters[SLIDING]["rope_theta"]
    if "partial_rotary_factor" in far:
        keys["partial_rotary_factor"] = far["partial_rotary_factor"]
    if getattr(config, "num_experts", None):
        # transformers 5 calls it num_local_experts, also where 4 does not.
        keys["num_experts"] = config.num_experts
    return keys
