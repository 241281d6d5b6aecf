"""The embedded model's tasks, in its own vocabulary: recall, and its kv_retrieval and needle.

It reads no text. A key at the end of the document asks for its value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from ..tiny import documents
from ..tiny.documents import CELL, FIRST_KEY, FIRST_VALUE, NUM_KEYS, VOCABULARY_SIZE
from .prompts import Case, Prompt, Request, TaskError, Writer, position, prompt_rng

TENTHS = 10


def _tenths(depths: np.ndarray) -> np.ndarray:
    """The middle of the tenth that each depth lies in."""
    return np.round((np.minimum((depths * TENTHS).astype(int), TENTHS - 1) + 0.5) / TENTHS, 3)


def recall(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    done: Collection[float] = (),
    mark: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Share of asked keys whose value comes first of the whole vocabulary, for each tenth of the document.

    Args:
        length: of a document in tokens, the questions included.
        samples: documents; each asks 16 keys, spread over its depth.
        done: depths to leave out.
        mark: token id; ask in the form of the new skill, `key MARK value`.
    """
    if model.config.vocab_size != VOCABULARY_SIZE:
        found = f"this model has {model.config.vocab_size}"
        raise TaskError(f"task recall is made of the embedded model's {VOCABULARY_SIZE} tokens; {found}")
    if done:
        # Drawing the documents again is cheap, answering them is not.
        rng = np.random.default_rng(seed)
        drawn = np.concatenate([documents.evaluation_document(rng, length, mark)[3] for _ in range(samples)])
        if set(_tenths(drawn).tolist()) <= set(done):
            return
    answers = documents.evaluate_recall(model, length, samples, seed, mark=mark)
    tenths = _tenths(answers["depth"])
    for depth in np.unique(tenths).tolist():
        if depth not in done:
            correct = answers["correct"][tenths == depth]
            cell = {"depth": depth, "metric": "accuracy", "value": float(correct.mean()), "samples": len(correct)}
            yield cell | {"correct": "".join(str(int(right)) for right in correct)}


def is_embedded(tokenizer: Any) -> bool:
    """Whether the tokenizer speaks the embedded vocabulary."""
    return len(tokenizer) == VOCABULARY_SIZE and tokenizer.convert_tokens_to_ids("k000") == FIRST_KEY


def _cells(length: int) -> int:
    if length < 16 * CELL:
        raise TaskError(f"length {length:,} is too short for the embedded model's tasks: use at least {16 * CELL}")
    return length // CELL


def _ask(writer: Writer, case: Case, rng: np.random.Generator, places: np.ndarray, asked: int) -> Prompt:
    """A document whose cells at `places` are records; its last cell asks for the key of record `asked`."""
    cells = documents.filler_cells(rng, _cells(case.length))
    keys = FIRST_KEY + rng.permutation(NUM_KEYS)[: len(places)]
    values = rng.integers(FIRST_VALUE, VOCABULARY_SIZE, len(places))
    cells[places, 1], cells[places, 2] = keys, values
    words = documents.vocabulary()
    text = " ".join(words[token] for token in [*cells[:-1].reshape(-1), cells[-1, 0], keys[asked]])
    return writer.prompt(case, Request(text, "", "", words[values[asked]], {"records": len(places)}))


def embedded_kv_prompt(writer: Writer, case: Case, *, keys: int = 0) -> Prompt:
    """`keys` records, or as dense as in the documents of recall. The document is the same at every depth."""
    rng, num_cells = prompt_rng("kv_retrieval", case.seed, case.length, case.index), _cells(case.length)
    most = min(NUM_KEYS, num_cells - 2)
    if keys > most:
        raise TaskError(f"length {case.length:,} is too short for {keys} keys: {most} at most")
    keys = keys or min(NUM_KEYS, int(documents.EVALUATION_DENSITY * num_cells))
    places = 1 + np.sort(rng.choice(num_cells - 2, keys, replace=False))
    return _ask(writer, case, rng, places, position(case.depth, keys))


def embedded_needle_prompt(writer: Writer, case: Case, *, sentences: list[str] | None = None) -> Prompt:
    """One record in filler; `sentences` are not used."""
    rng = prompt_rng("needle", case.seed, case.length, case.depth, case.index)
    return _ask(writer, case, rng, np.array([1 + position(case.depth, _cells(case.length) - 2)]), 0)
