"""What a base consists of, from its config alone: the linears of its layers, and the rest.

Dense decoders with equal layers are counted by formula. The families of BUILT, with experts, other layers between, or
fused linears, are built without data, and counted.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..families import FAMILIES, far_layer, head_size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BUILT = (*FAMILIES, "qwen2_moe", "qwen3_moe", "mixtral")
"""Experts are one tensor a layer in transformers 5, no linears: bitsandbytes leaves them in 16 bits."""

Linears = dict[str, tuple[int, int]]
"""(in features, out features) by name."""


@lru_cache(maxsize=8)
def _built(config: str) -> tuple[tuple[Linears, ...], int]:
    """Linears of each layer, by their names in it, and all parameters."""
    fields = json.loads(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    layers = tuple(
        {name: (one.in_features, one.out_features) for name, one in layer.named_modules() if isinstance(one, nn.Linear)}
        for layer in model.get_decoder().layers
    )
    return layers, sum(parameter.numel() for parameter in model.parameters())


def _count(config: PreTrainedConfig) -> tuple[tuple[Linears, ...], int]:
    fields = config.to_dict()
    # How the base was before it was scaled has no say in it.
    fields.pop("cream_unscaled", None)
    return _built(json.dumps(fields, default=str))


def attention_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Features of the queries, with the gate or what a linear-attention layer makes in their place, and of the keys."""
    size = head_size(config)
    queries = config.num_attention_heads * size
    if config.model_type in BUILT:
        made = ("q_proj", "in_proj")
        queries = max(
            sum(outputs for name, (_, outputs) in layer.items() if name.split(".")[-1].startswith(made))
            for layer in _count(config)[0]
        )
    return queries, far_layer(config).num_key_value_heads * size


def inner_width(config: PreTrainedConfig) -> int:
    """Features of the feed-forward that a token passes through: of all its experts, in a mixture."""
    used = getattr(config, "num_experts_per_tok", None)
    if used is None:
        return config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return used * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size) + shared


def linears_of_a_layer(config: PreTrainedConfig) -> Linears:
    """The linears of a decoder layer, the same in every layer; in BUILT, all that any layer has."""
    if getattr(config, "enable_moe_block", False):
        raise ValueError("memory of a Gemma 4 with experts cannot be estimated: take one without")
    if config.model_type in BUILT:
        return {name.split(".")[-1]: sizes for layer in _count(config)[0] for name, sizes in layer.items()}
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    problems = [f"no {name}" for name in needed if getattr(config, name, None) is None]
    problems += [name for name in ("num_local_experts", "num_experts") if hasattr(config, name)]
    if problems:
        reason = f"memory of model_type {config.model_type!r} cannot be estimated, its config has {problems[0]}"
        raise ValueError(f"{reason}: use a dense decoder (llama, mistral, qwen2, qwen3) or one of {', '.join(BUILT)}")
    hidden, inner, (queries, keys) = config.hidden_size, config.intermediate_size, attention_widths(config)
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    feed_forward = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return attention | {"o_proj": (queries, hidden)} | feed_forward


def linear_sizes(config: PreTrainedConfig) -> list[int]:
    """Parameters of each linear of the decoder layers, which are quantized."""
    equal = [linears_of_a_layer(config)] * config.num_hidden_layers
    layers = _count(config)[0] if config.model_type in BUILT else equal
    return [inputs * outputs for layer in layers for inputs, outputs in layer.values()]


def linear_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the decoder layers' linears."""
    return sum(linear_sizes(config))


def used_parameters(config: PreTrainedConfig) -> int:
    """Of the decoder layers' linears and experts, those that a token passes through."""
    used = getattr(config, "num_experts_per_tok", None) or 0
    each = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return linear_parameters(config) + config.num_hidden_layers * 3 * config.hidden_size * used * each


def embedding_parameters(config: PreTrainedConfig) -> int:
    """Parameters of embeddings and head."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def other_parameters(config: PreTrainedConfig) -> int:
    """Biases, norms and experts, which are not quantized."""
    if config.model_type in BUILT:
        return _count(config)[1] - linear_parameters(config) - embedding_parameters(config)
    biased = ("q_proj", "k_proj", "v_proj") if config.model_type == "qwen2" else ()
    biased += ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()
    biased += ("gate_proj", "up_proj", "down_proj") if getattr(config, "mlp_bias", False) else ()
    biases = sum(linears_of_a_layer(config)[name][1] for name in biased)
    head_norms = 2 * attention_widths(config)[0] // config.num_attention_heads if config.model_type == "qwen3" else 0
    return config.num_hidden_layers * (biases + 2 * config.hidden_size + head_norms) + config.hidden_size


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the base, embeddings and head included."""
    return linear_parameters(config) + other_parameters(config) + embedding_parameters(config)


def target_linears(config: PreTrainedConfig, target_modules: str | Sequence[str]) -> Linears:
    """The linears of a layer that get an adapter."""
    linears = linears_of_a_layer(config)
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    unknown = [name for name in names if name not in linears and name != "all-linear"]
    if unknown:
        raise ValueError(f"unknown target module {unknown[0]!r}: use all-linear, or some of {', '.join(linears)}")
    return linears if "all-linear" in names else {name: linears[name] for name in names}


def target_widths(config: PreTrainedConfig, target_modules: str | Sequence[str]) -> int:
    """In and out features, summed over all linears of all layers that get an adapter."""
    targets = target_linears(config, target_modules)
    if config.model_type not in BUILT:
        return config.num_hidden_layers * sum(map(sum, targets.values()))
    layers = _count(config)[0]
    return sum(sum(sizes) for layer in layers for name, sizes in layer.items() if name.split(".")[-1] in targets)


def cached_tokens(config: PreTrainedConfig, length: int, chunk: int) -> int:
    """Tokens whose keys and values are kept, summed over the layers: a sliding layer keeps its window, and a chunk
    while that is read; a linear-attention layer keeps a state, which is not counted."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    kept = {"linear_attention": 0, "sliding_attention": min(length, window + chunk)}
    return sum(kept.get(kind, length) for kind in kinds)
