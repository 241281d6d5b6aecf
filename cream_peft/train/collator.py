"""Gathers the tokens and labels of one draw per document and adds position_ids and attention_mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from .. import positions

ROW_COLUMN = "document_row"
EVALUATION_ROW = -1
IGNORE_INDEX = -100
DRAWS_PER_ROW = 16
_WORKER_SLOTS = 129


@dataclass
class CREAMDataCollator:
    """Turns tokenised documents into a batch at `context_length` with the positions of `position_strategy`.

    A document that carries its row number (`document_row`, set by CREAMTrainer on training documents) gets a draw
    seeded by (seed, epoch, row), whatever process or worker does it. The row -1 marks an evaluation document: its first
    `eval_length` tokens at positions 0..n-1. A document without a row number is refused. A draw whose labels are all
    -100 is drawn again, at most 16 times; `redrawn()` and `unlabelled()` count both.

    Returns a dict of int64 tensors [batch, tokens]: input_ids, labels (-100 where padded), position_ids, and an
    attention_mask made from lengths. The mask is always there: without it transformers reads each jump of the
    positions as the start of a new packed document and blocks attention across the segments.
    """

    pad_token_id: int
    context_length: int
    target_length: int
    position_strategy: str = "cream"
    strategy_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    eval_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        self._draw = positions.POSITION_STRATEGIES[self.position_strategy]
        # In shared memory, so that persistent workers see the new epoch and the main process their counts.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._counts = torch.zeros(2, _WORKER_SLOTS, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Epoch (from 0) that the next draws belong to."""
        self._epoch[0] = epoch

    def redrawn(self) -> int:
        """Draws thrown away so far because they held no label."""
        return int(self._counts[0].sum())

    def unlabelled(self) -> int:
        """Examples that went out without any label after 16 draws."""
        return int(self._counts[1].sum())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._example(example) for example in examples]
        length = max(len(row[0]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {name: np.empty(shape, dtype=np.int64) for name in ("input_ids", "labels", "position_ids")}
        batch["attention_mask"] = np.ones(shape, dtype=np.int64)
        for index, (input_ids, labels, position_ids) in enumerate(rows):
            size = len(input_ids)
            batch["input_ids"][index, :size] = input_ids
            batch["labels"][index, :size] = labels
            batch["position_ids"][index, :size] = position_ids
            if size < length:
                batch["input_ids"][index, size:] = self.pad_token_id
                batch["labels"][index, size:] = IGNORE_INDEX
                # Padding goes on counting: a repeated smallest position would split the row in flash attention.
                batch["position_ids"][index, size:] = position_ids[-1] + np.arange(1, length - size + 1)
                batch["attention_mask"][index, size:] = 0
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _example(self, example: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        input_ids = np.asarray(example["input_ids"], dtype=np.int64)
        labels = example.get("labels")
        labels = input_ids if labels is None else np.asarray(labels, dtype=np.int64)
        if ROW_COLUMN not in example:
            raise ValueError(
                f"an example has no {ROW_COLUMN}, from which its positions are drawn: use CREAMTrainer, which adds it, "
                "or add the row's number yourself (-1 for evaluation) and set remove_unused_columns=False"
            )
        row = int(example[ROW_COLUMN])
        if row != EVALUATION_ROW:
            return self._training_example(input_ids, labels, row)
        size = min(len(input_ids), self.eval_length or len(input_ids))
        return input_ids[:size], labels[:size], np.arange(size)

    def _count(self, what: int) -> None:
        worker = get_worker_info()
        self._counts[what, 0 if worker is None else 1 + worker.id % (_WORKER_SLOTS - 1)] += 1

    def _training_example(
        self, input_ids: np.ndarray, labels: np.ndarray, row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = positions.generator(self.seed, self._epoch.item(), row)
        for _ in range(DRAWS_PER_ROW):
            tokens, position_ids = self._draw(
                len(input_ids), self.context_length, self.target_length, rng, **self.strategy_options
            )
            drawn_ids = input_ids.take(tokens)
            if labels is input_ids:
                return drawn_ids, drawn_ids, position_ids
            drawn = labels.take(tokens)
            # The model shifts labels: the first one is never predicted.
            if (drawn[1:] != IGNORE_INDEX).any():
                break
            self._count(0)
        else:
            self._count(1)
        return drawn_ids, drawn, position_ids
