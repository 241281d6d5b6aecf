"""Whether this machine can train a recipe: its plan, what is refused at once, and out of memory in words."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from transformers import PreTrainedConfig
from transformers.training_args import ParallelMode

from .. import rope
from ..errors import about, missing_folder
from ..model.adapter import Adapter, open_adapter
from ..model.base import embedded_config, read_config
from ..plan import advice, fit, memory
from ..plan.memory import ATTENTION, Training, Validation
from .config import CREAMConfig
from .output import is_folder
from .recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

CPU_PARAMETERS = 1e9
"""Above this many parameters, training on a CPU takes weeks, and the recipe is refused there."""


def find_adapter(recipe: Recipe) -> Adapter | None:
    """The adapter that the recipe trains further, opened, its base and settings put into the recipe; None without one.

    Raises:
        RecipeError: a key that contradicts the adapter.
    """
    run, model, name = recipe.run, recipe.model, recipe.model.adapter_name_or_path
    if name is None:
        return None
    if is_folder(name, Path(str(run.output_dir))):
        raise RecipeError(
            f"output_dir={run.output_dir} is adapter_name_or_path, which would be overwritten: choose another"
        )
    own = [key for key in recipe.keys if key.startswith("lora_") or key in ("use_rslora", "use_dora", "model_revision")]
    if own:
        raise RecipeError(f"{own[0]} cannot go with adapter_name_or_path={name}, which brings its own: leave it out")
    base = model.model_name_or_path if "model_name_or_path" in recipe.keys else None
    adapter = open_adapter(name, base_model=base, trust_remote_code=run.trust_remote_code)
    record, lora = adapter.record, cast(LoraConfig, adapter.peft_config)
    model.model_name_or_path = adapter.base_name
    model.model_revision = record.base_revision or model.model_revision
    model.lora_r, model.lora_alpha, model.lora_dropout = lora.r, lora.lora_alpha, lora.lora_dropout
    modules = lora.target_modules
    model.lora_target_modules = sorted(modules) if isinstance(modules, set) else modules  # ty: ignore[invalid-assignment]
    if "rope_scaling_type" not in recipe.keys:
        run.rope_scaling_type = record.rope_scaling_type
    if "target_length" not in recipe.keys:
        run.target_length = record.target_length
    return adapter


def base_config(recipe: Recipe) -> PreTrainedConfig:
    """The base's unscaled config: the embedded copy where there is one, else the one beside the weights."""
    adapter = find_adapter(recipe)
    if adapter:
        return adapter.base_config
    name = recipe.model.model_name_or_path
    if name is None:
        raise RecipeError("model_name_or_path is missing: a Hub id or a local folder")
    if missing := missing_folder(name):
        raise RecipeError(f"model_name_or_path={name}: {missing}")
    embedded = embedded_config(name)
    if embedded is not None:
        return embedded
    with about(name):
        return read_config(name, revision=recipe.model.model_revision, trust_remote_code=recipe.run.trust_remote_code)


def _allowed_gib(recipe: Recipe) -> float | None:
    return None if recipe.run.use_cpu else fit.allowed_gib()


def check_machine(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse at once a base that cannot be scaled as asked (lengths resolved), and what this machine cannot train."""
    rope.scaled_config(config, recipe.run.target_length or 0, recipe.run.rope_scaling_type)
    gib = _allowed_gib(recipe)
    if recipe.run.sharded_by:
        logger.warning("memory is not planned: the plan is of one GPU, and each process has a part of the model here")
        return
    try:
        parameters, planned = memory.parameter_count(config), memory_settings(recipe) if gib is not None else ()
        # The context exists by now.
        room = (gib or 0) + memory.CUDA_CONTEXT_GIB
        short = [settings for settings in planned if settings and settings.terms(config)["total"] > room]
    except ValueError as error:
        logger.warning("memory is not planned: %s", error)
        return
    if gib is not None and (more := not_planned(recipe)):
        logger.warning("not planned, and takes more memory: %s", ", ".join(more))
    if short:
        line = advice.out_of_memory_note(config, short[0], gib)
        raise RecipeError(f"this recipe does not fit: {line}; `cream-peft plan` shows every term")
    if gib is None and parameters > CPU_PARAMETERS and not recipe.run.use_cpu:
        raise RecipeError(
            f"{recipe.model.model_name_or_path} has {parameters / 1e9:.1f} billion parameters and this machine has "
            "no CUDA GPU: `make demo` shows the method on a CPU, `cream-peft plan` shows which GPU the recipe fits"
        )


def refuse_processes(run: CREAMConfig) -> None:
    """Refuse processes that a launcher started together and that would train apart, all into one output_dir, and one
    process that would spread over several GPUs, which TRL refuses once the model is loaded."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and run.parallel_mode in (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED):
        raise RecipeError(
            f"{processes} processes were started (WORLD_SIZE) and would train apart, each for itself: on CPUs add "
            "--use_cpu true, on GPUs give each process one"
        )
    if run.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise RecipeError(
            f"{run.n_gpu} GPUs are there for one process: choose one with CUDA_VISIBLE_DEVICES=0, or start a process "
            "for each, with recipes/accelerate/ddp.yaml"
        )


def memory_settings(recipe: Recipe) -> tuple[Training, Validation | None]:
    """What the plan of training depends on, and that of the held-out loss where the run computes one; the recipe's
    lengths are resolved."""
    run, model = recipe.run, recipe.model
    shared: dict[str, Any] = {
        "use_peft": model.use_peft,
        "dtype": model.dtype if model.dtype in ("bfloat16", "float16") else "float32",
        "load_in_4bit": model.load_in_4bit,
        "lora_r": model.lora_r,
        "target_modules": model.lora_target_modules or ATTENTION,
        "optim": str(getattr(run.optim, "value", run.optim)),
    }
    training = Training(
        context_length=run.context_length or 0,
        per_device_train_batch_size=run.per_device_train_batch_size,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        max_steps=run.max_steps if run.max_steps > 0 else None,
        distillation_length=run.distillation_length or 0,
        lora_dropout=model.lora_dropout,
        gradient_checkpointing=bool(run.gradient_checkpointing),
        activation_offloading=bool(run.activation_offloading),
        **shared,
    )
    if not run.evaluates:
        return training, None
    batch = run.per_device_eval_batch_size
    return training, Validation(eval_length=run.eval_length or 0, per_device_eval_batch_size=batch, **shared)


def not_planned(recipe: Recipe) -> list[str]:
    """The keys of the recipe that take memory of which the plan knows nothing."""
    model = recipe.model
    names = ("lora_modules_to_save", "lora_target_parameters", "use_dora") if model.use_peft else ()
    keys = [name for name in names if getattr(model, name)]
    keys += ["attn_implementation: eager"] if model.attn_implementation == "eager" else []
    keys += ["dtype: float32"] if model.use_peft and model.dtype == "float32" else []
    return keys


def plan_recipe(recipe: Recipe, config: PreTrainedConfig, gpus: Mapping[str, float] | None = None) -> advice.Plan:
    """Peak memory and hours of the recipe on this base, see `advice.plan_gpus`.

    Raises:
        RopeError: a base that training would refuse too.
    """
    lengths = recipe.run.resolve(rope.pretrained_window(config))
    rope.scaled_config(config, lengths.target_length, recipe.run.rope_scaling_type)
    planned = advice.plan_gpus(config, *memory_settings(recipe), recipe.run.target_length, gpus)
    said = rope.doubts(config, lengths.target_length, recipe.run.rope_scaling_type)
    if more := not_planned(recipe):
        said.append(f"not planned, and takes more: {', '.join(more)}")
    return replace(planned, advice=[*planned.advice, *said])


def memory_explained(recipe: Recipe, config: PreTrainedConfig) -> AbstractContextManager[None]:
    """While training: an out-of-memory error says what was planned, and what to change in the recipe."""

    def say(error: Exception) -> str:
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        training, validation = memory_settings(recipe)
        held_out = validation if "evaluation_loop" in frames else None
        where = " while the loss of held-out documents was computed" if held_out else ""
        line = advice.out_of_memory_note(config, held_out or training, _allowed_gib(recipe))
        return f"{where}: {line}; `cream-peft plan` shows every term"

    # The plan is of one process that has all of the model.
    return nullcontext() if recipe.run.sharded_by else fit.explained(say)
