"""Multi-key needle in a haystack (RULER, arXiv 2404.06654): a needle at every depth of one text, asked one by one.

The others are distractors, as alike as can be. All are asked of the same text, which is read once: so many answers cost
little more than one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .answers import measure
from .needle import CITIES, HIGHEST, INSTRUCTION, LOWEST, NEEDLE, QUESTION, drawn_haystack, split_sentences
from .prompts import Prompt, TaskError, Writer, first_integer, generator

DEPTHS = tuple(round((place + 0.5) / 16, 4) for place in range(16))
"""Middles of sixteen equal parts."""
ANSWER_TOKENS = 20


def multikey_prompt(
    writer: Writer,
    length: int,
    depth: float,
    index: int,
    seed: int,
    *,
    needles: Collection[float],
    sentences: list[str] | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """One question about a text of `length` tokens with a needle at each depth of `needles`, of which `depth` is one.

    Every depth asks the same text.
    """
    rng = generator("multikey_needle", seed, length, index)
    cities = rng.permutation(CITIES.split())[: len(needles)].tolist()
    numbers = (LOWEST + rng.choice(HIGHEST - LOWEST + 1, size=len(needles), replace=False)).tolist()
    haystack = drawn_haystack(sentences, rng)
    places = sorted(needles)
    asked = places.index(depth)

    def build(count: int) -> tuple[str, str]:
        text = haystack.first(count)
        # From the end, so that those before stay where they are.
        for place, city, number in reversed(list(zip(places, cities, numbers, strict=True))):
            text.insert(int(place * count + 0.5), " " + NEEDLE.format(city=city, answer=number))
        return "".join(text).strip() + f"\n\n{QUESTION.format(city=cities[asked])} {INSTRUCTION}", "\nAnswer:"

    count = writer.fitted(build, length, answer_tokens, "sentence")
    answer = str(numbers[asked])
    said = NEEDLE.format(city=cities[asked], answer=answer).partition(answer)[0]
    return writer.prompt(*build(count), said=said, answer=answer, depth=depth, sentences=count)


def multikey_needle(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    depths: Collection[float] | None = None,
    haystack: str | Path | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Share of answers whose first integer is the number of the city that was asked for, one of as many as `depths`.

    Args:
        depths: where needles stand; 16 by default, at most 32, one for each city.
        haystack: see `needle`.
        options: those of `generation.measure`, whose yields these are.
    """
    depths = tuple(depths or DEPTHS)
    if len(depths) > len(CITIES.split()):
        raise TaskError(f"multikey_needle has {len(CITIES.split())} cities: give at most so many depths")
    sentences = None if haystack is None else split_sentences(haystack)
    settings = {"prompt": multikey_prompt, "grade": first_integer, "depths": depths, "needles": depths}
    settings |= {"sentences": sentences, "answer_tokens": ANSWER_TOKENS, "shared_document": True}
    yield from measure(model, tokenizer, length, samples, seed, **settings | options)
