"""One fact hidden in a long text: needle, multikey_needle and passkey.

needle: gkamradt/LLMTest_NeedleInAHaystack, but the fact is a number drawn from the seed, so that no second model is
needed to grade the answer. multikey_needle: RULER (arXiv 2404.06654), a needle at every depth of one text; each is
asked for, the others are distractors. passkey: Mohtashami and Jaggi (arXiv 2305.16300), also PoSE's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .prompts import WORDS, Case, Prompt, Request, TaskError, Writer, drawn, one_of, prompt_rng, read_texts

NEEDLE = "The special magic number of {city} is {answer}."
QUESTION = "What is the special magic number of {city}?"
INSTRUCTION = "Answer from the text above only, with nothing but the number."
LOWEST, HIGHEST = 10_000, 99_999
# epfml/landmark-attention, llama/run_test.py
PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HIGHEST_PASSKEY = 50_000


def split_sentences(path: str | Path) -> list[str]:
    """The sentences of a file or folder, each with the blank before it: joined, they are the text again."""
    return [sentence for text in read_texts(path) for sentence in re.split(r"(?<=[.!?])(?=\s)", text) if sentence]


def _haystack(sentences: list[str] | None, rng: np.random.Generator) -> Callable[[int], list[str]]:
    """`sentences` from a random place on, starting over after the last; None: invented ones, without digits."""
    if sentences:
        turned = itertools.islice(itertools.cycle(sentences), int(rng.integers(len(sentences))), None)
        return drawn(lambda: next(turned))

    def invented() -> str:
        pattern = one_of(WORDS["sentences"], rng)
        text = pattern.format(**{slot: one_of(WORDS[slot], rng) for slot in ("who", "where", "when", "what")})
        return ("\n\n" if rng.random() < 0.15 else " ") + text[0].upper() + text[1:]

    return drawn(invented)


def _hidden(
    writer: Writer,
    case: Case,
    haystack: Callable[[int], list[str]],
    needles: list[tuple[float, str]],
    question: str,
    answer: str,
) -> Prompt:
    """As many sentences as fit, `needles` (depth, sentence) between them, and a question about the one at the depth."""
    said = dict(needles)[case.depth].partition(answer)[0]

    def build(count: int) -> Request:
        text = haystack(count)
        # From the end, so that those before stay where they are.
        for depth, needle in reversed(needles):
            text.insert(int(depth * count + 0.5), f" {needle}")
        asked = "".join(text).strip() + f"\n\n{question} {INSTRUCTION}"
        return Request(asked, "\nAnswer:", said, answer, {"sentences": count})

    return writer.fitted(case, build, "sentence")


def needle_prompt(
    writer: Writer, case: Case, *, sentences: list[str] | None = None, needle: str = NEEDLE, question: str = QUESTION
) -> Prompt:
    """One needle in a haystack of `sentences`, or of invented ones.

    `needle` must name {answer}, the number, and may name {city}, as may `question`.
    """
    if "{answer}" not in needle:
        raise TaskError(f"needle={needle!r} has no place for the answer: write {{answer}} where the number goes")
    rng = prompt_rng("needle", case.seed, case.length, case.depth, case.index)
    names = {"city": one_of(WORDS["cities"], rng), "answer": str(rng.integers(LOWEST, HIGHEST + 1))}
    needles = [(case.depth, needle.format(**names))]
    return _hidden(writer, case, _haystack(sentences, rng), needles, question.format(**names), names["answer"])


def multikey_prompt(writer: Writer, case: Case, *, sentences: list[str] | None = None) -> Prompt:
    """A needle at each of `case.depths`, each about a city of its own. The text is the same at every depth."""
    places, cities = sorted(case.depths), WORDS["cities"]
    if len(places) > len(cities):
        raise TaskError(f"multikey_needle has {len(cities)} cities: give at most so many depths")
    rng = prompt_rng("multikey_needle", case.seed, case.length, case.index)
    drawn_cities = rng.permutation(cities)[: len(places)].tolist()
    numbers = (LOWEST + rng.choice(HIGHEST - LOWEST + 1, size=len(places), replace=False)).tolist()
    rows = zip(places, drawn_cities, numbers, strict=True)
    needles = [(place, NEEDLE.format(city=city, answer=number)) for place, city, number in rows]
    asked = places.index(case.depth)
    question = QUESTION.format(city=drawn_cities[asked])
    return _hidden(writer, case, _haystack(sentences, rng), needles, question, str(numbers[asked]))


def passkey_prompt(writer: Writer, case: Case) -> Prompt:
    """A number among idle sentences, repeated as often as they fit."""
    key = int(prompt_rng("passkey", case.seed, case.length, case.depth, case.index).integers(1, HIGHEST_PASSKEY + 1))

    def build(count: int) -> Request:
        before = int(case.depth * count + 0.5)
        information = f"The pass key is {key}. Remember it. {key} is the pass key."
        garbage = [" ".join([GARBAGE] * repeats) for repeats in (before, count - before)]
        text = "\n".join([PASSKEY_TASK, garbage[0], information, garbage[1], "What is the pass key?"])
        return Request(text, " The pass key is", "The pass key is ", str(key), {"repeats": count})

    return writer.fitted(case, build, "repeat")
