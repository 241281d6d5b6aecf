"""From a parsed recipe to a finished adapter: one linear story."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from ..locks import locked
from ..model.base import base_options, load_base, load_tokenizer, lora_config
from ..model.record import AdapterError, Record, peak_gib
from ..publish.push import PushError
from ..rope import pretrained_window
from ..terminal import is_first_process
from .checkpoints import Checkpoint, checkpoint_folders, difference, find_checkpoint, wants_newest
from .config import Lengths
from .data import DataError, load_documents, prepare_columns
from .machine import base_config, check_machine, memory_explained, refuse_separate_runs
from .recipe import Recipe, RecipeError
from .trainer import CREAMTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What came of a training run."""

    output_dir: str
    steps: int
    loss: float | None
    """Mean over the steps of this run, in nats per token; None if it was finished already."""
    seconds: float
    peak_gib: float | None
    """None without a GPU."""
    redrawn: int
    """Draws thrown away because they held no label."""
    unlabelled: int
    """Examples that went out without any label."""


class _ProgressBar(ProgressCallback):
    """The progress bar with the loss in it, instead of a dictionary printed over it."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            # Shown from the start, unlike the libraries' bars: the first step of a 7B takes a while.
            self.training_bar.delay = 0
            self.training_bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            formats = {"loss": ".3f", "eval_loss": ".3f", "learning_rate": ".2e"}
            self.training_bar.set_postfix(
                {key: format(float(logs[key]), style) for key, style in formats.items() if key in logs}
            )


def _load_tokenizer(recipe: Recipe, name: str) -> Any:
    run, template = recipe.run, recipe.run.chat_template_path
    revision = recipe.model.model_revision
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=run.trust_remote_code)
    if template:
        # TRL also takes a model's name here, and then resizes the embeddings.
        if not Path(template).is_file() or Path(template).suffix not in (".jinja", ".j2"):
            raise RecipeError(f"chat_template_path={template}: no such .jinja file")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def load_data(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    """(training documents, evaluation documents or None), with the columns of their format only."""
    data, run, name = recipe.data, recipe.run, recipe.data.dataset_name
    if name is None:
        raise RecipeError("dataset_name is missing: a Hub id, a local folder or a file")
    options = {"streaming": data.dataset_streaming, "name": data.dataset_config, "revision": data.dataset_revision}
    options = {key: value for key, value in options.items() if value}

    def load(split: str) -> Any:
        documents = load_documents(name, split, **options)
        if data.max_documents:
            documents = documents.take(data.max_documents)
        documents = prepare_columns(documents, name, tokenizer, run.dataset_text_field)
        is_text = not {"input_ids", "messages"} & set(documents.column_names or ())
        if is_text and not (tokenizer.eos_token or run.eos_token):
            raise DataError(
                f"{name} holds text and the tokenizer has no end token to close it with: set eos_token to one of its "
                "tokens, or give token ids in an input_ids column"
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


@contextmanager
def _locked_output(folder: Path) -> Generator[None]:
    """Before anything is downloaded or trained, find out whether the adapter can be written, and that nobody else is
    training there."""
    if not is_first_process():
        yield
        return
    with ExitStack() as stack:
        refusal = f"output_dir={folder}: another run is training there: wait until it has ended, or choose another"
        try:
            stack.enter_context(locked(folder / ".lock", refusal))
        except OSError as error:
            raise RecipeError(f"output_dir={folder} cannot be written to ({error.strerror}): choose another") from error
        yield


def run_recipe(recipe: Recipe) -> RunSummary:
    """Train the recipe's adapter and save it complete in output_dir; nothing is done where that is done already."""
    if recipe.run.model_init_kwargs:
        raise RecipeError("model_init_kwargs is for Python: a recipe has dtype, attn_implementation, model_revision")
    config, folder, run = base_config(recipe), Path(str(recipe.run.output_dir)), recipe.run
    lengths = run.resolve(pretrained_window(config))
    check_machine(recipe, config)
    refuse_separate_runs(run)
    with _locked_output(folder), memory_explained(recipe, config):
        checkpoint = find_checkpoint(run.resume_from_checkpoint, folder, run.save_only_model)
        trainer = _make_trainer(recipe, lengths)
        if checkpoint is None and (checkpoint_folders(folder) or (folder / "cream.json").exists()):
            if wants_newest(run.resume_from_checkpoint) and run.max_steps > 0 and _is_saved(trainer, run.max_steps):
                return _summary(trainer, run.max_steps)
            logger.warning(
                "%s holds an earlier run, which is overwritten; --resume_from_checkpoint true resumes it", folder
            )
        return _train_and_save(trainer, checkpoint)


def _make_trainer(recipe: Recipe, lengths: Lengths) -> CREAMTrainer:
    run, name = recipe.run, str(recipe.model.model_name_or_path)
    tokenizer = _load_tokenizer(recipe, name)
    documents, held_out = load_data(recipe, tokenizer)
    model = load_base(
        name,
        target_length=lengths.target_length,
        rope_scaling_type=run.rope_scaling_type,
        trust_remote_code=run.trust_remote_code,
        revision=recipe.model.model_revision,
        **base_options(recipe.model),
    )
    trainer = CREAMTrainer(
        model=model,
        args=run,
        train_dataset=documents,
        eval_dataset=held_out if run.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model),
    )
    trainer.recipe = recipe.settings()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_ProgressBar)
    count = f"{len(documents):,} documents" if isinstance(documents, Dataset) else "a stream of documents"
    length = f"{run.max_steps:,} steps" if run.max_steps > 0 else f"{run.num_train_epochs:g} epochs"
    logger.info(
        f"training {trainer.base_model_name()} for {length} on {count}: {run.position_strategy} positions, "
        f"{lengths.context_length:,} tokens per example for a context of {lengths.target_length:,}, "
        f"RoPE scaling {run.rope_scaling_type or 'none'}"
    )
    return trainer


def _is_saved(trainer: CREAMTrainer, steps: int) -> bool:
    """Whether output_dir holds the whole adapter of this run, of so many steps or more."""
    folder = Path(str(trainer.args.output_dir))
    try:
        record = Record.read(folder, str(folder))
    except AdapterError:
        return False
    # Without checkpoints, the settings say whether it is this run's.
    is_own = record.run_id == trainer.run_id if trainer.run_id else difference(folder, record, trainer) is None
    return is_own and record.steps >= steps and record.is_of(folder) and any(folder.glob("*.safetensors"))


def _train_and_save(trainer: CREAMTrainer, checkpoint: Checkpoint | None) -> RunSummary:
    output_dir = str(trainer.args.output_dir)
    output = trainer.train(str(checkpoint.folder) if checkpoint else None)
    if checkpoint and output.global_step == checkpoint.step and _is_saved(trainer, checkpoint.step):
        return _summary(trainer, checkpoint.step)
    try:
        trainer.save_model()
    except PushError as error:
        raise PushError(
            f"the adapter is saved in {output_dir}, but not published: {error}. "
            f"`cream-peft push --adapter {output_dir} --repo {trainer.hub_model_id}` publishes it"
        ) from error
    if trainer.base_is_local():
        logger.warning("the base is a local folder: before sharing the adapter set base_model_id, its Hub id")
    return _summary(trainer, output.global_step, output.training_loss)


def _summary(trainer: CREAMTrainer, steps: int, loss: float | None = None) -> RunSummary:
    collator: Any = trainer.data_collator
    if trainer.state.global_step == trainer.resumed_step:
        loss = None
        logger.info(f"finished at step {steps:,} of {trainer.state.max_steps or steps:,}: nothing is left to train")
    return RunSummary(
        output_dir=str(trainer.args.output_dir),
        steps=steps,
        loss=loss,
        seconds=trainer.seconds or 0.0,
        peak_gib=peak_gib(),
        redrawn=collator.redrawn(),
        unlabelled=collator.unlabelled(),
    )
