"""From a parsed recipe to a finished adapter: one linear story."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedConfig, ProgressCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import get_peft_config

from ..locks import locked
from ..model.adapter import Adapter
from ..model.base import base_options, load_base
from ..model.record import AdapterError, Record, peak_gib
from ..model.tokenizer import load_tokenizer
from ..plan.advice import held_out_flops, training_flops
from ..publish.push import PushError
from ..rope import pretrained_window
from ..terminal import did_you_mean, is_first_process
from ..tiny import TINY_ID
from .checkpoints import Checkpoint, difference, find_checkpoint, refuse_anew, wants_newest
from .collator import MIXED
from .data import load_data
from .distillation import refuse_distillation
from .machine import base_config, check_machine, find_adapter, memory_explained, memory_settings, refuse_processes
from .output import refuse_output
from .recipe import Recipe, RecipeError
from .templates import set_chat_template
from .tokenised import lengths_of, summary_of
from .trainer import CREAMTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What came of a training run."""

    output_dir: str
    steps: int
    """Of the whole run; of these `resumed_step` were there when it was resumed."""
    loss: float | None
    """Mean over the steps of this run, in nats per token; None if it was finished already."""
    seconds: float
    peak_gib: float | None
    """None without a GPU."""
    redrawn: int
    """Draws thrown away because they held no label."""
    unlabelled: int
    """Examples that went out without any label."""
    kind: str = "adapter"
    """Or model, if every weight was trained."""
    resumed_step: int = 0
    base: str = ""
    """The base with the same RoPE, as `cream-peft evaluate --compare` takes it: what the training brought is told from
    what the scaling did."""


class _ProgressBar(ProgressCallback):
    """The progress bar with the loss in it, instead of a dictionary printed over it; a line where bars are disabled."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            # Shown from the start, unlike the libraries' bars: the first step of a 7B takes a while.
            self.training_bar.delay = 0
            self.training_bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            formats = {"loss": ".3f", "distillation_loss": ".3f", "eval_loss": ".3f", "learning_rate": ".2e"}
            told = {key: format(float(logs[key]), style) for key, style in formats.items() if key in logs}
            if not self.training_bar.disable:
                self.training_bar.set_postfix(told)
            elif told:
                values = ", ".join(f"{key} {value}" for key, value in told.items())
                logger.info(f"step {state.global_step:,} of {state.max_steps:,}: {values}")


def _load_tokenizer(recipe: Recipe, name: str, adapter: Adapter | None) -> Any:
    run, template = recipe.run, recipe.run.chat_template_path
    revision = recipe.model.model_revision
    if adapter:
        tokenizer = adapter.tokenizer()
    else:
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=run.trust_remote_code)
    if template:
        set_chat_template(tokenizer, template)
    return tokenizer


def _locked_output(folder: Path) -> ExitStack:
    """Before anything is downloaded or trained, find out whether the adapter can be written, and that nobody else is
    training there. Until the stack is closed nobody can."""
    stack = ExitStack()
    refusal = f"output_dir={folder}: another run is training there: wait until it has ended, or choose another"
    try:
        if is_first_process():
            stack.enter_context(locked(folder / ".lock", refusal))
    except OSError as error:
        raise RecipeError(f"output_dir={folder} cannot be written to ({error.strerror}): choose another") from error
    return stack


def _check_reporting(recipe: Recipe) -> None:
    """Refuse reporters that are not installed, and an evaluation of nothing, before anything is loaded."""
    run, data = recipe.run, recipe.data
    if run.disable_tqdm:
        disable_progress_bars()
    for name in run.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise RecipeError(
                f"report_to={name!r} is unknown{did_you_mean(name, known)}: use {', '.join(known)} or none"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise RecipeError(f"report_to={name}: {name} is not installed: pip install {name}, or use none") from error
    held_out = data.dataset_test_split or data.held_out_documents
    if run.evaluates and not held_out:
        strategy = getattr(run.eval_strategy, "value", run.eval_strategy)
        asked = "eval_on_start=true" if strategy == "no" else f"eval_strategy={strategy}"
        raise RecipeError(
            f"{asked} has nothing to evaluate on: set held_out_documents to a number of documents, or "
            "dataset_test_split to a split or a file"
        )


def run_recipe(recipe: Recipe) -> RunSummary:
    """Train the recipe's adapter and save it complete in output_dir; nothing is done where that is done already."""
    if recipe.run.model_init_kwargs:
        raise RecipeError("model_init_kwargs is for Python: a recipe has dtype, attn_implementation, model_revision")
    _check_reporting(recipe)
    adapter, folder, run = find_adapter(recipe), Path(str(recipe.run.output_dir)), recipe.run
    refuse_output(folder, recipe.model.model_name_or_path)
    config = adapter.base_config if adapter else base_config(recipe)
    run.resolve(pretrained_window(config))
    refuse_distillation(run, None if adapter else get_peft_config(recipe.model))
    check_machine(recipe, config)
    refuse_processes(run)
    with _locked_output(folder), memory_explained(recipe, config):
        checkpoint = find_checkpoint(run.resume_from_checkpoint, folder, run.save_only_model)
        if checkpoint and 0 < run.max_steps < checkpoint.step:
            raise RecipeError(
                f"max_steps={run.max_steps}, and {checkpoint.folder} has {checkpoint.step:,} steps already: raise it, "
                "or name an earlier checkpoint in resume_from_checkpoint"
            )
        trainer = _make_trainer(recipe, config, adapter)
        trainer.run_id = checkpoint.record.run_id if checkpoint else None
        # With save_total_limit: 1 the best checkpoint may be left alone, of a step before the last.
        is_known = checkpoint is None or checkpoint.step < run.max_steps
        is_asked = wants_newest(run.resume_from_checkpoint) and run.max_steps > 0
        if is_known and is_asked and _is_saved(trainer, run.max_steps):
            return _summary(trainer, run.max_steps)
        if checkpoint is None:
            refuse_anew(run.resume_from_checkpoint, folder)
        _announce(trainer, recipe, config, checkpoint.step if checkpoint else 0)
        return _train_and_save(trainer, checkpoint)


def _make_trainer(recipe: Recipe, config: PreTrainedConfig, adapter: Adapter | None) -> CREAMTrainer:
    run, name = recipe.run, str(recipe.model.model_name_or_path)
    tokenizer = _load_tokenizer(recipe, name, adapter)
    documents, held_out = load_data(recipe, tokenizer, config.get_text_config().vocab_size)
    options = base_options(recipe.model, run.use_cpu)
    if adapter:
        model, _ = adapter.load(is_trainable=True, **options)
    else:
        model = load_base(
            name,
            trust_remote_code=run.trust_remote_code,
            revision=recipe.model.model_revision,
            **options,
        )
    trainer = CREAMTrainer(
        model=model,
        args=run,
        train_dataset=documents,
        eval_dataset=held_out if run.evaluates else None,
        processing_class=tokenizer,
        peft_config=None if adapter else get_peft_config(recipe.model),
    )
    trainer.recipe = recipe.settings()
    if not run.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_ProgressBar)
    if recipe.is_embedded and recipe.data.dataset_name != TINY_ID:
        logger.info("without --config, what is not given is as in the recipe of the embedded model")
    if "messages" in (documents.column_names or ()) and not run.assistant_only_loss:
        logger.info("the loss is on every token of a conversation; assistant_only_loss: true trains the answers alone")
    if held_out is not None and not run.evaluates:
        logger.warning("eval_strategy is no, so the documents kept for evaluation are not used: set it, or keep none")
    return trainer


def _announce(trainer: CREAMTrainer, recipe: Recipe, config: PreTrainedConfig, done: int) -> None:
    """Say what is about to be trained after `done` steps, on how much, and what the held-out loss adds."""
    run, documents, further = trainer.args, trainer.train_dataset, recipe.model.adapter_name_or_path
    length = f"{run.max_steps:,} steps" if run.max_steps > 0 else f"{run.num_train_epochs:g} epochs"
    own = run.strategy_options() | {name: getattr(run, name) for name in (*MIXED, "distillation_weight")}
    told = ", ".join(f"{name} {value}" for name, value in own.items() if value)
    what = f"the adapter {further} further, on {trainer.base_model_name()}," if further else trainer.base_model_name()
    so_far = f", of which {done:,} are done" if done else ""
    logger.info(
        f"training {what} for {length}{so_far}: {run.position_strategy} positions{told and f' ({told})'}, "
        f"{run.context_length:,} tokens per example for a context of {run.target_length:,}, "
        f"RoPE scaling {run.rope_scaling_type or 'none'}, learning rate {run.learning_rate:g}"
    )
    if not isinstance(documents, Dataset):
        logger.info("on a stream of documents")
        return
    each = run.train_batch_size * run.gradient_accumulation_steps * run.world_size
    examples = run.max_steps * each if run.max_steps > 0 else run.num_train_epochs * len(documents)
    left = max(0.0, examples - done * each)
    if not left:
        return
    lengths, window = lengths_of(documents), run.context_length or 0
    fed = left * np.minimum(lengths, window).mean()
    logger.info(f"on {summary_of(lengths, window, fed)}, {left / len(documents):.3g} epochs")
    if isinstance(trainer.eval_dataset, Dataset):
        training, _ = memory_settings(recipe)
        trained = fed * sum(training_flops(config, training).values())
        logger.info(_held_out_cost(trainer, config, left / each, left / len(documents), trained))


def _held_out_cost(trainer: CREAMTrainer, config: PreTrainedConfig, steps: float, epochs: float, trained: float) -> str:
    """How often how many held-out tokens are read, and how much longer that makes a run of so many steps, which are so
    many epochs and take `trained` floating-point operations."""
    run, lengths = trainer.args, lengths_of(cast(Dataset, trainer.eval_dataset))
    lengths = np.minimum(lengths, trainer.lengths.eval_length)
    steps, every = max(1, round(steps)), run.eval_steps or 1
    # After the last step too.
    times = {
        "steps": ceil(steps / ceil(every if every >= 1 else every * steps)),
        "epoch": ceil(epochs),
    }
    read = times.get(run.eval_strategy, 0) + run.eval_on_start
    share = read * sum(length * held_out_flops(config, length) for length in lengths.tolist()) / trained
    times_read = f"{read:,} time{'s' * (read != 1)}"
    return (
        f"held out: {len(lengths):,} documents of {lengths.sum():,} tokens, read {times_read}, which by plan takes "
        f"{share:.0%} of the training's time on top"
    )


def _is_saved(trainer: CREAMTrainer, steps: int) -> bool:
    """Whether output_dir holds the whole adapter of this run, of so many steps or more."""
    folder = Path(str(trainer.args.output_dir))
    try:
        record = Record.read(folder, str(folder))
    except AdapterError:
        return False
    # Without checkpoints, the settings alone say whether it is this run's.
    is_own = trainer.run_id in (None, record.run_id) and difference(folder, record, trainer) is None
    return is_own and record.steps >= steps and record.is_of(folder) and any(folder.glob("*.safetensors"))


def _train_and_save(trainer: CREAMTrainer, checkpoint: Checkpoint | None) -> RunSummary:
    output_dir = str(trainer.args.output_dir)
    output = trainer.train(checkpoint or False)
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
        kind="model" if trainer.describe().full else "adapter",
        resumed_step=trainer.resumed_step,
        base=_scaled_base(trainer),
    )


def _scaled_base(trainer: CREAMTrainer) -> str:
    name, scaling = trainer.unwrapped_config()._name_or_path, trainer.args.rope_scaling_type
    # Within the window a scaling changes nothing, and evaluate refuses it.
    is_scaled = scaling and trainer.lengths.target_length > trainer.pretrained_window
    return f"{name}+{scaling}" if is_scaled else name
