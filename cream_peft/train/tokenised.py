"""Documents once they are tokenised: their lengths, their labels, short ones made to fit."""

from __future__ import annotations

import json
import logging
from hashlib import sha256
from typing import Any

import numpy as np
from datasets import Dataset

from .collator import ROW_COLUMN
from .rows import IGNORE_INDEX, MOST_BAD, DataError, column_names

logger = logging.getLogger(__name__)

ROWS_AT_ONCE, LENGTHS_AT_ONCE = 1000, 10_000
CUT = {
    "context_length": ("training", "an answer may lose what it refers to"),
    "eval_length": ("held-out", "an answer beyond is not judged"),
}
"""The setting that cuts documents -> which, and what that may cost."""


def rows_identity(dataset: Any) -> str | None:
    """The number of rows and a digest of them; None of a stream."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    digest, columns = sha256(), sorted(set(dataset.column_names) - {ROW_COLUMN})
    digest.update(json.dumps(columns).encode())
    for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        # Arrow's own form has no more than the rows, wherever they lie in a file.
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return f"{len(dataset):,} rows, sha256 {digest.hexdigest()[:16]}"


def lengths_of(documents: Dataset) -> np.ndarray:
    """Tokens of each tokenised document."""
    columns = documents.select_columns(["input_ids"]).with_format("arrow")
    chunks = (chunk for table in columns.iter(LENGTHS_AT_ONCE) for chunk in table["input_ids"].chunks)
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])


def summary_of(lengths: np.ndarray, window: int, fed: float) -> str:
    """How many documents there are, of which lengths in tokens, and how many tokens are fed in windows."""
    short = (lengths < window).mean()
    return (
        f"{len(lengths):,} documents of {lengths.sum():,} tokens (median {np.median(lengths):,.0f}, {short:.0%} "
        f"shorter than {window:,}): {fed:,.0f} tokens will be fed"
    )


def warn_of_cut(dataset: Any, documents: Any, key: str, length: int, target_length: int) -> None:
    """Say how many of the tokenised `documents` are longer than `length` tokens, which `key` sets (see CUT), or cut off
    at the target: harmless for plain text, of which every token is trained, but not where an answer is learned."""
    if not isinstance(dataset, Dataset):
        return
    lengths, (which, cost) = lengths_of(dataset), CUT[key]
    is_asked = bool({"messages", "prompt"} & set(column_names(documents)))
    ends = lengths >= target_length if is_asked else np.zeros_like(lengths, dtype=bool)
    long = np.flatnonzero((lengths > length) | ends)
    if len(long) and (is_asked or IGNORE_INDEX in dataset[int(long[0])]["labels"][1:]):
        remedy = "a larger one reads them whole"
        if ends.any():
            remedy += f", but {ends.sum():,} that were cut at target_length={target_length:,}"
        logger.warning(
            "%s of %s %s documents are longer than %s=%s and are read in part: %s; %s",
            f"{len(long):,}", f"{len(lengths):,}", which, key, f"{length:,}", cost, remedy,
        )  # fmt: skip


def report_unlabelled(dataset: Any, documents: Any, which: str, key: str, length: int) -> None:
    """Say how many of `documents`, which are the training or held-out ones, were left out because they have no label
    within `length` tokens, which `key` sets.

    Raises:
        DataError: if most have none, and so nothing was trained or evaluated.
    """
    if not isinstance(dataset, Dataset) or len(dataset) == len(documents):
        return
    lost = f"{len(documents) - len(dataset):,} of {len(documents):,} {which} documents"
    told = f"{lost} have no label within {key}={length:,}"
    if len(dataset) < (1 - MOST_BAD) * len(documents):
        raise DataError(
            f"{told}. These are too many: nothing was trained. If what is to be learned lies beyond it, raise it; else "
            "look at labels, completion_mask, assistant_only_loss and completion_only_loss"
        )
    logger.warning("%s and are left out", told)


def fit_short_documents(dataset: Any, mode: str, context_length: int) -> Any:
    """Apply `short_documents` to tokenised documents (columns input_ids and labels).

    shrink leaves them to the sampler, skip drops those below `context_length` tokens, join concatenates neighbours that
    fit into it together: what is longer is cropped, and an example would lose what its answer refers to.

    Raises:
        DataError: when skip leaves nothing.
    """
    if mode == "skip":
        kept = dataset.filter(lambda row: len(row["input_ids"]) >= context_length)
        if isinstance(dataset, Dataset):
            if not len(kept):
                raise DataError(
                    f"short_documents=skip leaves none of {len(dataset)} documents: all are shorter than "
                    f"context_length={context_length}. Use join or shrink, or lower context_length"
                )
            logger.info("short_documents=skip: %d of %d documents kept", len(kept), len(dataset))
        return kept
    if mode == "join":
        columns = ["input_ids", "labels"]
        return dataset.select_columns(columns).map(_join, batched=True, fn_kwargs={"context_length": context_length})
    return dataset


def _join(batch: dict[str, list], context_length: int) -> dict[str, list]:
    joined: dict[str, list] = {column: [] for column in batch}
    for index, added in enumerate(batch["input_ids"]):
        fits = bool(joined["input_ids"]) and len(joined["input_ids"][-1]) + len(added) <= context_length
        for column, rows in joined.items():
            if not fits:
                rows.append([])
            rows[-1].extend(batch[column][index])
    return joined


def fit_held_out_documents(dataset: Any, mode: str, eval_length: int) -> Any:
    """The tokenised held-out documents that have a label within their first `eval_length` tokens, whose first is never
    predicted: others would count as a loss of 0. join applies to them too, or the loss of short documents would say
    nothing about eval_length.

    Raises:
        DataError: if most have none.
    """
    documents = fit_short_documents(dataset, mode, eval_length) if mode == "join" else dataset
    labelled = documents.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"][1:eval_length]))
    report_unlabelled(labelled, documents, CUT["eval_length"][0], "eval_length", eval_length)
    return labelled
