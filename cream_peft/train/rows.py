"""Looks at every row before it is tokenised: what cannot be trained on is left out, counted by reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
ROLES = {"system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool"}
ROLES |= dict.fromkeys(("human", "user"), "user")
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant")
FOLLOWS = {"user": (None, "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""Role -> the roles that may stand before it; None: the start, after the system message."""
WEIGHTS = ("weight", "train", "loss")
"""Keys by which others leave a turn out of the loss."""
KEPT_IN_TURNS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


class DataError(ValueError):
    """A data set that cannot be found, or whose columns or rows cannot be used."""


class RowError(ValueError):
    """Why one row cannot be trained on."""


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise RowError(f"it holds {kind} content, and the model reads text alone")
        content = "".join((part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of a turn is {type(content).__name__}, not text")
    return content or ""


def without_nulls(value: Any) -> Any:
    """Arrow gives each mapping the keys of all the others, as null; a chat template would write them out."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_mapping(call: Any) -> Any:
    """A tool call whose arguments are a mapping: as JSON text, which OpenAI's API gives, templates would quote them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RowError("a tool call is no mapping")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON stays text, and is refused below.
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    # None: a call without any.
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError("the arguments of a tool call are no JSON object")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def to_messages(conversation: Any, system: str | None = None) -> list[dict[str, Any]]:
    """One conversation as messages (role, content) that begin with the user, after `system` if it brings none.

    Leading assistant turns are cut off, and what no assistant answers at the end. Tool calls and their answers stay.

    Raises:
        RowError: an unknown role, an empty turn, turns out of order, content that is no text, a turn with a weight.
    """
    if not conversation:
        raise RowError("it holds no turn")
    messages: list[dict[str, Any]] = []
    for turn in conversation:
        if not isinstance(turn, dict):
            raise RowError("a turn is no mapping of role and content")
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise RowError(f"unknown role {said!r}")
        for key in WEIGHTS:
            if turn.get(key) not in (None, 1):
                raise RowError(f"a turn has a {key}, which is not supported: leave the turn or the {key} out")
        content, rest = _content(turn), {key: turn[key] for key in KEPT_IN_TURNS if turn.get(key)}
        if role == "system" and not content.strip():
            continue
        # A command may print nothing.
        if not content.strip() and not rest.get("tool_calls") and role != "tool":
            raise RowError(f"an empty {role} turn")
        rest = without_nulls(rest)
        if "tool_calls" in rest:
            rest["tool_calls"] = [*map(_with_mapping, rest["tool_calls"])]
        messages.append({"role": role, "content": content, **rest})
    start = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    if not start and system and system.strip():
        start = [{"role": "system", "content": system}]
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] in ("user", "tool"):
        messages.pop()
    before = None
    for message in messages:
        if before not in FOLLOWS.get(message["role"], ()):
            raise RowError(f"turns out of order: {message['role']} after {before or 'the start'}")
        before = message["role"]
    if before != "assistant":
        raise RowError("no turn of the assistant answers one of the user")
    return start + messages


def not_seen(messages: list[dict[str, Any]], beside: dict[str, Any], not_written: set[str]) -> set[str]:
    """What of a conversation, and of the columns `beside` it, the chat template leaves out: see
    `templates.parts_not_written`.

    Raises:
        RowError: if that is a tool call, so that an empty answer would be trained, or a tool's result.
    """
    held = {part for message in messages for part in (*message, message["role"])}
    lost = not_written & (held | {name for name, value in beside.items() if value})
    for part, told in (("tool_calls", "a tool call"), ("tool", "a tool's result")):
        if part in lost:
            raise RowError(f"it holds {told}, which the chat template does not write")
    return lost


def pair_of(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """A prompt and its completion: two texts, or the messages of both.

    Raises:
        RowError: one that is empty, or of another kind than the other.
    """
    for name, value in (("prompt", prompt), ("completion", completion)):
        if value is None or not (value.strip() if isinstance(value, str) else value):
            raise RowError(f"an empty {name}")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("of prompt and completion one is text and the other is not")
    if isinstance(prompt, str):
        return prompt, completion
    messages = to_messages([*prompt, *completion])
    answers = len(to_messages([{"role": "user", "content": "-"}, *completion])) - 1
    return messages[:-answers], messages[-answers:]


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
