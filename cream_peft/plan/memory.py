"""Peak GPU memory of a recipe, term by term, in GiB (2**30 bytes), from the base's config alone.

The stack described: NF4 base with double quantization (or bf16), embeddings, norms and head in bf16, LoRA in fp32
under bf16 autocast, sdpa or flash attention, TRL's chunked LM head. tests/test_memory.py checks the terms against
real allocations of dense decoders; cuda_context is an assumption. advice.py compares them with GPUs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..model.base import GIB
from ..model.kv_cache import PREFILL_CHUNK, kv_caches
from .layers import (
    ATTENTION,
    attention_widths,
    cached_tokens,
    embedding_parameters,
    inner_width,
    kept_width,
    linear_sizes,
    linears_of_a_layer,
    other_parameters,
    parameter_count,
    passing_width,
    running_width,
    target_linears,
    target_widths,
)

# Assumed: 0.3 to 0.5 GiB for the CUDA context and its kernels, the rest for cuBLAS workspaces and fragmentation.
CUDA_CONTEXT_GIB = 0.75

# Tokens and vocabulary that TRL 1.16 puts through the LM head at a time (trl/kernels/chunked_logprob.py).
LM_HEAD_TILE = (4096, 32_768)

# Layer inputs that TRL 1.16 still has on the GPU when it offloads activations (OffloadActivations.max_fwd_stash_size).
OFFLOAD_STASH = 5

# HQQ in 4 bits: half a byte, and in 16 bits a scale and a zero per group of 32.
HQQ_BYTES = 0.5 + 2 * 2 / 32
# While HQQ 0.2.8 quantizes the keys of a chunk, bytes for each of them on a GPU: keys and values in 16 bits, as they
# came and as they are added (8), the keys in fp32 and fp16 (6), and eight fp16 tensors of its solver (16;
# hqq/core/optimize.py).
HQQ_WORK_BYTES = 8 + 6 + 16
# And while a piece is unpacked beside the layer's keys and values: 8 as above, three 16-bit tensors.
HQQ_UNPACK_BYTES = 8 + 6

ADAM_BYTES = 8
"""Adam's two moments of a parameter in fp32."""

Terms = dict[str, float]
"""GiB by term, the peak of all of them under "total"."""
Phases = tuple[tuple[str, ...], ...]
"""Terms that are never there together: the total has the larger sum."""


def _nf4_bytes(parameters: int) -> int:
    """A 4-bit weight (QLoRA, arXiv 2305.14314): half a byte a parameter, an 8-bit maximum per block of 64, an fp32
    maximum per 256 of those, and in fp32 the two code tables (16 and 256 values) and the offset."""
    blocks = math.ceil(parameters / 64)
    return math.ceil(parameters / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def _beside(config: PreTrainedConfig) -> dict[str, int]:
    """Features that a layer holds, without gradients, while each of its linears runs: the residual, and what earlier
    linears made."""
    inner, (queries, keys) = config.hidden_size + inner_width(config), attention_widths(config)
    attention = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys, "o_proj": 2 * queries}
    feed_forward = {"gate_proj": config.hidden_size, "up_proj": inner, "down_proj": inner}
    return dict.fromkeys(linears_of_a_layer(config), inner) | attention | feed_forward


def _tile(tokens: int) -> int:
    """Bytes of the logits that are there at a time."""
    return 2 * min(tokens, LM_HEAD_TILE[0]) * LM_HEAD_TILE[1]


def _optimizer_bytes(optim: str) -> float:
    """State per trained parameter: Adam's two moments, in fp32 or in 8 bits with an fp32 maximum per block of 256.
    An optimizer not known here counts as Adam in fp32."""
    return 0 if optim == "sgd" else 2 + 8 / 256 if "8bit" in optim else ADAM_BYTES


def _halved(name: str, tokens: int) -> list[dict[str, Any]]:
    """Ever shorter lengths, down to 1,024 tokens."""
    return [{name: tokens >> halvings} for halvings in range(1, max(1, (tokens // 1024).bit_length()))]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the base is loaded, and the adapter on it."""

    use_peft: bool = True
    """False: every weight is trained, in `dtype`, computing in 16 bits."""
    dtype: str = "float32"
    load_in_4bit: bool = True
    lora_r: int = 16
    target_modules: str | Sequence[str] = ATTENTION

    def trained_parameters(self, config: PreTrainedConfig) -> int:
        """Parameters of the LoRA adapter, or of the whole model."""
        if not self.use_peft:
            return parameter_count(config)
        return self.lora_r * target_widths(config, self.target_modules)

    def _state_bytes(self, config: PreTrainedConfig, optim: str) -> float:
        """Bytes of the optimizer's state. Of the embeddings, if they are trained, transformers has bitsandbytes keep it
        in fp32 (Trainer.create_optimizer)."""
        each, trained = _optimizer_bytes(optim), self.trained_parameters(config)
        embeddings = 0 if self.use_peft or "8bit" not in optim else config.vocab_size * config.hidden_size
        return each * (trained - embeddings) + ADAM_BYTES * embeddings

    def _weight_bytes(self) -> int:
        """Bytes of a weight that is not quantized."""
        return 2 if self.use_peft or self.dtype != "float32" else 4

    def _gib(self, config: PreTrainedConfig, phases: Phases, **work: float) -> Terms:
        """GiB of the base, its adapter and the bytes of `work`, and in total: only the largest of the phases counts."""
        sizes, each = linear_sizes(config), self._weight_bytes()
        terms = {
            "weights": (sum(map(_nf4_bytes, sizes)) if self.load_in_4bit else each * sum(sizes))
            + each * other_parameters(config),
            "embeddings_and_head": each * embedding_parameters(config),
            "adapter": 4 * self.trained_parameters(config) if self.use_peft else 0,
            **work,
            # bitsandbytes turns one linear at a time into 16 bits, and its blocks' maxima into fp32.
            "quantization": 2 * max(sizes) + max(sizes) // 16 if self.load_in_4bit else 0,
            "cuda_context": CUDA_CONTEXT_GIB * GIB,
        }
        sums = [sum(terms[name] for name in phase) for phase in phases]
        terms["total"] = sum(terms.values()) - sum(sums) + max(sums)
        return {term: size / GIB for term, size in terms.items()}


@dataclass(frozen=True, kw_only=True)
class Training(Loading):
    """A run, in the keys of a recipe. max_steps: None where it counts epochs; distillation_length: 0 for none."""

    context_length: int
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    distillation_length: int = 0
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    optim: str = "adamw_torch"
    phases: ClassVar[Phases] = (("recomputation", "quantization"), ("logits",))

    def savings(self, config: PreTrainedConfig) -> list[dict[str, Any]]:
        """Changes that take less memory, what costs least first."""
        here = [{"gradient_checkpointing": True}, {"per_device_train_batch_size": 1}]
        there = [{"activation_offloading": True}, {"optim": "paged_adamw_8bit"}]
        halved, adapter = _halved("context_length", self.context_length), {"load_in_4bit": True}
        if not self.use_peft:
            return [*here, *there, *halved, {"use_peft": True} | adapter]
        return [*here, adapter, *there, *halved, {"lora_r": min(8, self.lora_r)}]

    def _layer_bytes(self, config: PreTrainedConfig, tokens: int) -> int:
        """What one decoder layer keeps for its backward pass: bf16, but for the norms' fp32 inputs."""
        targets, dropout = target_linears(config, self.target_modules), self.lora_dropout > 0
        hidden, (queries, keys) = config.hidden_size, attention_widths(config)
        if not self.use_peft:
            return tokens * self._full_layer_bytes(config)
        norms = 4 * (2 * hidden + (queries + keys if config.model_type in ("qwen3", "qwen3_moe") else 0))
        # Queries, keys, values, output, and an fp32 log-sum-exp per head. A frozen linear keeps nothing of its input.
        attention = 2 * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
        feed_forward = 2 * kept_width(config)
        if dropout or not self.load_in_4bit:
            # A copy of the input for each target (on a bf16 base PEFT casts it), and a mask of one byte for dropout.
            inputs = sum((2 + dropout) * width for width, _ in targets.values())
        else:
            # q, k, v share one input, gate and up another; o takes the attention's output, already counted.
            shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
            kept = {shared.get(name, name): width for name, (width, _) in targets.items() if name != "o_proj"}
            inputs = sum(2 * width for width in kept.values())
        # lora_B's input per token, and autocast's bf16 copy of the adapter.
        adapter_copy = 2 * self.lora_r * sum(inputs + outputs for inputs, outputs in targets.values())
        return tokens * (norms + attention + feed_forward + inputs + 2 * self.lora_r * len(targets)) + adapter_copy

    def _full_layer_bytes(self, config: PreTrainedConfig) -> int:
        """The same of a token where every weight is trained: a linear keeps its input, and a norm what it scales."""
        hidden, inner, (queries, keys) = config.hidden_size, inner_width(config), attention_widths(config)
        each = self._weight_bytes()
        norms = (4 + each) * (2 * hidden + (queries + keys if config.model_type == "qwen3" else 0))
        attention = 2 * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
        # In fp32 RoPE hands fp32 on, of which attention keeps 16-bit copies.
        attention += 2 * (queries + 2 * keys) if each == 4 else 0
        return norms + attention + 2 * 3 * inner + 2 * (2 * hidden + inner)

    def terms(self, config: PreTrainedConfig) -> Terms:
        """GiB by term at the peak of a training step.

        checkpoints is what the forward pass leaves for the backward pass: each layer's input, or without
        gradient_checkpointing all that it keeps; with activation_offloading the layer inputs not yet in main memory.
        recomputation is the layer in hand: what it keeps when run again, and the gradients passing through it;
        quantization its largest weight in 16 bits. logits is the LM head and the last norm, over before the layers run.
        """
        tokens = self.context_length * self.per_device_train_batch_size
        hidden, layers, kept = config.hidden_size, config.num_hidden_layers, self._layer_bytes(config, tokens)
        # The feed-forward's bf16 gradients (three, or two once down_proj's LoRA let go of its input), the residual's.
        products = 2 if not self.use_peft or "down_proj" in target_linears(config, self.target_modules) else 3
        passing = 2 * tokens * (hidden + passing_width(config, products))
        inputs_kept = min(layers, OFFLOAD_STASH) if self.activation_offloading else layers
        # The last norm's fp32 input, and the larger of its backward pass (four in fp32, one in bf16) and the head: a
        # tile of logits, scored hidden states, their gradient in fp32 and bf16. Or distillation: 5 in fp32, 3 in bf16.
        distilled = (5 * 4 + 3 * 2) * self.distillation_length / self.context_length
        head = max(tokens * hidden * max(4 * 4 + 2, distilled), _tile(tokens) + tokens * hidden * (2 + 4 + 2))
        each, gradient_bytes = self._weight_bytes(), 4 if self.use_peft else self._weight_bytes()
        in_hand = 1 if self.gradient_checkpointing else layers
        sizes = [inputs * outputs for inputs, outputs in linears_of_a_layer(config).values()]
        return self._gib(
            config,
            self.phases,
            gradients=gradient_bytes * self.trained_parameters(config),
            optimizer=self._state_bytes(config, self.optim),
            # Autocast's 16-bit copies of fp32 weights, and the gradient of the largest.
            weight_copies=2 * (in_hand * sum(sizes) + max(sizes)) if each == 4 else 0,
            checkpoints=inputs_kept * each * tokens * hidden if self.gradient_checkpointing else layers * kept,
            recomputation=passing + (kept if self.gradient_checkpointing else 0),
            logits=tokens * hidden * 4 + head,
        )


@dataclass(frozen=True, kw_only=True)
class Validation(Loading):
    """The loss of held-out documents, which the trainer computes between steps, in the keys of a recipe."""

    eval_length: int
    per_device_eval_batch_size: int = 1
    optim: str = "adamw_torch"

    def savings(self, config: PreTrainedConfig) -> list[dict[str, Any]]:
        """Changes that take less memory, what costs least first."""
        return [{"per_device_eval_batch_size": 1}, *_halved("eval_length", self.eval_length)]

    def terms(self, config: PreTrainedConfig) -> Terms:
        """GiB by term. activations, with quantization, is a layer in hand; logits the LM head after the last."""
        tokens = self.eval_length * self.per_device_eval_batch_size
        hidden, beside = config.hidden_size, _beside(config)
        # In 16 bits the embeddings, the layer's input and what its norm or attention made of it, and beside them the
        # feed-forward's three products, or a linear's output and its adapter's, twice, for its scaling, and on a 16-bit
        # base the linear's input in fp32.
        copied, targets = 0 if self.load_in_4bit else 2, target_linears(config, self.target_modules)
        widths = [3 * outs + beside[name] + copied * ins for name, (ins, outs) in targets.items()]
        each, (queries, keys) = self._weight_bytes(), attention_widths(config)
        activations = 2 * (3 * hidden + max(hidden + running_width(config), *widths))
        if each == 4:
            # The first three in fp32, beside queries, keys and values in 16 bits, of which RoPE makes three in fp32; or
            # these and the residual, the feed-forward's input in 16 bits, and its three products.
            rotated = 4 * max(3 * queries, queries + 3 * keys) + 2 * (queries + 2 * keys)
            activations = max(3 * 4 * hidden + rotated, (4 * 4 + 2) * hidden + 2 * running_width(config))
        return self._gib(
            config,
            (("activations", "quantization"), ("logits",)),
            optimizer=self._state_bytes(config, self.optim),
            activations=tokens * activations,
            logits=_tile(tokens) + each * tokens * 3 * hidden,
        )


@dataclass(frozen=True, kw_only=True)
class Reading(Loading):
    """Reading a document of `length` tokens into a cache of keys and values, `chunk_length` at a time, by a model with
    its adapter in fp32 and no autocast, with the logits of the last token only."""

    length: int
    kv_cache: str = "default"
    chunk_length: int = PREFILL_CHUNK
    phases: ClassVar[Phases] = (("activations", "quantization"), ("attention",))

    def savings(self, config: PreTrainedConfig) -> list[dict[str, Any]]:
        """Changes that take less memory, what costs least first."""
        caches = [{"kv_cache": kind} for kind in kv_caches(config)[1:]]
        return [{"load_in_4bit": True}, *caches, *_halved("length", self.length)]

    def terms(self, config: PreTrainedConfig) -> Terms:
        """GiB by term. attention is adding to a layer's cache and attending to it, activations, with quantization, a
        linear with its adapter: both over a chunk. On sdpa, which takes a mask there."""
        hidden, length = config.hidden_size, self.length
        tokens, (queries, keys) = min(self.chunk_length, length), attention_widths(config)
        layer, quantized = 4 * keys * length, self.kv_cache == "quantized"
        # In 16 bits the embeddings, the layer's input and what its norm or attention made of it; a mask of one byte.
        throughout = tokens * (6 * hidden + length)
        # Old and new keys together, or a chunk quantized, then the layer unpacked; then a 16-bit mask, and keys and
        # values repeated for queries that share them.
        adding = 2 * keys * length + tokens * (2 * queries + 4 * keys)
        if quantized:
            unpacking = layer + HQQ_UNPACK_BYTES * tokens * keys
            adding = 2 * tokens * queries + max(HQQ_WORK_BYTES * tokens * keys, unpacking)
        shared = 4 * queries * length if 1 < config.num_key_value_heads < config.num_attention_heads else 0
        attending = quantized * layer + shared + tokens * (2 * length + 4 * queries)
        # The feed-forward's three products in 16 bits; or a linear's output in 16 bits and its adapter's input in fp32,
        # and output, twice, for its scaling.
        beside, targets = _beside(config), target_linears(config, self.target_modules)
        widths = [4 * ins + 10 * outs + 2 * beside[name] for name, (ins, outs) in targets.items()]
        return self._gib(
            config,
            self.phases,
            kv_cache=4 * keys * cached_tokens(config, length, tokens) * (HQQ_BYTES / 2 if quantized else 1),
            attention=throughout + max(adding, attending),
            activations=throughout + tokens * max(2 * (hidden + running_width(config)), *widths),
            logits=6 * config.vocab_size,
        )


Settings = Training | Validation | Reading
