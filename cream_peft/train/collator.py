"""Gathers the tokens and labels of one draw per document and adds position_ids and attention_mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from trl.trainer.utils import pad

from .. import positions
from .rows import IGNORE_INDEX

ROW_COLUMN = "document_row"
EVALUATION_ROW = -1
DRAWS_PER_ROW = 16
MIXED = ("contiguous_share", "contiguous_text", "target_growth")
"""Settings of positions that go with any strategy."""
_WORKER_SLOTS = 129


@dataclass
class CREAMDataCollator:
    """Turns tokenised documents into a batch at `context_length` with the positions of `position_strategy`.

    A document that carries its row number (`document_row`, set by CREAMTrainer on training documents) gets a draw
    seeded by (seed, epoch, row), whatever process or worker does it. A seed and an eval_length of None are the
    trainer's; without one they are 0 and all. The row -1 marks an evaluation document: its first
    `eval_length` tokens at positions 0..n-1. A document without a row number is refused. A draw whose labels are all
    -100 is drawn again, at most 16 times; `redrawn()` and `unlabelled()` count both. Where the first tokens are fed,
    which would be the same again, a part of the document that has a label is fed at those positions.

    Returns a dict of int64 tensors [batch, tokens]: input_ids, labels (-100 where padded), position_ids, and an
    attention_mask made from lengths. The mask is always there: without it transformers reads each jump of the
    positions as the start of a new packed document and blocks attention across the segments.

    `strategy_options` are those of the strategy, see `positions.options_of`. The others go with any: a draw has plain
    positions with probability `contiguous_share`; with `contiguous_text` the document's first tokens are fed at the
    strategy's positions; and `target_growth` is the share of the run over which the target rises linearly from
    context_length to target_length, see `set_progress`.
    """

    pad_token_id: int
    context_length: int
    target_length: int
    position_strategy: str = "cream"
    strategy_options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    eval_length: int | None = None
    pad_to_multiple_of: int | None = None
    contiguous_share: float = 0.0
    contiguous_text: bool = False
    target_growth: float = 0.0

    def __post_init__(self):
        self._strategy = positions.POSITION_STRATEGIES[self.position_strategy]
        self._batches, self._batches_of_growth, self._batches_per_step = 0, 0.0, 1
        # In shared memory, so that persistent workers see the new epoch and the main process their counts.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._counts = torch.zeros(2, _WORKER_SLOTS, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Epoch (from 0) that the next draws belong to."""
        self._epoch[0] = epoch

    def set_progress(self, step: int, steps: int, batches_per_step: int) -> None:
        """The next batch is the first of optimizer step `step` (from 0) out of `steps`, from where the batches are
        counted. Before the first call, as outside of training, the target is the full one."""
        self._batches, self._batches_per_step = step * batches_per_step, batches_per_step
        self._batches_of_growth = self.target_growth * steps * batches_per_step

    def current_target(self) -> int:
        """The target of the next batch, in tokens. It grows by whole steps, however they are cut into batches."""
        batches = self._batches - self._batches % self._batches_per_step
        if batches >= self._batches_of_growth:
            return self.target_length
        return self.context_length + int((self.target_length - self.context_length) * batches / self._batches_of_growth)

    def redrawn(self) -> int:
        """Draws thrown away so far because they held no label."""
        return int(self._counts[0].sum())

    def unlabelled(self) -> int:
        """Examples that went out without any label after 16 draws."""
        return int(self._counts[1].sum())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, labels, position_ids = zip(*map(self._example, examples), strict=True)
        # Evaluation comes between the steps, and is none.
        self._batches += any(int(example[ROW_COLUMN]) != EVALUATION_ROW for example in examples)

        def padded(rows: Iterable[np.ndarray], value: int) -> torch.Tensor:
            return pad([torch.tensor(row) for row in rows], value, pad_to_multiple_of=self.pad_to_multiple_of)

        mask = padded(map(np.ones_like, input_ids), 0)
        drawn = padded(position_ids, 0)
        # Padding goes on counting: a repeated smallest position would split the row in flash attention.
        beyond = drawn.amax(1, keepdim=True) + (1 - mask).cumsum(1)
        return {
            "input_ids": padded(input_ids, self.pad_token_id),
            "labels": padded(labels, IGNORE_INDEX),
            "position_ids": torch.where(mask == 1, drawn, beyond),
            "attention_mask": mask,
        }

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

    def _draw(self, num_tokens: int, rng: np.random.Generator, is_plain: bool) -> positions.Draw:
        lengths = num_tokens, self.context_length, self.current_target()
        if is_plain:
            return positions.contiguous(*lengths, rng)
        tokens, position_ids = self._strategy(*lengths, rng, **self.strategy_options)
        return np.arange(len(tokens)) if self.contiguous_text else tokens, position_ids

    def _training_example(
        self, input_ids: np.ndarray, labels: np.ndarray, row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = positions.generator(self.seed or 0, self._epoch.item(), row)
        # Without a share no random number is taken, so that the draws stay those of the strategy alone. It is taken
        # once: draws that are thrown away would change the share.
        is_plain = bool(self.contiguous_share) and rng.random() < self.contiguous_share
        for _ in range(DRAWS_PER_ROW):
            tokens, position_ids = self._draw(len(input_ids), rng, is_plain)
            drawn_ids = input_ids.take(tokens)
            if labels is input_ids:
                return drawn_ids, drawn_ids, position_ids
            drawn = labels.take(tokens)
            # The model shifts labels: the first one is never predicted.
            if (drawn[1:] != IGNORE_INDEX).any():
                break
            self._count(0)
            if np.array_equal(tokens, np.arange(len(tokens))) and (labels[1:] != IGNORE_INDEX).any():
                tokens = _labelled_part(labels, len(tokens), rng)
                return input_ids.take(tokens), labels.take(tokens), position_ids
        else:
            self._count(1)
        return drawn_ids, drawn, position_ids


def _labelled_part(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `count` tokens in a row, which hold one of the labels, drawn uniformly, after the first of them."""
    label = 1 + rng.choice(np.flatnonzero(labels[1:] != IGNORE_INDEX))
    first = rng.integers(max(0, label - count + 1), min(label - 1, len(labels) - count) + 1)
    return np.arange(first, first + count)
