"""What a base consists of, from its config alone: it is built without data, and counted."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..families import FAMILIES, far_layer, head_size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXTURES = (*FAMILIES, "qwen2_moe", "qwen3_moe", "mixtral")
"""Whose experts are planned. They are one tensor a layer in transformers 5, no linears: bitsandbytes leaves them in 16
bits."""

Linears = dict[str, tuple[int, int]]
"""(in features, out features) by name."""


class Rows(NamedTuple):
    """Tensors with a row for each token and each of its experts. Measured of transformers' grouped_mm experts
    (tests/test_mixtures.py)."""

    kept: int = 3
    """Of an expert's width, kept for the backward pass; beside one of the hidden size."""
    backward: int = 4
    """Of an expert's width, in the backward pass at a time, or"""
    backward_hidden: int = 3
    """of the hidden size."""
    forward: int = 4
    """Of an expert's width, at a time without gradients, beside one of the hidden size; or"""
    forward_hidden: int = 4
    """of the hidden size."""


ROWS = {
    # Clamps, and a gate with a slope of its own.
    "gpt_oss": Rows(kept=6, backward=6, forward=9, forward_hidden=5),
    # Experts are weighed in fp32.
    "mixtral": Rows(backward_hidden=7, forward_hidden=6),
}
"""By model_type; the others have the default."""


class Built(NamedTuple):
    """Linears of each layer, by their names in it, sizes of those outside the layers but for the head, and parameters
    of the experts and of all."""

    layers: tuple[Linears, ...]
    outside: tuple[int, ...]
    experts: int
    parameters: int


@lru_cache(maxsize=8)
def _built(config: str) -> Built:
    fields = json.loads(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))

    def linears(module: nn.Module) -> Linears:
        modules = module.named_modules()
        return {name: (one.in_features, one.out_features) for name, one in modules if isinstance(one, nn.Linear)}

    decoder = model.get_decoder()
    layers = tuple(linears(layer) for layer in decoder.layers)
    outside = [
        inputs * outputs for name, (inputs, outputs) in linears(decoder).items() if not name.startswith("layers.")
    ]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return Built(layers, tuple(outside), experts, sum(sizes.values()))


def _count(config: PreTrainedConfig) -> Built:
    if getattr(config, "enable_moe_block", False):
        raise ValueError("memory of a Gemma 4 with experts cannot be estimated: take one without")
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    problems = [f"no {name}" for name in needed if getattr(config, name, None) is None]
    problems += [name for name in ("num_local_experts", "num_experts") if hasattr(config, name)]
    reason = f"memory of model_type {config.model_type!r} cannot be estimated"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{reason}: transformers has no decoder of that type")
    if config.model_type not in MIXTURES and problems:
        reason += f", its config has {problems[0]}"
        raise ValueError(f"{reason}: use a dense decoder (llama, mistral, qwen3) or one of {', '.join(MIXTURES)}")
    return _built(json.dumps(config.to_dict(), default=str))


def attention_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Features of the queries, with the gate or what a linear-attention layer makes in their place, and of the keys."""
    size = head_size(config)
    made = ("q_proj", "in_proj")
    queries = (
        sum(outputs for name, (_, outputs) in layer.items() if name.split(".")[-1].startswith(made))
        for layer in _count(config).layers
    )
    # Where they are fused with keys and values, there is no gate.
    return max(config.num_attention_heads * size, *queries), far_layer(config).num_key_value_heads * size


def experts_used(config: PreTrainedConfig) -> int:
    """Experts of a layer that a token passes through, 0 in a base without."""
    return getattr(config, "num_experts_per_tok", None) or 0


def _expert_width(config: PreTrainedConfig) -> int:
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def _shared_width(config: PreTrainedConfig) -> int:
    return getattr(config, "shared_expert_intermediate_size", None) or 0


def _rows(config: PreTrainedConfig) -> Rows:
    return ROWS.get(config.model_type, Rows())


def inner_width(config: PreTrainedConfig) -> int:
    """Features of the feed-forward that a token passes through: of all its experts, in a mixture."""
    used = experts_used(config)
    return used * _expert_width(config) + _shared_width(config) if used else config.intermediate_size


def kept_width(config: PreTrainedConfig) -> int:
    """Features of a token that the feed-forward keeps for the backward pass."""
    used, shared = experts_used(config), _shared_width(config)
    if not used:
        return 3 * inner_width(config)
    shared_kept = 3 * shared + config.hidden_size if shared else 0
    return used * (_rows(config).kept * _expert_width(config) + config.hidden_size) + shared_kept


def passing_width(config: PreTrainedConfig, products: int) -> int:
    """Features of a token that pass backward through the feed-forward at a time; `products` of a dense one's."""
    used, inner, rows = experts_used(config), inner_width(config), _rows(config)
    return max(rows.backward * inner, rows.backward_hidden * used * config.hidden_size) if used else products * inner


def running_width(config: PreTrainedConfig) -> int:
    """Features of a token that the feed-forward has at a time without gradients."""
    used, hidden, rows = experts_used(config), config.hidden_size, _rows(config)
    if not used:
        return 3 * inner_width(config)
    return used * max(rows.forward * _expert_width(config) + hidden, rows.forward_hidden * hidden)


def linears_of_a_layer(config: PreTrainedConfig) -> Linears:
    """The linears of a decoder layer: all that any layer has."""
    return {name.split(".")[-1]: sizes for layer in _count(config).layers for name, sizes in layer.items()}


def linear_sizes(config: PreTrainedConfig) -> list[int]:
    """Parameters of each linear of the decoder, which are quantized."""
    layers, outside, _, _ = _count(config)
    return [*(inputs * outputs for layer in layers for inputs, outputs in layer.values()), *outside]


def linear_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the decoder's linears."""
    return sum(linear_sizes(config))


def expert_parameters(config: PreTrainedConfig) -> int:
    """Parameters of all experts but the shared ones, which are linears."""
    return _count(config).experts if experts_used(config) else 0


def _idle_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the experts that a token does not pass through."""
    experts, used = expert_parameters(config), experts_used(config)
    return experts - experts * used // number_of_experts(config) if used else 0


def number_of_experts(config: PreTrainedConfig) -> int:
    """Experts of a layer, 0 in a base without."""
    return getattr(config, "num_experts", None) or 0


def used_parameters(config: PreTrainedConfig) -> int:
    """Of the decoder's linears and experts, those that a token passes through."""
    return linear_parameters(config) + expert_parameters(config) - _idle_parameters(config)


def active_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the base without the experts that a token does not pass through."""
    return parameter_count(config) - _idle_parameters(config)


def embedding_parameters(config: PreTrainedConfig) -> int:
    """Parameters of embeddings and head."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def other_parameters(config: PreTrainedConfig) -> int:
    """Biases, norms and experts, which are not quantized."""
    return _count(config).parameters - linear_parameters(config) - embedding_parameters(config)


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the base, embeddings and head included."""
    return _count(config).parameters


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
    targets, layers = target_linears(config, target_modules), _count(config).layers
    return sum(sum(sizes) for layer in layers for name, sizes in layer.items() if name.split(".")[-1] in targets)


def adapted_layers(config: PreTrainedConfig, target_modules: str | Sequence[str]) -> int:
    """Layers with a linear that gets an adapter."""
    targets = target_linears(config, target_modules)
    return sum(any(name.split(".")[-1] in targets for name in layer) for layer in _count(config).layers)


def cached_tokens(config: PreTrainedConfig, length: int, chunk: int) -> int:
    """Tokens whose keys and values are kept, summed over the layers: a sliding layer keeps its window, and a chunk
    while that is read; a linear-attention layer keeps a state, which is not counted."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    kept = {"linear_attention": 0, "sliding_attention": min(length, window + chunk)}
    return sum(kept.get(kind, length) for kind in kinds)
