"""The embedded model's own retrieval task, by tenths of depth."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from ..tiny.documents import VOCABULARY_SIZE, evaluate_recall, evaluation_document

TENTHS = 10


def _middle(tenth: int) -> float:
    return round((tenth + 0.5) / TENTHS, 3)


def recall(
    model: Any, tokenizer: Any, length: int, samples: int, seed: int, *, done: Collection[float] = ()
) -> Iterator[dict[str, Any]]:
    """Share of asked keys whose value comes first of the whole vocabulary, for each tenth of the document.

    Args:
        length: document length in tokens, the questions included.
        samples: documents; each asks 16 keys, spread over its depth.
        done: depths to leave out.

    Raises:
        ValueError: if the model does not speak the embedded vocabulary.
    """
    if model.config.vocab_size != VOCABULARY_SIZE:
        raise ValueError(
            f"task recall is made of the embedded model's {VOCABULARY_SIZE} tokens; this model has "
            f"{model.config.vocab_size}"
        )
    if done:
        # Which tenths there are is cheap to find out, and answering is not.
        rng = np.random.default_rng(seed)
        asked = np.concatenate([evaluation_document(rng, length)[3] for _ in range(samples)])
        if {_middle(int(tenth)) for tenth in np.minimum(asked * TENTHS, TENTHS - 1)} <= set(done):
            return
    answers = evaluate_recall(model, length, samples, seed)
    tenth = np.minimum((answers["depth"] * TENTHS).astype(int), TENTHS - 1)
    for index in range(TENTHS):
        correct, depth = answers["correct"][tenth == index], _middle(index)
        if len(correct) and depth not in done:
            yield {
                "depth": depth,
                "metric": "accuracy",
                "value": float(correct.mean()),
                "samples": len(correct),
                "correct": "".join(str(int(one)) for one in correct),
            }
