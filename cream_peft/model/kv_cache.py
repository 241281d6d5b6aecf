"""The cache of keys and values that a long document is read into: in 16 bits, or in 4."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer
from transformers.utils import is_hqq_available

from ..families import FULL, SLIDING

KV_CACHES = ("default", "quantized")

# Tokens of a document that are read at once: attention then needs this times the length, never the length squared.
PREFILL_CHUNK = 2048


class AppendingHQQLayer(HQQQuantizedLayer):
    """A layer's keys and values in 4 bits, each token quantized once, in groups of 32 within its own.

    That of transformers quantizes all tokens anew whenever it quantizes some, with HQQ's solver over the whole layer:
    30 bytes for each key, and more rounding each time. This one keeps pieces as they were read, and can be cut back.
    """

    def __init__(self) -> None:
        super().__init__(nbits=4, axis_key=1, axis_value=1, q_group_size=32)
        self._pieces: list[tuple[int, Any, Any]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [batch, heads, tokens, head size]; all there are, the added ones as they came."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        older = list(self._pieces)
        before = cast(tuple[torch.Tensor, torch.Tensor], (self.keys, self.values))
        keys, values = (torch.cat(pair, dim=-2) for pair in zip(before, (key_states, value_states), strict=True))
        self.cumulative_length += key_states.shape[-2]
        quantized = keys.shape[-2] // self.residual_length * self.residual_length
        self.keys, self.values = keys, values
        if quantized:
            parts = (part[..., :quantized, :].contiguous() for part in (keys, values))
            self._pieces.append((quantized, *(self._quantize(part, axis=1) for part in parts)))
            # Copies: a view would keep all of it.
            self.keys, self.values = keys[..., quantized:, :].clone(), values[..., quantized:, :].clone()
        if not older:
            return keys, values
        return self._joined(older, 1, keys), self._joined(older, 2, values)

    def _joined(self, pieces: list[tuple[int, Any, Any]], part: int, recent: torch.Tensor) -> torch.Tensor:
        """The keys (part 1) or values (2) of `pieces`, then `recent`, with one piece at a time beside them."""
        batch, heads, tokens, size = recent.shape
        length = tokens + sum(piece[0] for piece in pieces)
        joined = recent.new_empty(batch, heads, length, size)
        begin = 0
        for piece in pieces:
            joined[..., begin : begin + piece[0], :] = self._dequantize(piece[part])
            begin += piece[0]
        joined[..., begin:, :] = recent
        return joined

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in transformers, their number is given as a negative one."""
        kept = self.get_seq_length() + min(tokens_to_remove, 0)
        recent = cast(tuple[torch.Tensor, torch.Tensor], (self.keys, self.values))
        while self._pieces and sum(piece[0] for piece in self._pieces) > kept:
            pairs = zip(self._pieces.pop()[1:], recent, strict=True)
            recent = tuple(torch.cat([self._dequantize(piece), part], dim=-2) for piece, part in pairs)
        left = kept - sum(piece[0] for piece in self._pieces)
        self.keys, self.values = (part[..., :left, :].clone() for part in recent)
        self.cumulative_length = kept

    def reset(self) -> None:
        super().reset()
        self._pieces, self.cumulative_length = [], 0


def kv_caches(config: PreTrainedConfig) -> tuple[str, ...]:
    """The kinds of cache that a base can have: in 4 bits only one whose layers all see everything."""
    return KV_CACHES if set(_layer_types(config)) <= {FULL} else KV_CACHES[:1]


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or [SLIDING if getattr(config, "sliding_window", None) else FULL]


def refuse_unusable(kv_cache: str, config: PreTrainedConfig | None = None) -> None:
    """Raises a ValueError if `kv_cache` is no kind of cache, or needs what this machine or the base lacks."""
    if kv_cache not in KV_CACHES:
        raise ValueError(f"unknown kv_cache {kv_cache!r}: use one of {', '.join(KV_CACHES)}")
    if config is not None and kv_cache not in kv_caches(config):
        other = sorted(set(_layer_types(config)) - {FULL})[0]
        raise ValueError(f"kv_cache {kv_cache} needs full attention in all layers, and this base has {other}: omit it")
    if kv_cache == "quantized" and not is_hqq_available():
        raise ValueError("kv_cache quantized needs HQQ: run `pip install hqq`")


def new_cache(config: PreTrainedConfig, kv_cache: str = "default") -> Cache:
    """An empty cache: in the model's dtype, or in 4 bits.

    Raises:
        ValueError: see `refuse_unusable`.
    """
    refuse_unusable(kv_cache, config)
    if kv_cache != "quantized":
        return DynamicCache(config=config)
    cache = QuantizedCache("hqq", config)
    cache.layers = [AppendingHQQLayer() for _ in cache.layers]
    return cache


def can_crop(layer: Any) -> bool:
    """Whether a cached layer holds all of its tokens, so that the last ones can be removed: not one of a sliding window
    or of linear attention."""
    return type(layer) in (DynamicLayer, AppendingHQQLayer)


@dataclass(frozen=True)
class Mark:
    """A place in a text that was read, to which the cache returns as often as you like."""

    tokens: int
    layers: dict[int, Any]
    """Copies of the layers that cannot be cropped. They are small: a window, or a state."""

    @classmethod
    def at_end_of(cls, cache: Cache) -> Mark:
        copies = {number: copy.deepcopy(layer) for number, layer in enumerate(cache.layers) if not can_crop(layer)}
        return cls(cache.get_seq_length(), copies)

    def rewind(self, cache: Cache) -> None:
        """Make `cache`, which has read on since, what it was."""
        surplus = cache.get_seq_length() - self.tokens
        for number, layer in enumerate(cast(list[Any], cache.layers)):
            if number in self.layers:
                cache.layers[number] = copy.deepcopy(self.layers[number])
            else:
                layer.crop(-surplus)
