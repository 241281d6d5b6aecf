"""From a parsed recipe to a finished adapter: one linear story."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig, PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from .. import rope
from ..errors import about
from ..model.base import base_options, embedded_config, load_base, load_tokenizer, lora_config, resolve_base
from ..model.record import peak_gib
from ..plan import advice, fit, memory
from ..publish.push import PushError
from .config import CREAMConfig
from .data import DataError, load_documents, prepare_columns
from .recipe import Recipe, RecipeError
from .trainer import CREAMTrainer

logger = logging.getLogger(__name__)

CPU_PARAMETERS = 1e9
"""Above this many parameters, training on a CPU takes weeks, and the recipe is refused there."""


class _ProgressBar(ProgressCallback):
    """The progress bar with the loss in it, instead of a dictionary printed over it."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            # Shown from the start, unlike the libraries' bars (cli._quiet): the first step of a 7B takes a while.
            self.training_bar.delay = 0
            self.training_bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
            self.training_bar.set_postfix(
                {key: f"{float(value):.2e}" if key == "learning_rate" else f"{float(value):.3f}"
                 for key, value in shown.items()}
            )  # fmt: skip


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


def _check_machine(recipe: Recipe, config: PreTrainedConfig) -> None:
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


def _refuse_separate_runs(run: CREAMConfig) -> None:
    """Refuse processes that a launcher started together and that would train apart, all into one output_dir."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and run.parallel_mode in (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED):
        raise RecipeError(
            f"{processes} processes were started (WORLD_SIZE) and would train apart, each for itself: on CPUs add "
            "--use_cpu true, on GPUs give each process one"
        )


def _load_tokenizer(recipe: Recipe) -> Any:
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.run.trust_remote_code,
    )
    template = recipe.run.chat_template_path
    if template:
        # TRL also takes a model's name here, and then resizes the embeddings.
        if not Path(template).is_file() or Path(template).suffix not in (".jinja", ".j2"):
            raise RecipeError(f"chat_template_path={template}: no such .jinja file")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def load_data(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    """(training documents, evaluation documents or None), with the columns of their format only."""
    data, run = recipe.data, recipe.run
    if data.dataset_name is None:
        raise RecipeError("dataset_name is missing: a Hub id, a local folder or a file")
    options = {"streaming": data.dataset_streaming, "name": data.dataset_config, "revision": data.dataset_revision}
    options = {key: value for key, value in options.items() if value}

    def load(split: str) -> Any:
        documents = load_documents(data.dataset_name, split, **options)
        if data.max_documents:
            documents = documents.take(data.max_documents)
        documents = prepare_columns(documents, data.dataset_name, tokenizer, run.dataset_text_field)
        is_text = not {"input_ids", "messages"} & set(documents.column_names or ())
        if is_text and not (tokenizer.eos_token or run.eos_token):
            raise DataError(
                f"{data.dataset_name} holds text and the tokenizer has no end token to close it with: set eos_token to "
                "one of its tokens, or give token ids in an input_ids column"
            )
        return documents

    documents = load(data.dataset_train_split)
    if data.dataset_test_split:
        return documents, load(data.dataset_test_split)
    held_out = data.held_out_documents
    if not held_out:
        return documents, None
    if not isinstance(documents, Dataset):
        return documents.skip(held_out), documents.take(held_out)
    if held_out >= len(documents):
        raise DataError(f"held_out_documents={held_out} leaves nothing of {len(documents)} documents to train on")
    last = len(documents) - held_out
    return documents.select(range(last)), documents.select(range(last, len(documents)))


def _load_model(recipe: Recipe) -> Any:
    return load_base(
        recipe.model.model_name_or_path,
        target_length=recipe.run.target_length,
        rope_scaling_type=recipe.run.rope_scaling_type,
        trust_remote_code=recipe.run.trust_remote_code,
        revision=recipe.model.model_revision,
        **base_options(recipe.model),
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint-N in `folder` that was written to its end; trainer_state.json comes last.

    By time, as transformers deletes them: a run that was begun afresh is not gone on with at the one before it.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            logger.warning("%s was cut off while it was written: left aside", path)
            continue
        return path
    return None


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint` names a folder, or is true for the newest."""
    wanted = recipe.run.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        found = newest_checkpoint(Path(recipe.run.output_dir))
        afresh = f"no checkpoint in {recipe.run.output_dir} yet: starting afresh"
        logger.info(f"resuming from {found}" if found else afresh)
        return found and str(found)
    if not Path(wanted).is_dir():
        raise RecipeError(f"resume_from_checkpoint={wanted}: no such folder")
    return str(wanted)


def _make_output_dir(folder: Path, resuming: bool) -> None:
    """Before anything is downloaded or trained, find out whether the adapter can be written."""
    if not resuming and (newest_checkpoint(folder) or (folder / "cream.json").exists()):
        logger.warning("%s holds an earlier run, which is overwritten; --resume_from_checkpoint true goes on", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir={folder} cannot be made ({error.strerror}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"output_dir={folder} cannot be written to: choose another")


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's adapter, save it complete in output_dir, and return a summary of the run."""
    if recipe.run.model_init_kwargs:
        raise RecipeError("model_init_kwargs is for Python: a recipe has dtype, attn_implementation, model_revision")
    config = base_config(recipe)
    _check_machine(recipe, config)
    _refuse_separate_runs(recipe.run)
    checkpoint = _checkpoint(recipe)
    _make_output_dir(Path(recipe.run.output_dir), checkpoint is not None)
    with memory_explained(recipe, config):
        return _train(recipe, checkpoint)


def _train(recipe: Recipe, checkpoint: str | None) -> dict[str, Any]:
    """What `run_recipe` does once the recipe is checked."""
    tokenizer = _load_tokenizer(recipe)
    documents, held_out = load_data(recipe, tokenizer)
    run = recipe.run
    trainer = CREAMTrainer(
        model=_load_model(recipe),
        args=run,
        train_dataset=documents,
        eval_dataset=held_out if run.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model),
    )
    trainer.recipe = recipe.settings()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressBar)
    logger.info(
        "%s positions, %s tokens per example for a context of %s, RoPE scaling %s",
        run.position_strategy, f"{run.context_length:,}", f"{run.target_length:,}", run.rope_scaling_type or "none",
    )  # fmt: skip
    start = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    try:
        trainer.save_model()
    except PushError as error:
        raise PushError(
            f"the adapter is saved in {run.output_dir}, but not published: {error}. "
            f"`cream-peft push --adapter {run.output_dir} --repo {trainer.hub_model_id}` publishes it"
        ) from error
    if trainer.base_is_local():
        logger.warning("the base is a local folder: before sharing the adapter set base_model_id, its Hub id")
    counts = trainer.describe()["positions"]
    return {
        "output_dir": run.output_dir,
        "steps": output.global_step,
        "loss": output.training_loss,
        "seconds": seconds,
        "peak_gib": peak_gib(),
        "redrawn": counts["redrawn"],
        "unlabelled": counts["unlabelled"],
    }


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
