"""kv_retrieval and needle in the embedded model's own words, which are no text: a key at the end asks for its value."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tiny.documents import (
    CELL,
    EVALUATION_DENSITY,
    FIRST_KEY,
    FIRST_VALUE,
    NUM_KEYS,
    VOCABULARY_SIZE,
    filler_cells,
    vocabulary,
)
from .prompts import Prompt, TaskError, Writer, generator, position


def is_embedded(tokenizer: Any) -> bool:
    """Whether the tokenizer speaks the embedded vocabulary."""
    return len(tokenizer) == VOCABULARY_SIZE and tokenizer.convert_tokens_to_ids("k000") == FIRST_KEY


def _ask(
    writer: Writer, rng: np.random.Generator, num_cells: int, places: np.ndarray, asked: int, depth: float
) -> Prompt:
    """A document of `num_cells` cells with records at `places`; its last cell asks the key of record `asked`."""
    cells = filler_cells(rng, num_cells)
    keys = FIRST_KEY + rng.permutation(NUM_KEYS)[: len(places)]
    values = rng.integers(FIRST_VALUE, VOCABULARY_SIZE, len(places))
    cells[places, 1], cells[places, 2] = keys, values
    words = vocabulary()
    text = " ".join(words[token] for token in [*cells[:-1].reshape(-1), cells[-1, 0], keys[asked]])
    return writer.prompt(text, "", said="", answer=words[values[asked]], depth=depth, records=len(places))


def _cells(length: int) -> int:
    if length < 16 * CELL:
        raise TaskError(f"length {length:,} is too short for the embedded model's tasks: use at least {16 * CELL}")
    return length // CELL


def kv_prompt(
    writer: Writer, length: int, depth: float, index: int, seed: int, *, answer_tokens: int = 1, keys: int = 0
) -> Prompt:
    """`keys` records, or as dense as the documents of the task recall. Every depth asks the same document."""
    rng, num_cells = generator("kv_retrieval", seed, length, index), _cells(length)
    fitting = min(NUM_KEYS, int(EVALUATION_DENSITY * num_cells))
    if keys > min(NUM_KEYS, num_cells - 2):
        raise TaskError(f"length {length:,} is too short for {keys} keys: {min(NUM_KEYS, num_cells - 2)} at most")
    places = 1 + np.sort(rng.choice(num_cells - 2, keys or fitting, replace=False))
    return _ask(writer, rng, num_cells, places, position(depth, len(places)), depth)


def needle_prompt(
    writer: Writer, length: int, depth: float, index: int, seed: int, *, answer_tokens: int = 1
) -> Prompt:
    """One record in filler."""
    rng, num_cells = generator("needle", seed, length, depth, index), _cells(length)
    return _ask(writer, rng, num_cells, np.array([1 + position(depth, num_cells - 2)]), 0, depth)
