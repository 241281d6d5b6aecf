"""Whether a recipe fits the GPU at hand: its plan, and one line on what to change where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_hqq_available

from ..errors import MEMORY_RAN_OUT, ran_out_of_memory
from ..model.base import GIB
from . import advice, memory


def allowed_gib() -> float | None:
    """What this process may have of the GPU: what it holds and what is free, within its limit. None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    # torch 2.6 does not tell.
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + torch.cuda.memory_reserved(), share * total) / GIB


@contextmanager
def explained(say: Callable[[Exception], str]) -> Iterator[None]:
    """Note on an error of memory what `say(error)` says; `errors.explain` prints the note."""
    try:
        yield
    except Exception as error:
        if ran_out_of_memory(error):
            # A base whose memory cannot be planned.
            with suppress(ValueError):
                error.add_note(MEMORY_RAN_OUT + say(error))
        raise


def reading_explained(config: PreTrainedConfig, batch_size: int = 1, **settings: Any) -> AbstractContextManager[None]:
    """While prompts are read with `memory.estimate_evaluation`'s settings: the same, in the flags of `evaluate`."""

    def remedy(gib: float) -> str:
        if batch_size > 1:
            return "--batch_size 1, which is planned"
        return advice.as_flags(advice.advise_evaluation(config, gib, **settings))

    def say(error: Exception) -> str:
        line = advice.shortage(memory.estimate_evaluation(config, **settings), allowed_gib(), remedy)
        return f" with prompts of {settings['length']:,} tokens: {line}"

    return explained(say)


def fitting_kv_cache(config: PreTrainedConfig, length: int, batch_size: int = 1) -> str:
    """The fastest KV cache with which `length` tokens can be read in what the GPU has free now, the model being loaded:
    default (16-bit), quantized (4-bit) or offloaded. On a CPU always default."""
    if not torch.cuda.is_available():
        return "default"
    free = torch.cuda.mem_get_info()[0] / GIB
    for kind in ("default", "quantized"):
        terms = memory.estimate_evaluation(config, length=length, kv_cache=kind)
        needed = sum(terms[name] for name in ("kv_cache", "attention", "activations", "logits"))
        if needed * batch_size <= free and (kind == "default" or is_hqq_available()):
            return kind
    return "offloaded"
