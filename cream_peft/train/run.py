"""From a parsed recipe to a finished adapter: one linear story."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from ..model.base import base_options, load_base, load_tokenizer, lora_config
from ..model.record import peak_gib
from ..publish.push import PushError
from .data import DataError, load_documents, prepare_columns
from .machine import base_config, check_machine, memory_explained, refuse_separate_runs
from .recipe import Recipe, RecipeError
from .trainer import CREAMTrainer

logger = logging.getLogger(__name__)


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
    check_machine(recipe, config)
    refuse_separate_runs(recipe.run)
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
    counts = trainer.describe().positions
    return {
        "output_dir": run.output_dir,
        "steps": output.global_step,
        "loss": output.training_loss,
        "seconds": seconds,
        "peak_gib": peak_gib(),
        "redrawn": counts.redrawn,
        "unlabelled": counts.unlabelled,
    }
