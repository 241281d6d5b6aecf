"""SDPA on GPUs that have no flash attention: keys and values that queries share are repeated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

FLASH_CAPABILITY = (8, 0)
"""CUDA compute capability that flash attention needs, torch's (ATen/native/transformers/cuda/sdp_utils.cpp) and the
package flash-attn's."""
FLASH_HEAD_SIZE = 256
"""Features of a head, at most, in flash-attn 2."""


def _lacks_flash(query: torch.Tensor) -> bool:
    return query.is_cuda and torch.cuda.get_device_capability(query.device) < FLASH_CAPABILITY


def repeating_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa of queries [batch, heads, tokens, head size], and of keys and values with fewer heads.

    Without a mask transformers has SDPA share the keys (enable_gqa). Of its kernels flash attention can, and the
    memory-efficient one cannot: without flash that leaves the math kernel, which makes [heads, tokens, tokens] scores.
    """
    if attention_mask is None and _lacks_flash(query):
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def use_repeating_sdpa() -> None:
    """Let every model whose attn_implementation is sdpa attend by `repeating_sdpa`, which elsewhere changes nothing."""
    AttentionInterface.register("sdpa", repeating_sdpa)
