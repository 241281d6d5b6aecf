"""The task "recall": a document states `key value` records and asks some of its keys again.

A document is made of cells of 4 tokens. A cell is filler only, or holds `key value` at a random offset. A record cell
states a new key, or asks again a uniformly chosen earlier one; only the value of a re-asked key can be predicted, so
only that carries a label. The first cell is `<s>` and three fillers.

The embedded base knows how to do that. The new skill is to answer a question in another form, which it never saw: with
a `mark`, a key is asked again as `key MARK value`. MARK is a filler.

Vocabulary (385 tokens): `<s>`, 64 fillers, 256 keys, 64 values, in this order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

NUM_FILLERS, NUM_KEYS, NUM_VALUES = 64, 256, 64
BEGIN = 0
FIRST_FILLER = 1
FIRST_KEY = FIRST_FILLER + NUM_FILLERS
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCABULARY_SIZE = FIRST_VALUE + NUM_VALUES
MARK = FIRST_KEY - 1
"""The last filler."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {"recall": {}, "new_skill": {"mark": MARK, "new_key_share": 0.25}}
"""dataset_config -> options of `training_document`. With fewer new keys there are more questions to learn from."""

CELL = 4
IGNORED = -100
EVALUATION_DENSITY = 0.4
NUM_QUERIES = 16


def vocabulary() -> list[str]:
    """The words of the 385 tokens, at the index of their id."""
    fillers = [f".{number:02d}" for number in range(NUM_FILLERS)]
    keys = [f"k{number:03d}" for number in range(NUM_KEYS)]
    values = [f"v{number:02d}" for number in range(NUM_VALUES)]
    return ["<s>", *fillers, *keys, *values]


def filler_cells(rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """int64 [num_cells, 4] of fillers, the first token `<s>`."""
    cells = rng.integers(FIRST_FILLER, FIRST_KEY, (num_cells, CELL))
    cells[0, 0] = BEGIN
    return cells


def training_document(
    rng: np.random.Generator,
    num_tokens: int,
    *,
    density: float = 1.0,
    new_key_share: float = 0.5,
    echo: bool = False,
    mark: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One document: (input_ids, labels), int64 [num_tokens] each.

    Labels are aligned with input_ids (the model shifts them) and -100 except on the values of re-asked keys.

    Args:
        density: probability that a cell is a record rather than filler.
        new_key_share: probability that a record states a new key. Once all 256 keys are in use, none is new.
        echo: a record is `key value key`, with a label on the second key as well. This teaches the first of the two
            heads that recall needs; without it pretraining stalls.
        mark: token id; a key is asked again as `key MARK value`. None: as `key value`.
    """
    num_cells = -(-num_tokens // CELL)
    cells = filler_cells(rng, num_cells)
    labels = np.full_like(cells, IGNORED)
    places = 1 + np.flatnonzero(rng.random(num_cells - 1) < density)

    is_new = rng.random(places.size) < new_key_share
    is_new[:1] = True
    is_new &= np.cumsum(is_new) <= NUM_KEYS
    known = np.cumsum(is_new)
    record = np.where(is_new, known - 1, (rng.random(places.size) * known).astype(np.int64))
    keys = FIRST_KEY + rng.permutation(NUM_KEYS)[record]
    values = rng.integers(FIRST_VALUE, VOCABULARY_SIZE, NUM_KEYS)[record]

    offsets = rng.integers(0, CELL - (1 if not echo and mark is None else 2), places.size)
    cells[places, offsets] = keys
    if mark is not None:
        cells[places, offsets + 1] = mark
    answers = offsets + 1 + (~is_new if mark is not None else 0)
    cells[places, answers] = values
    labels[places, answers] = np.where(is_new, IGNORED, values)
    if echo:
        cells[places, offsets + 2] = labels[places, offsets + 2] = keys
    return cells.reshape(-1)[:num_tokens], labels.reshape(-1)[:num_tokens]


def training_rows(count: int, num_tokens: int, seed: int, **options: Any) -> dict[str, list[np.ndarray]]:
    """`count` training documents as columns `input_ids` and `labels`, ready for `datasets.Dataset.from_dict`."""
    rng = np.random.default_rng(seed)
    documents = [training_document(rng, num_tokens, **options) for _ in range(count)]
    return {"input_ids": [ids for ids, _ in documents], "labels": [labels for _, labels in documents]}


def evaluation_document(
    rng: np.random.Generator, num_tokens: int, mark: int | None = None, queries: int = NUM_QUERIES
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One document that asks some of its keys, each once, a cell each, at its end.

    40 % of the other cells are records, each of its own key (256 at most, so documents beyond about 2,600 tokens are
    sparser). The records are cut into as many equal parts as are asked, and one is drawn from each, in shuffled order.
    With a `mark`, a token id, they are asked as `key MARK value`.

    Returns:
        input_ids [num_tokens]; query_positions [queries], the indices of the tokens after which the answers come;
        answers [queries], token ids; depths [queries], the places of the asked records as shares of the document.
    """
    num_cells, ragged = divmod(num_tokens, CELL)
    free_cells = num_cells - queries - 1
    num_records = min(NUM_KEYS, int(EVALUATION_DENSITY * free_cells))
    if ragged or num_records < queries:
        least = CELL * (queries + 1 + math.ceil(queries / EVALUATION_DENSITY))
        wanted = f"a multiple of {CELL} and at least {least} tokens"
        raise ValueError(f"the length of a document with {queries} questions must be {wanted}, got {num_tokens}")
    cells = filler_cells(rng, num_cells)
    places = 1 + np.sort(rng.choice(free_cells, num_records, replace=False))
    keys = FIRST_KEY + rng.permutation(NUM_KEYS)[:num_records]
    values = rng.integers(FIRST_VALUE, VOCABULARY_SIZE, num_records)

    bounds = np.arange(queries + 1) * num_records // queries
    asked = rng.permutation(rng.integers(bounds[:-1], bounds[1:]))
    record = np.concatenate([np.arange(num_records), asked])
    places = np.concatenate([places, np.arange(num_cells - queries, num_cells)])
    is_question = (np.arange(places.size) >= num_records) & (mark is not None)
    offsets = rng.integers(0, CELL - 1 - is_question, places.size)
    cells[places, offsets] = keys[record]
    if mark is not None:
        cells[places[is_question], offsets[is_question] + 1] = mark
    cells[places, offsets + 1 + is_question] = values[record]
    positions = places * CELL + offsets
    asked_at = (positions + is_question)[num_records:]
    return cells.reshape(-1), asked_at, values[asked], positions[asked] / num_tokens


def evaluate_recall(
    model: Any,
    num_tokens: int,
    documents: int,
    seed: int,
    batch_size: int = 8,
    mark: int | None = None,
    queries: int = NUM_QUERIES,
) -> dict[str, np.ndarray]:
    """Recall of `model` on `documents` evaluation documents, at the plain positions 0..num_tokens-1.

    An answer is right when it is the argmax over the whole vocabulary. Logits are computed for the questions only.

    Returns:
        depth, float64, and correct, bool: [documents * queries] each, in the order of the documents.
    """
    import torch

    rng = np.random.default_rng(seed)
    drawn = [evaluation_document(rng, num_tokens, mark, queries) for _ in range(documents)]
    input_ids, query_positions, answers, depths = (np.stack(column) for column in zip(*drawn, strict=True))
    predicted = np.empty_like(answers)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, documents, batch_size):
                rows = slice(start, start + batch_size)
                batch = torch.from_numpy(input_ids[rows]).to(model.device)
                # Without a mask, transformers may read unusual positions as several packed documents.
                logits = model(
                    input_ids=batch,
                    attention_mask=torch.ones_like(batch),
                    position_ids=torch.arange(num_tokens, device=batch.device).expand_as(batch),
                    use_cache=False,
                    logits_to_keep=queries * CELL,
                ).logits
                best = logits.argmax(-1).cpu().numpy()
                predicted[rows] = np.take_along_axis(best, query_positions[rows] - (num_tokens - queries * CELL), 1)
    finally:
        model.train(was_training)
    return {"depth": depths.reshape(-1), "correct": (predicted == answers).reshape(-1)}
