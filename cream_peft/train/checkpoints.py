"""Checkpoints that are whole and of this run, and adapters that are saved whole or not at all."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from torch.optim.lr_scheduler import LambdaLR

from ..model.fingerprint import differing
from ..model.record import FILE, MERGED_FILES, REQUIRED_FILES, Positions, Record, is_adapter
from ..positions import POSITION_STRATEGIES, options_of
from .collator import MIXED, CREAMDataCollator
from .saving import CHOICE_SETTINGS, FIXED_SETTINGS, KEPT_SETTINGS, SavingTrainer

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
TRAINING_FILES = ["optimizer*", "scheduler.pt", "rng_state*.pth"]
FREE_FIELDS = ("base_model_name_or_path", "revision", "inference_mode", "init_lora_weights")
FREE_FIELDS += ("auto_mapping", "peft_version", "task_type")
"""Of adapter_config.json: what may differ when a run is resumed."""
OPTIONAL = ("model_name_or_path", "model_revision", "bnb_4bit_quant_type", "use_bnb_nested_quant", "dataset_name")
OPTIONAL += (*FIXED_SETTINGS, *CHOICE_SETTINGS)
"""What is not always recorded: compared where both runs say it."""
OTHER_DATA = {"dataset_name": "other data in dataset_name", "held_out_documents": "other held-out documents"}
START_ANEW = "set it back, choose another output_dir, or train anew without resume_from_checkpoint"


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: all that training resumes from is there and can be read."""

    folder: Path
    record: Record
    state: dict[str, Any]
    """The content of trainer_state.json."""

    @property
    def step(self) -> int:
        return int(self.state["global_step"])

    @classmethod
    def open(cls, folder: Path, only_model: bool = False) -> Checkpoint:
        """The checkpoint in `folder`; with `only_model` it needs no optimizer, scheduler and random states.

        Raises:
            CheckpointError: a part that is missing or damaged.
        """
        is_full = (folder / "config.json").is_file() and not is_adapter(folder)
        # DeepSpeed keeps its optimizer and scheduler in a folder of its own.
        wanted = TRAINING_FILES[2:] if any(folder.glob("global_step*")) else TRAINING_FILES
        needed = [*MERGED_FILES, "*.safetensors"] if is_full else REQUIRED_FILES
        for pattern in [*needed, *([] if only_model else wanted), STATE]:
            if not any(folder.glob(pattern)):
                raise CheckpointError(f"{folder} has no {pattern.replace('*', '')}")
        read = [] if is_full else [folder / "base_config" / "config.json"]
        read += [file for pattern in wanted for file in sorted(folder.glob(pattern)) if file.is_file()]
        try:
            record = Record.read(folder, str(folder))
        except ValueError as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error
        if not record.is_of(folder):
            raise CheckpointError(f"{folder} has other weights than those that its {FILE} was written for")
        state: dict[str, Any] = {}
        for file in [*read, folder / STATE]:
            try:
                if file.suffix == ".json":
                    state = json.loads(file.read_text(encoding="utf-8"))
                else:
                    zipfile.ZipFile(file).close()
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{folder} has a damaged {file.relative_to(folder)} ({error})") from error
        # The last one read.
        return cls(folder, record, state)


def step_of(folder: Path) -> int:
    """N of checkpoint-N; -1 for another name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders checkpoint-N, by N."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def newest_checkpoint(folder: Path, only_model: bool = False) -> Checkpoint | None:
    """The last whole checkpoint of the last run in `folder`; one line says which were passed over, and why."""
    whole, passed_over = [], []
    for path in checkpoint_folders(folder):
        try:
            whole.append(Checkpoint.open(path, only_model))
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        logger.warning("passed over: %s", "; ".join(passed_over))
    if not whole:
        return None
    # The time of this file: deleting from a folder renews the folder's.
    last = max(whole, key=lambda found: (found.folder / STATE).stat().st_mtime_ns)
    own = [found for found in whole if found.record.run_id == last.record.run_id]
    return max(own, key=lambda found: found.step)


def wants_newest(wanted: Any) -> bool:
    """Whether resume_from_checkpoint=`wanted` names no folder, but asks for the newest checkpoint."""
    return str(wanted).lower() == "true"


def refuse_anew(wanted: Any, folder: Path) -> None:
    """Refuse to overwrite what a run has saved in `folder` where resuming is asked for and no checkpoint is there.

    Raises:
        CheckpointError: saying what to do.
    """
    if wants_newest(wanted) and (folder / FILE).exists():
        raise CheckpointError(
            f"{folder} holds what a run has saved, and no whole checkpoint to resume it from: choose another "
            "output_dir (adapter_name_or_path trains an adapter further), or train anew without resume_from_checkpoint"
        )


def find_checkpoint(wanted: Any, folder: Path, only_model: bool = False) -> Checkpoint | None:
    """The checkpoint to resume from: `wanted` is one, or names a folder, or is true for the newest in `folder`.

    Raises:
        CheckpointError: a folder that is not there, or no whole checkpoint.
    """
    if isinstance(wanted, Checkpoint):
        return wanted
    if wanted is None or str(wanted).lower() == "false":
        return None
    if wants_newest(wanted):
        found = newest_checkpoint(folder, only_model)
        if not found:
            logger.info(f"no checkpoint in {folder} yet")
        return found
    if not Path(wanted).is_dir():
        raise CheckpointError(f"resume_from_checkpoint={wanted}: no such folder")
    try:
        return Checkpoint.open(Path(wanted), only_model)
    except CheckpointError as error:
        raise CheckpointError(f"resume_from_checkpoint: {error}: choose another checkpoint") from error


def _options(positions: Positions) -> dict[str, Any]:
    """Those of the strategy and those that go with any."""
    own = options_of(positions.strategy) if positions.strategy in POSITION_STRATEGIES else {}
    mixed = {name: getattr(CREAMDataCollator, name) for name in MIXED}
    return own | mixed | positions.options


def _settings(record: Record, adapter: dict[str, Any]) -> dict[str, Any]:
    """Key of a recipe -> what a run must not change when it is resumed; None where it is not known."""
    positions = record.positions
    # None: not recorded, by an earlier version.
    said = {key: "none" if value is None else value for key, value in record.settings.items()}
    return {
        # The name of a local folder says nothing; the fingerprint does.
        "model_name_or_path": None if record.base_is_local else record.base_model,
        "model_revision": record.base_revision,
        "load_in_4bit": record.load_in_4bit,
        **{key: record.quantization.get(key) for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant")},
        "use_peft": bool(adapter),
        # As text, since _plain sorts lists.
        "adapter_name_or_path": str([stage.get("adapter_sha256") for stage in record.stages]),
        "rope_scaling_type": record.rope_scaling_type or "none",
        "target_length": record.target_length,
        "context_length": positions.context_length,
        "position_strategy": positions.strategy,
        **_options(positions),
        "short_documents": positions.short_documents,
        "distillation_weight": record.distillation_weight,
        "distillation_length": record.distillation_length,
        **{key: said.get(key) for key in (*FIXED_SETTINGS, *CHOICE_SETTINGS)},
        "seed": record.seed,
        "data_seed": positions.seed,
        **{
            f"lora_{key}" if key in ("r", "target_modules", "modules_to_save") else key: value
            for key, value in adapter.items()
            if key not in FREE_FIELDS
        },
        "dataset_name": record.data,
    }


def _plain(value: Any) -> Any:
    """As JSON has it, the order of names aside, which PEFT keeps in sets."""
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return getattr(value, "value", value)


def difference(folder: Path, record: Record, trainer: ResumingTrainer) -> str | None:
    """What the run that left `folder` and `record` had and `trainer` has otherwise, in words; None if nothing."""
    now, file = trainer.describe(), folder / "adapter_config.json"
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "active_peft_config", None)
    adapter = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ours = config.to_dict() if config else {}
    was, new = _settings(record, adapter), _settings(now, ours)
    for key in (key for key in new if key in was):
        one, other = _plain(was[key]), _plain(new[key])
        if one != other and (key not in OPTIONAL or None not in (one, other)):
            what = OTHER_DATA.get(key)
            return f"{what} ({one}, now {other})" if what else f"{key}={one}, now {other}"
    tensor = differing(record.base_fingerprint, lambda name, count: trainer.base_fingerprint.get(name))
    return f"another base in model_name_or_path ({tensor} has other values)" if tensor else None


def _say_what_changed(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    then = checkpoint.record.settings
    changed = [f"{key}={then[key]}, now {now[key]}" for key in KEPT_SETTINGS if then.get(key) not in (None, now[key])]
    if changed:
        logger.warning(
            "%s was trained with %s: the run goes on so, and its weights will not be those of an uninterrupted one",
            checkpoint.folder, "; ".join(changed),
        )  # fmt: skip


class ResumingTrainer(SavingTrainer):
    """A trainer that resumes only a whole checkpoint of its own run, and stops where the run ends."""

    _is_first_checkpoint = False

    def train(self, resume_from_checkpoint: str | bool | Checkpoint | None = None, *args: Any, **kwargs: Any):
        """Train; `resume_from_checkpoint` is a folder, or true for the newest checkpoint in output_dir; None: as the
        config says.

        Raises:
            CheckpointError: a checkpoint that is not whole or was trained with other settings; one is named.
        """
        folder, only_model = Path(str(self.args.output_dir)), self.args.save_only_model
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = find_checkpoint(wanted, folder, only_model)
        there = checkpoint_folders(folder)
        if checkpoint is None:
            refuse_anew(wanted, folder)
            if there or (folder / FILE).exists():
                is_asked = any(map(wants_newest, (wanted, self.args.resume_from_checkpoint)))
                remedy = "; resume_from_checkpoint=true resumes it" if there and not is_asked else ""
                logger.warning("%s holds an earlier run, which is overwritten%s", folder, remedy)
        self.run_id, self.resumed_step, self.best = secrets.token_hex(8), 0, None
        if checkpoint:
            found = difference(checkpoint.folder, checkpoint.record, self)
            if found:
                raise CheckpointError(f"{checkpoint.folder} was trained with {found}: {START_ANEW}")
            logger.info(f"resuming from {checkpoint.folder}")
            _say_what_changed(checkpoint, self.describe().settings)
            if later := [path.name for path in there if step_of(path) > checkpoint.step]:
                logger.warning(
                    "%s of %s will be deleted, since this run goes on from step %d: copy what you want to keep",
                    ", ".join(later), folder, checkpoint.step,
                )  # fmt: skip
            if not any(checkpoint.folder.glob("optimizer*")) and not any(checkpoint.folder.glob("global_step*")):
                logger.warning("%s holds weights alone: optimizer and learning rate begin anew", checkpoint.folder)
            # Of a stream nothing says how long a pass over it is, and groups are drawn with what state torch then has.
            grouped = self.args.train_sampling_strategy == "group_by_length"
            differs = {"a streamed data set, which begins anew": isinstance(self.train_dataset, IterableDataset)}
            differs["data grouped by length, which are grouped anew"] = grouped
            for what in (what for what, is_so in differs.items() if is_so and checkpoint.state.get("epoch", 0) >= 1):
                logger.warning(
                    "%s is past the first pass over %s: the run goes on, and its weights will not be those of an "
                    "uninterrupted one", checkpoint.folder, what,
                )  # fmt: skip
            self.run_id, self.resumed_step = checkpoint.record.run_id, checkpoint.step
        self._is_first_checkpoint = True
        return super().train(str(checkpoint.folder) if checkpoint else None, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        peaks = getattr(scheduler, "base_lrs", [])
        super()._load_optimizer_and_scheduler(checkpoint)
        # The rate is that of this run's peak and schedule; the optimizer has that of where the old schedule stood, with
        # more steps its end.
        if checkpoint and self.optimizer and isinstance(scheduler, LambdaLR):
            scheduler.base_lrs, factors = peaks, (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
            scheduler._last_lr = [peak * factor for peak, factor in zip(peaks, factors, strict=True)]
            for group, peak, rate in zip(self.optimizer.param_groups, peaks, scheduler._last_lr, strict=True):
                group["initial_lr"], group["lr"] = peak, rate

    # transformers would train one step more each time a finished run is resumed, and keep the checkpoint's save_steps.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._is_first_checkpoint:
            self._is_first_checkpoint = False
            if self.args.should_save:
                self._remove_other_checkpoints(Path(self._get_output_dir(trial)))
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _remove_other_checkpoints(self, folder: Path) -> None:
        """All but those that this run was resumed over: then the highest whole one is always the newest."""
        for path in checkpoint_folders(folder):
            try:
                found = Checkpoint.open(path, self.args.save_only_model)
            except CheckpointError:
                found = None
            if not found or found.record.run_id != self.run_id or found.step > self.resumed_step:
                shutil.rmtree(path, ignore_errors=True)
