"""Whether this machine can train a recipe: its plan, what is refused at once, and out of memory in words."""

from __future__ import annotations

import logging
import os
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.training_args import ParallelMode

from .. import rope
from ..errors import about
from ..model.base import embedded_config, resolve_base
from ..plan import advice, fit, memory
from .config import CREAMConfig
from .recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

CPU_PARAMETERS = 1e9
"""Above this many parameters, training on a CPU takes weeks, and the recipe is refused there."""


def base_config(recipe: Recipe) -> PreTrainedConfig:
    """The base's unscaled config: the embedded copy where there is one, else the one beside the weights."""
    name = recipe.model.model_name_or_path
    if name is None:
        raise RecipeError("model_name_or_path is missing: a Hub id or a local folder")
    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists():
        hint = "; ~ is not read here, write the whole path" if name.startswith("~") else ""
        raise RecipeError(f"model_name_or_path={name}: no such folder{hint}")
    embedded = embedded_config(name)
    if embedded is not None:
        return embedded
    with about(name):
        return AutoConfig.from_pretrained(
            resolve_base(name), revision=recipe.model.model_revision, trust_remote_code=recipe.run.trust_remote_code
        )


def check_machine(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse at once what this machine cannot train."""
    recipe.run.resolve(rope.pretrained_window(config))
    rope.scaled_config(config, recipe.run.target_length, recipe.run.rope_scaling_type)
    try:
        parameters, planned = memory.parameter_count(config), plan_of(recipe, config)
    except ValueError as error:
        logger.warning("memory is not planned: %s", error)
        return
    gib = fit.allowed_gib()
    if gib is None:
        if parameters > CPU_PARAMETERS and not recipe.run.use_cpu:
            raise RecipeError(
                f"{recipe.model.model_name_or_path} has {parameters / 1e9:.1f} billion parameters and this machine has "
                "no CUDA GPU: `make demo` shows the method on a CPU, `cream-peft plan` shows which GPU the recipe fits"
            )
        return
    for part in ("terms", "validation"):
        # The context exists by now.
        if planned[part] and planned[part]["total"] - planned[part]["cuda_context"] > gib:
            line = shortage(recipe, config, gib, part == "validation")
            raise RecipeError(f"this recipe does not fit: {line}; `cream-peft plan` shows every term")


def refuse_separate_runs(run: CREAMConfig) -> None:
    """Refuse processes that a launcher started together and that would train apart, all into one output_dir."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and run.parallel_mode in (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED):
        raise RecipeError(
            f"{processes} processes were started (WORLD_SIZE) and would train apart, each for itself: on CPUs add "
            "--use_cpu true, on GPUs give each process one"
        )


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
    return advice.plan(
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
        return advice.shortage(
            terms, gib, lambda gib: advice.to_set(advice.advise_validation(config, gib, **validation))
        )
    terms = memory.estimate(config, **training)
    return advice.shortage(terms, gib, lambda gib: advice.to_set(advice.advise(config, gib, **training)))


def memory_explained(recipe: Recipe, config: PreTrainedConfig) -> AbstractContextManager[None]:
    """While training: an error of memory says what was planned, and what to change in the recipe."""

    def say(error: Exception) -> str:
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        validating = "evaluation_loop" in frames
        where = " while the loss of held-out documents was computed" if validating else ""
        line = shortage(recipe, config, fit.allowed_gib(), validating)
        return f"{where}: {line}; `cream-peft plan` shows every term"

    return fit.explained(say)
