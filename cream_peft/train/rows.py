"""Looks at every row before it is tokenised: what cannot be trained on is left out, counted by reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)
# Its functions are made at run time, where no type checker sees them.
pc: Any = pyarrow.compute

IGNORE_INDEX = -100
BATCH = 10_000
MOST_BAD = 0.5
"""Above this share of rows that cannot be used, the data set is refused."""
MASK = "attention_mask"
STREAM_SAMPLE = 256
"""Rows of a stream that are looked at before training."""
SHOWN_REASONS = 5


class DataError(ValueError):
    """A data set that cannot be found, or whose columns or rows cannot be used."""


class RowError(ValueError):
    """Why one row cannot be trained on."""


def _first(checks: Iterable[tuple[np.ndarray, str]], count: int) -> list[str | None]:
    """For each row the first reason whose mask holds it."""
    found: list[str | None] = [None] * count
    for mask, reason in checks:
        for row in np.flatnonzero(mask):
            found[row] = found[row] or reason
    return found


def _text_problems(table: pa.Table, column: str) -> list[str | None]:
    texts = table[column].cast("string")
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, "x"))), 0)
    checks = [(pc.is_null(texts), f"{column} is null"), (empty, f"{column} is empty")]
    checks.append((pc.match_substring(pc.fill_null(texts, ""), "\0"), f"{column} holds NUL, so it is not UTF-8"))
    return _first([(mask.to_numpy(), reason) for mask, reason in checks], len(table))


def _lists(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Lengths [rows] and values [all tokens] of a list column, and the function that says for which rows any of a mask
    over the values holds."""
    lists = table[column].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    values = pc.fill_null(lists.flatten(), -1).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    filled = np.flatnonzero(lengths)
    starts = (np.cumsum(lengths) - lengths)[filled]

    def any_of(mask: np.ndarray) -> np.ndarray:
        found = np.zeros(len(lengths), dtype=bool)
        found[filled] = np.logical_or.reduceat(mask, starts) if len(filled) else False
        return found

    return lengths, values, any_of


def _id_problems(table: pa.Table, vocab_size: int) -> list[str | None]:
    lengths, ids, any_of = _lists(table, "input_ids")
    outside = any_of((ids < 0) | (ids >= vocab_size))
    checks = [
        (lengths == 0, "input_ids is null or empty"),
        (lengths == 1, "one token, so there is nothing to predict"),
        (outside, f"a token id outside the vocabulary of {vocab_size:,}"),
    ]
    for column in ("completion_mask", "assistant_masks", "labels"):
        if column in table.column_names:
            others, values, any_value = _lists(table, column)
            missing = table[column].is_null().to_numpy()
            checks.append((missing, f"no {column}, and other rows have them"))
            checks.append((others != lengths, f"{column} and input_ids differ in length"))
            if column == "labels":
                wrong = any_value((values != IGNORE_INDEX) & ((values < 0) | (values >= vocab_size)))
                checks.append((wrong, f"a label outside the vocabulary of {vocab_size:,}"))
                # The first label is never predicted.
                filled = np.cumsum(others) - others
                first = np.zeros(len(values), dtype=bool)
                first[filled[others > 0]] = True
                checks.append((~any_value((values != IGNORE_INDEX) & ~first), "no token has a label"))
            else:
                checks.append((~any_value(values > 0), f"{column} is 0 throughout"))
    return _first(checks, len(table))


def _converted(batch: Mapping[str, list], convert: Callable[[dict[str, Any]], Any]) -> list[str | None]:
    found: list[str | None] = []
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        try:
            convert(dict(zip(names, values, strict=True)))
            found.append(None)
        except RowError as error:
            found.append(str(error))
    return found


def find_problems(dataset: Dataset, column: str, convert: Callable[[dict[str, Any]], Any] | None, vocab_size: int):
    """For each row None, or why it cannot be trained on.

    Args:
        column: input_ids, or that of the text; of no meaning with `convert`.
        convert: makes messages of a row, or raises a RowError.
        vocab_size: token ids lie below it.
    """
    found: list[str | None] = []
    if convert is not None:
        for batch in dataset.iter(BATCH):
            found += _converted(batch, convert)
        return found
    for table in dataset.with_format("arrow").iter(BATCH):
        found += _id_problems(table, vocab_size) if column == "input_ids" else _text_problems(table, column)
    return found


def _summary(problems: list[str | None], place_of: Callable[[int], str]) -> str:
    """`2 of 9 rows are left out: an empty turn (2, the first is row 4)`."""
    rows: dict[str, list[int]] = {}
    for row, problem in enumerate(problems):
        if problem:
            rows.setdefault(problem, []).append(row)
    most = sorted(rows.items(), key=lambda item: -len(item[1]))
    told = [f"{reason} ({len(where):,}, the first is {place_of(where[0])})" for reason, where in most[:SHOWN_REASONS]]
    more = f"; {len(most) - SHOWN_REASONS} more reasons" if len(most) > SHOWN_REASONS else ""
    bad = sum(map(len, rows.values()))
    return f"{bad:,} of {len(problems):,} rows cannot be used: {'; '.join(told)}{more}"


def keep_usable(
    dataset: Dataset | IterableDataset,
    sample: Dataset,
    name: str,
    column: str,
    convert: Callable[[dict[str, Any]], Any] | None,
    vocab_size: int,
    place_of: Callable[[int], str],
) -> Dataset | IterableDataset:
    """The data set without the rows that cannot be trained on, which are counted by reason.

    Of a stream the first rows, `sample`, are looked at now, and the others when they come.

    Raises:
        DataError: if most rows cannot be used.
    """
    problems = find_problems(dataset if isinstance(dataset, Dataset) else sample, column, convert, vocab_size)
    bad = sum(problem is not None for problem in problems)
    if bad > MOST_BAD * len(problems):
        raise DataError(f"{name}: {_summary(problems, place_of)}. These are too many: nothing was trained")
    if bad:
        logger.warning("%s: %s and are left out", name, _summary(problems, place_of))
    if isinstance(dataset, Dataset):
        return dataset.select([row for row, problem in enumerate(problems) if not problem]) if bad else dataset

    def usable(batch: dict[str, list]) -> list[bool]:
        part = Dataset.from_dict(batch, features=dataset.features)
        return [problem is None for problem in find_problems(part, column, convert, vocab_size)]

    return dataset.filter(usable, batched=True, batch_size=STREAM_SAMPLE)


def column_names(dataset: Any) -> list[str]:
    """The columns of a data set, as far as they are known."""
    return getattr(dataset, "column_names", None) or []


def without_padding(dataset: Any, columns: list[str]) -> Any:
    """The tokens in `columns`, without those that an attention_mask beside them says are none."""
    if MASK not in column_names(dataset):
        return dataset.select_columns(columns)
    rows = dataset.select_columns([*columns, MASK])
    if isinstance(dataset, Dataset):
        parts = (table[MASK].combine_chunks() for table in rows.with_format("arrow").iter(BATCH))
        if all(pc.min(part.flatten()).as_py() in (1, True, None) for part in parts):
            return dataset.select_columns(columns)

    def unpadded(row: dict[str, Any]) -> dict[str, Any]:
        return {name: list(compress(row[name] or (), row[MASK] or ())) for name in columns}

    return rows.map(unpadded, remove_columns=[MASK])
