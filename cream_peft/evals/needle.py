"""Facts hidden in a long text: needle and its kin of several needles, passkey and variable_tracking.

needle: gkamradt/LLMTest_NeedleInAHaystack, but the fact is a number drawn from the seed, so that no second model is
needed to grade the answer. multikey_needle: RULER (arXiv 2404.06654), a needle at every depth of one text; each is
asked for, the others are distractors. multi_value, multi_query, variable_tracking: RULER's; all that is asked for lies
anywhere in the text, and none of it may be missing. passkey: Mohtashami and Jaggi (arXiv 2305.16300), also PoSE's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from .prompts import WORDS, Case, Prompt, Request, TaskError, Writer, drawn, one_of, prompt_rng, read_texts

NEEDLE = "The special magic number of {city} is {answer}."
QUESTION = "What is the special magic number of {city}?"
INSTRUCTION = "Answer from the text above only, with nothing but the number."
SEVERAL = "Answer from the text above only, with nothing but the numbers."
ONE_OF_THE_NEEDLES = "One of the special magic numbers of {city} is {answer}."
NEEDLES = 4
"""As RULER has them, which also has as many hops of a chain."""
LOWEST, HIGHEST = 10_000, 99_999
# NVIDIA/RULER, scripts/data/synthetic/constants.py; the misspelling is the original's.
TRACKING_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TRACKING_QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
TRACKING_LEAD = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are:"
)
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
    request: Request,
    unit: str = "sentence",
) -> Prompt:
    """As many units as fit, `needles` (depth, sentence) between them, {text} of the request's own text."""

    def build(count: int) -> Request:
        text = haystack(count)
        # From the end, so that those before stay where they are.
        for depth, needle in reversed(needles):
            text.insert(int(depth * count + 0.5), f" {needle}")
        whole = request.text.replace("{text}", "".join(text).strip())
        return replace(request, text=whole, extra={f"{unit}s": count})

    return writer.fitted(case, build, unit)


def _asked(question: str, said: str, answer: str, instruction: str = INSTRUCTION) -> Request:
    return Request(f"{{text}}\n\n{question} {instruction}", "\nAnswer:", said, answer, {})


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
    hidden = needle.format(**names)
    request = _asked(question.format(**names), hidden.partition(names["answer"])[0], names["answer"])
    return _hidden(writer, case, _haystack(sentences, rng), [(case.depth, hidden)], request)


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
    question, answer = QUESTION.format(city=drawn_cities[asked]), str(numbers[asked])
    request = _asked(question, needles[asked][1].partition(answer)[0], answer)
    return _hidden(writer, case, _haystack(sentences, rng), needles, request)


def several_prompt(writer: Writer, case: Case, *, task: str, cities: int, sentences: list[str] | None = None) -> Prompt:
    """Four needles anywhere in a haystack, about one city or about four; all four numbers are asked for."""
    rng = prompt_rng(task, case.seed, case.length, case.index)
    named = rng.permutation(WORDS["cities"])[:cities].tolist()
    numbers = (LOWEST + rng.choice(HIGHEST - LOWEST + 1, size=NEEDLES, replace=False)).tolist()
    form = NEEDLE if cities > 1 else ONE_OF_THE_NEEDLES
    hidden = [
        form.format(city=city, answer=number) for city, number in zip(itertools.cycle(named), numbers, strict=False)
    ]
    needles = sorted(zip(rng.random(NEEDLES).tolist(), hidden, strict=True))
    several = named[0] if cities == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    question = f"What are all the special magic numbers of {several}?"
    request = _asked(question, f"The special magic numbers of {several} are ", ", ".join(map(str, numbers)), SEVERAL)
    return _hidden(writer, case, _haystack(sentences, rng), needles, request)


def variable_tracking_prompt(writer: Writer, case: Case) -> Prompt:
    """A chain of five variables among idle sentences; the first has a value, each other that of the one before."""
    rng = prompt_rng("variable_tracking", case.seed, case.length, case.index)
    letters = rng.choice(26 * 26, size=NEEDLES + 1, replace=False).tolist()
    # Two letters that no other name begins with, then any three.
    names = [
        "".join(chr(65 + n) for n in (pair // 26, pair % 26, *rng.integers(26, size=3).tolist())) for pair in letters
    ]
    value = str(rng.integers(LOWEST, HIGHEST + 1))
    chain = [f"VAR {name} = {of}" for name, of in zip(names, [value, *(f"VAR {name}" for name in names)], strict=False)]
    needles = list(zip(sorted(rng.random(len(chain)).tolist()), chain, strict=True))
    text = f"{TRACKING_TASK}{{text}}\n{TRACKING_QUESTION.format(value=value)}"
    lead = TRACKING_LEAD.format(value=value, count=len(names))
    request = Request(text, lead, "The variables are ", ", ".join(names), {})
    return _hidden(writer, case, drawn(lambda: f"\n{GARBAGE}"), needles, request, "repeat")


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
