"""Whether a recipe fits the GPU at hand: its plan, and one line on what to change where memory is short."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_hqq_available

from . import memory, plan, rope
from .errors import MEMORY_RAN_OUT, ran_out_of_memory
from .recipe import Recipe


def _memory_settings(recipe: Recipe, config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Settings of `memory.estimate`, and of `memory.estimate_validation` where the run computes a held-out loss."""
    run, model = recipe.run, recipe.model
    run.resolve(rope.pretrained_window(config))
    shared = {
        "load_in_4bit": model.load_in_4bit,
        "lora_r": model.lora_r,
        "target_modules": model.lora_target_modules,
        "optim": str(getattr(run.optim, "value", run.optim)),
    }
    training = shared | {
        "context_length": run.context_length,
        "per_device_train_batch_size": run.per_device_train_batch_size,
        "lora_dropout": model.lora_dropout,
        "gradient_checkpointing": bool(run.gradient_checkpointing),
        "checkpoint_offload": bool(run.activation_offloading),
    }
    validation = {"eval_length": run.eval_length, "per_device_eval_batch_size": run.per_device_eval_batch_size}
    evaluates = getattr(run.eval_strategy, "value", run.eval_strategy) != "no"
    return training, validation | shared if evaluates else None


def plan_of(recipe: Recipe, config: PreTrainedConfig, cards: dict[str, float] | None = None) -> dict[str, Any]:
    """Peak memory and hours of the recipe on this base, see `plan.plan`."""
    training, validation = _memory_settings(recipe, config)
    return plan.plan(
        config,
        training,
        validation,
        target_length=recipe.run.target_length,
        gradient_accumulation_steps=recipe.run.gradient_accumulation_steps,
        max_steps=recipe.run.max_steps if recipe.run.max_steps > 0 else None,
        cards=cards,
    )


def shortage(recipe: Recipe, config: PreTrainedConfig, gib: float | None, validating: bool) -> str:
    """What the plan needs against `gib` GiB, and what to change, see `plan.shortage`."""
    training, validation = _memory_settings(recipe, config)
    if validating and validation:
        terms = memory.estimate_validation(config, **validation)
        return plan.shortage(terms, gib, lambda gib: plan.to_set(plan.advise_validation(config, gib, **validation)))
    terms = memory.estimate(config, **training)
    return plan.shortage(terms, gib, lambda gib: plan.to_set(plan.advise(config, gib, **training)))


def allowed_gib() -> float | None:
    """What this process may have of the GPU: what it holds and what is free, within its limit. None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    # torch 2.6 does not tell.
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + torch.cuda.memory_reserved(), share * total) / memory.GIB


@contextmanager
def _explained(say: Callable[[Exception], str]) -> Iterator[None]:
    """Note on an error of memory what `say(error)` says; `errors.explain` prints the note."""
    try:
        yield
    except Exception as error:
        if ran_out_of_memory(error):
            # A base whose memory cannot be planned.
            with suppress(ValueError):
                error.add_note(MEMORY_RAN_OUT + say(error))
        raise


def memory_explained(recipe: Recipe, config: PreTrainedConfig) -> AbstractContextManager[None]:
    """While training: an error of memory says what was planned, and what to change in the recipe."""

    def say(error: Exception) -> str:
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        validating = "evaluation_loop" in frames
        where = " while the loss of held-out documents was computed" if validating else ""
        line = shortage(recipe, config, allowed_gib(), validating)
        return f"{where}: {line}; `cream-peft plan` shows every term"

    return _explained(say)


def reading_explained(config: PreTrainedConfig, batch_size: int = 1, **settings: Any) -> AbstractContextManager[None]:
    """While prompts are read with `memory.estimate_evaluation`'s settings: the same, in the flags of `evaluate`."""

    def advice(gib: float) -> str:
        if batch_size > 1:
            return "--batch_size 1, which is planned"
        return plan.as_flags(plan.advise_evaluation(config, gib, **settings))

    def say(error: Exception) -> str:
        line = plan.shortage(memory.estimate_evaluation(config, **settings), allowed_gib(), advice)
        return f" with prompts of {settings['length']:,} tokens: {line}"

    return _explained(say)


def fitting_kv_cache(config: PreTrainedConfig, length: int, batch_size: int = 1) -> str:
    """The fastest KV cache with which `length` tokens can be read in what the GPU has free now, the model being loaded:
    default (16-bit), quantized (4-bit) or offloaded. On a CPU always default."""
    if not torch.cuda.is_available():
        return "default"
    free = torch.cuda.mem_get_info()[0] / memory.GIB
    for kind in ("default", "quantized"):
        terms = memory.estimate_evaluation(config, length=length, kv_cache=kind)
        needed = sum(terms[name] for name in ("kv_cache", "attention", "activations", "logits"))
        if needed * batch_size <= free and (kind == "default" or is_hqq_available()):
            return kind
    return "offloaded"
