"""Peak GPU memory of a recipe, term by term, in GiB (2**30 bytes), from the base's config alone.

The stack described: NF4 base with double quantization (or bf16), embeddings, norms and head in bf16, LoRA in fp32
under bf16 autocast, sdpa or flash attention, TRL's chunked LM head. tests/test_memory.py checks the terms against
real allocations; cuda_context is an assumption.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_hqq_available

GIB = 2**30

# A little below the name: the total capacity that torch reports to a process.
CARDS: dict[str, float] = {
    "RTX 4060 8GB": 7.6,
    "RTX 3060 12GB": 11.7,
    "RTX 4070 12GB": 11.7,
    "T4 16GB": 14.6,
    "RTX 4060 Ti 16GB": 15.6,
    "RTX 4080 16GB": 15.6,
    "L4 24GB": 22.0,
    "RTX 3090 24GB": 23.6,
    "RTX 4090 24GB": 23.6,
    "RTX 5090 32GB": 31.4,
    "A100 40GB": 39.4,
    "A100 80GB": 79.1,
    "H100 80GB": 79.1,
}

# Assumed: 0.3 to 0.5 GiB for the CUDA context and its kernels, the rest for cuBLAS workspaces and fragmentation.
CUDA_CONTEXT_GIB = 0.75

# Tokens and vocabulary that TRL 1.16 puts through the LM head at a time (trl/kernels/chunked_logprob.py).
LM_HEAD_TILE = (4096, 32_768)

_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIELDS += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_LLAMA2_7B = ("llama", 32_000, 4096, 11_008, 32, 32, 32, 4096, 1e-5, {"rope_theta": 1e4})
_ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": ("llama", 32_000, 5120, 13_824, 40, 40, 40, 4096, 1e-5, {"rope_theta": 1e4}),
    "meta-llama/Llama-3.1-8B": ("llama", 128_256, 4096, 14_336, 32, 32, 8, 131_072, 1e-5, _LLAMA3),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32_768, 4096, 14_336, 32, 32, 8, 32_768, 1e-5, {"rope_theta": 1e6}),
    "Qwen/Qwen3-8B-Base": ("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 32_768, 1e-6, {"rope_theta": 1e6}),
}
# The architecture of the recipes' bases, so that planning needs no network.
EMBEDDED_CONFIGS = {name: dict(zip(_FIELDS, values, strict=True)) for name, values in _ARCHITECTURES.items()}
EMBEDDED_CONFIGS["mistralai/Mistral-7B-v0.3"]["sliding_window"] = None


def embedded_config(model_id: str) -> PreTrainedConfig | None:
    """The config of one of the recipes' bases; None for any other."""
    if model_id not in EMBEDDED_CONFIGS:
        return None
    return AutoConfig.for_model(**copy.deepcopy(EMBEDDED_CONFIGS[model_id]))


def _widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Features of the queries, and of the keys."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_size, config.num_key_value_heads * head_size


def _linears(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(in features, out features) of each linear of a decoder layer, the same in every layer."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    problems = [f"no {name}" for name in needed if getattr(config, name, None) is None]
    problems += [name for name in ("num_local_experts", "num_experts") if hasattr(config, name)]
    if problems:
        reason = f"memory of model_type {config.model_type!r} cannot be estimated, its config has {problems[0]}"
        raise ValueError(f"{reason}: use a dense decoder (llama, mistral, qwen2, qwen3)")
    hidden, inner, (queries, keys) = config.hidden_size, config.intermediate_size, _widths(config)
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    feed_forward = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return attention | {"o_proj": (queries, hidden)} | feed_forward


def _small_parameters(config: PreTrainedConfig) -> int:
    """Biases and norms, which are not quantized."""
    biased = ("q_proj", "k_proj", "v_proj") if config.model_type == "qwen2" else ()
    biased += ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()
    biased += ("gate_proj", "up_proj", "down_proj") if getattr(config, "mlp_bias", False) else ()
    biases = sum(_linears(config)[name][1] for name in biased)
    head_norms = 2 * _widths(config)[0] // config.num_attention_heads if config.model_type == "qwen3" else 0
    return config.num_hidden_layers * (biases + 2 * config.hidden_size + head_norms) + config.hidden_size


def _embedding_parameters(config: PreTrainedConfig) -> int:
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the base, embeddings and head included."""
    layer = sum(inputs * outputs for inputs, outputs in _linears(config).values())
    return config.num_hidden_layers * layer + _small_parameters(config) + _embedding_parameters(config)


def _nf4_bytes(parameters: int) -> int:
    """A 4-bit weight (QLoRA, arXiv 2305.14314): half a byte a parameter, an 8-bit maximum per block of 64, an fp32
    maximum per 256 of those, and in fp32 the two code tables (16 and 256 values) and the offset."""
    blocks = math.ceil(parameters / 64)
    return math.ceil(parameters / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def _targets(config: PreTrainedConfig, target_modules: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    linears = _linears(config)
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    unknown = [name for name in names if name not in linears and name != "all-linear"]
    if unknown:
        raise ValueError(f"unknown target module {unknown[0]!r}: use all-linear, or some of {', '.join(linears)}")
    return linears if "all-linear" in names else {name: linears[name] for name in names}


def _layer_bytes(config: PreTrainedConfig, targets: dict, tokens: int, rank: int, dropout: bool, four_bit: bool) -> int:
    """What one decoder layer keeps for its backward pass: bf16, but for the norms' fp32 inputs."""
    hidden, inner, (queries, keys) = config.hidden_size, config.intermediate_size, _widths(config)
    norms = 4 * (2 * hidden + (queries + keys if config.model_type == "qwen3" else 0))
    # Queries, keys, values, output, and an fp32 log-sum-exp per head. A frozen linear keeps nothing of its input.
    attention = 2 * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
    gate_silu_up = 2 * 3 * inner
    if dropout or not four_bit:
        # A copy of the input for each target (on a bf16 base PEFT casts it), and a mask of one byte for dropout.
        inputs = sum((2 + dropout) * width for width, _ in targets.values())
    else:
        # q, k, v share one input, gate and up another; o takes the attention's output, already counted.
        shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
        kept = {shared.get(name, name): width for name, (width, _) in targets.items() if name != "o_proj"}
        inputs = sum(2 * width for width in kept.values())
    # lora_B's input per token, and autocast's bf16 copy of the adapter.
    adapter_copy = 2 * rank * sum(inputs + outputs for inputs, outputs in targets.values())
    return tokens * (norms + attention + gate_silu_up + inputs + 2 * rank * len(targets)) + adapter_copy


def _optimizer_bytes(optim: str) -> float:
    """State per trained parameter: Adam's two moments, in fp32 or in 8 bits with an fp32 maximum per block of 256.
    An optimizer not known here counts as Adam in fp32."""
    return 0 if optim == "sgd" else 2 + 8 / 256 if "8bit" in optim else 8


def estimate(
    config: PreTrainedConfig,
    *,
    context_length: int,
    per_device_train_batch_size: int = 1,
    load_in_4bit: bool = True,
    lora_r: int = 16,
    lora_dropout: float = 0.05,
    target_modules: str | Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    gradient_checkpointing: bool = True,
    optim: str = "adamw_torch",
) -> dict[str, float]:
    """GiB by term at the peak of a training step.

    checkpoints is what the forward pass leaves for the backward pass: each layer's input, or without
    gradient_checkpointing all that it keeps. recomputation is the layer in hand: what it keeps when run again, and the
    gradients and the dequantized weight passing through it. logits is the LM head and the last norm, over before the
    layers' backward pass: total has the larger of recomputation and logits, and every other term.
    """
    tokens = context_length * per_device_train_batch_size
    targets, hidden, layers = _targets(config, target_modules), config.hidden_size, config.num_hidden_layers
    sizes = [inputs * outputs for inputs, outputs in _linears(config).values()]
    trained = layers * lora_r * sum(inputs + outputs for inputs, outputs in targets.values())
    kept = _layer_bytes(config, targets, tokens, lora_r, lora_dropout > 0, load_in_4bit)
    # The feed-forward's bf16 gradients (three, or two once down_proj's LoRA let go of its input) and the residual's.
    gradients = hidden + (2 if "down_proj" in targets else 3) * config.intermediate_size
    passing = 2 * tokens * gradients + (2 * max(sizes) if load_in_4bit else 0)
    # The last norm's fp32 input, and the larger of its backward pass (four fp32 tensors and one in bf16) and the head:
    # a tile of logits, the scored hidden states and their gradient in fp32 and bf16.
    tile = 2 * min(tokens, LM_HEAD_TILE[0]) * LM_HEAD_TILE[1]
    head = tokens * hidden * 4 + max(tokens * hidden * (4 * 4 + 2), tile + tokens * hidden * (2 + 4 + 2))
    terms = {
        "weights": layers * sum(map(_nf4_bytes, sizes) if load_in_4bit else [2 * size for size in sizes])
        + 2 * _small_parameters(config),
        "embeddings_and_head": 2 * _embedding_parameters(config),
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": _optimizer_bytes(optim) * trained,
        "checkpoints": layers * (2 * tokens * hidden if gradient_checkpointing else kept),
        "recomputation": passing + (kept if gradient_checkpointing else 0),
        "logits": head,
        "cuda_context": CUDA_CONTEXT_GIB * GIB,
    }
    terms["total"] = sum(terms.values()) - min(terms["recomputation"], terms["logits"])
    return {term: size / GIB for term, size in terms.items()}


def _savings(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that need less, those that cost the least first."""
    yield {"gradient_checkpointing": True}
    yield {"per_device_train_batch_size": 1}
    yield {"load_in_4bit": True}
    for halvings in range(1, max(1, (settings["context_length"] // 1024).bit_length())):
        yield {"context_length": settings["context_length"] >> halvings}
    yield {"optim": "paged_adamw_8bit"}
    yield {"lora_r": min(8, settings.get("lora_r", 16))}


def advise(config: PreTrainedConfig, gib: float, **settings: Any) -> dict[str, Any] | None:
    """The change of `settings` that makes the recipe fit into `gib` GiB: {} if it does already, None if none does."""
    changes: dict[str, Any] = {}
    for saving in [{}, *_savings(settings)]:
        changes |= saving
        if estimate(config, **settings | changes)["total"] <= gib:
            break
    else:
        return None
    for name in list(changes):
        without = {key: value for key, value in changes.items() if key != name}
        if estimate(config, **settings | without)["total"] <= gib:
            changes = without
    return changes


def plan(config: PreTrainedConfig, **settings: Any) -> dict[str, Any]:
    """{"terms": GiB by term, "cards": which of CARDS fit, "advice": a line for those that do not}."""
    terms = estimate(config, **settings)
    cards = [{"card": card, "gib": gib, "fits": terms["total"] <= gib} for card, gib in CARDS.items()]
    advice = []
    for gib in sorted({card["gib"] for card in cards if not card["fits"]}):
        names = " or ".join(card["card"] for card in cards if card["gib"] == gib)
        changes = advise(config, gib, **settings)
        listed = ", ".join(f"{name}: {str(value).lower()}" for name, value in (changes or {}).items())
        advice.append(f"{names}: fits with {listed}" if listed else f"{names}: no settings fit, a smaller base may")
    return {"terms": terms, "cards": cards, "advice": advice}


def parse_gpu(text: str) -> float:
    """GiB of a card by its name ("RTX 4090") or by its memory ("8GB"; GB is read as GiB, as on the box)."""
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if amount and float(amount[1]) > 0:
        return float(amount[1])
    # Its memory may be left out (A100 is then two cards), or its unit.
    plain = {name: re.sub("nvidia|geforce|tesla", "", name.lower()) for name in (*CARDS, text)}
    words = {name: re.findall(r"[a-z]+|\d+", plain[name]) for name in plain}
    matches = [card for card in CARDS if words[text] in (words[card], words[card][:-1], words[card][:-2])]
    if len(matches) > 1:
        raise ValueError(f"GPU {text!r} can be {' or '.join(matches)}: say which")
    if matches:
        return CARDS[matches[0]]
    raise ValueError(f"GPU {text!r} is not known: give its memory (8GB), or one of {', '.join(CARDS)}")


def kv_cache_bytes(config: PreTrainedConfig, length: int, batch_size: int = 1) -> int:
    """Bytes of the 16-bit keys and values of `batch_size` sequences of `length` tokens."""
    _, keys = _widths(config)
    return 2 * 2 * config.num_hidden_layers * keys * length * batch_size


def fitting_kv_cache(config: PreTrainedConfig, length: int, batch_size: int = 1) -> str:
    """The fastest KV cache that fits what the GPU has free: default (16-bit), quantized (4-bit) or offloaded.

    On a CPU always default. A quarter is left for what is computed meanwhile; a quantized cache takes about a third of
    the 16-bit one, scales and the tokens not yet quantized included.
    """
    if not torch.cuda.is_available():
        return "default"
    free, needed = 0.75 * torch.cuda.mem_get_info()[0], kv_cache_bytes(config, length, batch_size)
    if needed <= free:
        return "default"
    return "quantized" if needed / 3 <= free and is_hqq_available() else "offloaded"
