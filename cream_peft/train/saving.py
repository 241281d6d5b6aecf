"""What a run saves: an adapter or a model that says of itself how it was made, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig

from .. import rope
from ..model.base import make_tokenizer_readable
from ..model.record import (
    BASE_FOLDER,
    FILE,
    Best,
    Positions,
    Record,
    adapter_sha256,
    machine,
    model_sha256,
    peak_gib,
    versions,
    write_json,
)
from ..model.secrets import without_secrets
from ..plugins import package_of
from ..positions import POSITION_STRATEGIES, options_of
from ..publish.card import CARD, write_card
from ..scalings import ROPE_SCALING_TYPES
from ..tiny import TINY_ID, TINY_LICENSE
from .collator import MIXED, ROW_COLUMN
from .config import Lengths
from .publishing import PublishingTrainer

logger = logging.getLogger(__name__)

ASIDE = ".saving"
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*.json", "*.jinja")
"""What an earlier save may have left that the new one has not."""
SAMPLED_ROWS = 16


def rows_identity(dataset: Any) -> str | None:
    """The number of rows and a digest of some of them; None of a stream."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    digest = sha256()
    for index in np.linspace(0, len(dataset) - 1, SAMPLED_ROWS).astype(int).tolist():
        row = dataset[index]
        for column in sorted(set(row) - {ROW_COLUMN}):
            digest.update(column.encode() + json.dumps(np.asarray(row[column]).tolist(), default=str).encode())
    return f"{len(dataset):,} rows, sha256 {digest.hexdigest()[:16]}"


@contextmanager
def saved_whole(folder: Path, is_writer: bool = True) -> Generator[Path]:
    """Yield a folder beside the files in `folder`; at the end what was written there takes their place.

    A kill leaves the old adapter whole, or no cream.json, which makes a folder complete, but never a mixture.
    """
    if not is_writer:
        yield folder
        return
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if (folder / CARD).is_file():
        # What a person wrote on it stays.
        shutil.copy(folder / CARD, aside)
    yield aside
    (folder / FILE).unlink(missing_ok=True)
    for path in (path for pattern in REPLACED for path in folder.glob(pattern)):
        path.unlink()
    written = [path for path in aside.rglob("*") if path.is_file()]
    for path in sorted(written, key=lambda path: path.name == FILE):
        target = folder / path.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(aside)


class SavingTrainer(PublishingTrainer):
    """A trainer whose folders hold the scaled config of the base, cream.json and a card."""

    data_collator: Any
    recipe: dict[str, Any]
    seconds: float | None
    lengths: Lengths
    scaled_config: PreTrainedConfig
    pretrained_window: int
    base_revision: str | None
    base_fingerprint: dict[str, list[float]]
    earlier: Record | None
    run_id: str | None = None
    """The same in all that one run saves, resumed or not."""
    best: Best | None = None
    """Once training has ended with load_best_model_at_end: the step whose weights the model then has."""

    @cached_property
    def data_identity(self) -> str | None:
        """What tells one set of training documents from another; of a stream its name."""
        return rows_identity(self.train_dataset) or self.recipe.get("dataset_name")

    def describe(self) -> Record:
        """The content of cream.json: how the base was scaled, how positions were drawn, what the run took."""
        args, collator = self.args, self.data_collator
        is_full = not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        factor = collator.target_length / collator.context_length
        options = options_of(collator.position_strategy) | collator.strategy_options
        packages = {
            "position_strategy": package_of(POSITION_STRATEGIES[collator.position_strategy]),
            "rope_scaling_type": package_of(ROPE_SCALING_TYPES.get(str(args.rope_scaling_type))),
        }
        positions = Positions(
            strategy=collator.position_strategy,
            context_length=collator.context_length,
            factor=factor,
            options=without_secrets(options | {name: getattr(collator, name) for name in MIXED}),
            seed=collator.seed,
            short_documents=args.short_documents,
            redrawn=collator.redrawn(),
            unlabelled=collator.unlabelled(),
        )
        return Record(
            base_model=self.base_model_name(),
            base_is_local=self.base_is_local(),
            base_revision=self.base_revision,
            base_fingerprint=self.base_fingerprint,
            pretrained_window=self.pretrained_window,
            target_length=self.lengths.target_length,
            rope_scaling_type=args.rope_scaling_type,
            distillation_weight=args.distillation_weight,
            distillation_length=args.distillation_length,
            positions=positions,
            load_in_4bit=bool(getattr(self.accelerator.unwrap_model(self.model), "is_loaded_in_4bit", False)),
            license=args.license or (TINY_LICENSE if self.base_model_name() == TINY_ID else None),
            steps=self.state.global_step,
            best=self.best,
            first_step=getattr(getattr(self, "_set_epoch", None), "first_step", 0),
            seconds=self.seconds and round(self.seconds, 1),
            peak_gib=peak_gib(),
            machine=machine(),
            seed=args.seed,
            versions=versions(),
            packages={key: name for key, name in packages.items() if name},
            recipe=self.recipe,
            run_id=self.run_id,
            data=self.data_identity,
            stages=[*self.earlier.stages, self.earlier.as_stage()] if self.earlier else [],
            merged=is_full,
            full=is_full,
            dtype=str(self.model.dtype).removeprefix("torch.") if is_full else None,
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        step, metric = int(self.state.best_global_step or 0), str(self.args.metric_for_best_model)
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.best = Best(step, metric, float(self.state.best_metric or 0), self.lengths.eval_length)
        logger.info(
            "step %d is taken, the best on held-out documents: %s %.3f at up to %s tokens",
            step, metric, self.best.value, f"{self.best.eval_length:,}",
        )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_whole(Path(output_dir or str(self.args.output_dir)), self.args.should_save) as folder:
            super()._save(str(folder), state_dict)
            if not self.args.should_save:
                return
            # It would carry the Hub token and local paths to the Hub, and nothing reads it back.
            (folder / "training_args.bin").unlink(missing_ok=True)
            make_tokenizer_readable(folder, self.lengths.target_length)
            record = self.describe()
            if record.full:
                kind = type(self.accelerator.unwrap_model(self.model)).__name__
                own = {"dtype": record.dtype, "architectures": [kind]}
                write_json(folder / "config.json", rope.published_config(self.scaled_config) | own)
            else:
                rope.save_base_config(self.scaled_config, folder)
            digest = model_sha256(folder) if record.full else adapter_sha256(folder)
            record = replace(record, adapter_sha256=digest)
            record.name_base_in(folder)
            record.write(folder)
            if record.base_is_local:
                base = Path(self.unwrapped_config()._name_or_path).absolute()
                (folder / BASE_FOLDER).write_text(f"{base}\n", encoding="utf-8")
            write_card(folder, record, self.published_name())
