"""Key-value retrieval of "Lost in the Middle" (arXiv 2307.03172): a JSON object of random UUIDs, one key asked for."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from . import embedded
from .answers import measure
from .prompts import QUARTERS, Drawn, Prompt, TaskError, Writer, contains, generator, position

PAPER_POSITIONS = {75: (0, 18, 37, 54, 74), 140: (0, 34, 69, 104, 139)}
"""Number of keys -> the five places asked by the CREAM paper (wutong4012/CREAM, scripts/eval_lost_in_the_middle.sh)."""
ANSWER_TOKENS = 50


def _request(pairs: list[tuple[str, str]], key: str) -> str:
    # nelson-liu/lost-in-the-middle, src/lost_in_the_middle/prompts/kv_retrieval.prompt
    records = ",\n ".join(f'"{name}": "{value}"' for name, value in pairs)
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{{records}}}\n\nKey: "{key}"\nCorresponding value:'
    )


def _pairs(rng: np.random.Generator, key_length: int | None) -> Drawn:
    """Keys and values: version 4 UUIDs, or `key_length` hexadecimal digits; no key twice."""
    seen: set[str] = set()

    def word() -> str:
        drawn = uuid.UUID(bytes=rng.bytes(16), version=4)
        return drawn.hex[-key_length:] if key_length else str(drawn)

    def pair() -> tuple[str, str]:
        if key_length and len(seen) >= 16**key_length // 2:
            raise TaskError(f"key_length={key_length} gives too few different keys for this length: raise it")
        key = word()
        while key in seen:
            key = word()
        seen.add(key)
        return key, word()

    return Drawn(pair)


def kv_prompt(
    writer: Writer,
    length: int,
    depth: float,
    index: int,
    seed: int,
    *,
    keys: int = 0,
    key_length: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """One question: `keys` pairs, or as many as `length` tokens hold. Every depth asks the same document."""
    if key_length is not None and not 1 <= key_length <= 12:
        # The last 12 digits of a version 4 UUID are all random.
        raise TaskError(f"key_length must be between 1 and 12 hexadecimal digits, not {key_length}")
    pairs = _pairs(generator("kv_retrieval", seed, length, index), key_length)

    def build(count: int) -> tuple[str, str]:
        document = pairs.first(count)
        return _request(document, document[position(depth, count)][0]), ""

    count = writer.fitted(build, length, answer_tokens, "key", keys)
    asked = position(depth, count)
    key, value = pairs.first(count)[asked]
    said = f'The value of "{key}" is "'
    return writer.prompt(*build(count), said=said, answer=value, depth=depth, keys=count, position=asked)


def kv_retrieval(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    depths: Collection[float] | None = None,
    keys: int = 0,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Share of answers that contain the value, graded as the original's scripts/evaluate_kv_responses.py does.

    Args:
        keys: this many pairs, as the paper's 75 and 140, asked at its places unless `depths` are given; 0 is as many
            as fit.
        options: key_length (hexadecimal digits of keys and values in place of UUIDs, for small models), and those of
            `generation.measure`, whose yields these are.
    """
    if depths is None and keys in PAPER_POSITIONS:
        depths = [round(place / (keys - 1), 4) for place in PAPER_POSITIONS[keys]]
    settings = {"prompt": kv_prompt, "grade": contains, "depths": depths or QUARTERS, "keys": keys}
    settings["shared_document"] = True
    if embedded.is_embedded(tokenizer):
        settings |= {"prompt": embedded.kv_prompt, "answer_tokens": 1}
    yield from measure(model, tokenizer, length, samples, seed, **{"answer_tokens": ANSWER_TOKENS} | settings | options)
