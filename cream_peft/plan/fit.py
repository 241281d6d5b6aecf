"""The GPU at hand: what a process may have of it, the KV cache that fits, and out of memory in words."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_hqq_available

from ..errors import OUT_OF_MEMORY, is_out_of_memory
from ..model.base import GIB
from ..model.kv_cache import kv_caches
from .advice import out_of_memory_note
from .memory import Reading


def allowed_gib() -> float | None:
    """What this process may have of the GPU: what it holds and what is free, within its limit. None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    # torch 2.6 does not tell.
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + torch.cuda.memory_reserved(), share * total) / GIB


@contextmanager
def explained(say: Callable[[Exception], str]) -> Generator[None]:
    """Note on an out-of-memory error what `say(error)` says; `errors.explain` prints the note."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            # A base whose memory cannot be planned.
            with suppress(ValueError):
                error.add_note(OUT_OF_MEMORY + say(error))
        raise


def reading_explained(config: PreTrainedConfig, reading: Reading) -> AbstractContextManager[None]:
    """While prompts are read: an out-of-memory error says what was planned, and which flag of `evaluate` helps."""

    def say(error: Exception) -> str:
        return f" with prompts of {reading.length:,} tokens: {out_of_memory_note(config, reading, allowed_gib())}"

    return explained(say)


def fitting_kv_cache(config: PreTrainedConfig, reading: Reading) -> str:
    """The KV cache for a document in what the GPU has free, the model being loaded: default (16-bit) where it fits or
    nothing else can be had, else quantized (4-bit). On a CPU always default."""
    if not torch.cuda.is_available() or not is_hqq_available() or "quantized" not in kv_caches(config):
        return "default"
    terms = reading.terms(config)
    needed = sum(terms[name] for name in ("kv_cache", "attention", "activations", "logits"))
    # What an earlier model had is kept by torch's allocator, and is free for this one.
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return "default" if needed <= (torch.cuda.mem_get_info()[0] + kept) / GIB else "quantized"
