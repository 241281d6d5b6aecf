"""Needle in a haystack (gkamradt/LLMTest_NeedleInAHaystack): one fact at a depth of a long text, length by depth.

The fact here is a number drawn from the seed, so that the grade is exact and needs no second model to judge it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import embedded
from .answers import measure
from .prompts import Drawn, Prompt, TaskError, Writer, contains, first_integer, generator, one_of, read_texts

NEEDLE = "The special magic number of {city} is {answer}."
QUESTION = "What is the special magic number of {city}?"
INSTRUCTION = "Answer from the text above only, with nothing but the number."
TENTHS = tuple(round(tenth / 10, 1) for tenth in range(11))
LOWEST, HIGHEST = 10_000, 99_999
ANSWER_TOKENS = 50
CITIES = (
    "Amsterdam Athens Bergen Bogota Cairo Chicago Dakar Dublin Geneva Havana Helsinki Istanbul Jakarta Kyoto Lima "
    "Lisbon London Lyon Madrid Manila Mumbai Nairobi Naples Oslo Paris Prague Quito Riga Rome Seoul Sydney Vienna"
)
WORDS = {
    "who": "the baker|the old sailor|my neighbour|the schoolteacher|a young clerk|the gardener|her cousin|the postman|"
    "the miller|a tired nurse|the librarian|his sister|the carpenter|a quiet boy|the shopkeeper|our captain",
    "where": "the harbour|the market square|the upper valley|the railway station|the old bridge|the orchard|"
    "the city library|the lighthouse|the mill|the far shore|the town hall|the quarry|the chapel|the river bank",
    "when": "in early spring|before the storm|late that evening|on market day|after the harvest|at first light|"
    "during the long winter|on the following morning|towards midnight|as the bells rang|once the guests had left",
    "what": "a wooden chest|the broken clock|a bundle of letters|the new lantern|a sack of flour|an unfinished map|"
    "the brass key|a pair of boots|a jar of honey|the family album|a coil of rope|the painted sign",
}
SENTENCES = """
{who} walked to {where} {when} and said nothing about it to anyone.
Nobody remembered who had left {what} near {where}.
{when}, the road to {where} was covered with wet leaves.
It took {who} most of the day to repair {what}.
There was a smell of smoke and rain around {where}.
{who} had always believed that patience was worth more than skill.
{when}, {who} carried {what} all the way to {where}.
The children laughed when {who} slipped on the stairs.
A narrow path led from {where} down to the water.
{who} wrote a long letter and then decided not to send it.
People said that {what} had once belonged to {who}.
The wind turned {when}, and the boats came home early.
{who} kept {what} under the bed for as long as anyone could recall.
From {where} one could see the hills and the smoke of distant farms.
{when}, the lamps were lit one after another.
"We should have started sooner," said {who}, looking towards {where}.
A dog barked behind the wall, and then it was quiet again.
{who} sold {what} to a stranger who was passing through.
The soup was too salty, but {who} praised it all the same.
Every summer {who} painted the shutters of the house by {where}.
{when}, a cart loaded with apples stopped in front of {where}.
Some thought that {where} was haunted, though {who} only shook a head at that.
{what} stood on the shelf between a mirror and an empty vase.
{who} had learned the trade from an uncle who never wasted a word.
The meeting at {where} lasted longer than anybody had expected.
It snowed {when}, and the trains did not run.
{who} counted the steps up to {where} and lost count halfway.
Behind {where} there was a small field where goats were grazing.
"Leave {what} where it is," said {who}, and closed the door.
The river had risen {when}, and the ferry could not cross.
{who} read the newspaper aloud, skipping whatever seemed dull.
Two visitors asked the way to {where} and were sent in the wrong direction.
{when}, {who} found {what} behind a loose board.
The music could be heard as far as {where}.
{who} never spoke of the journey again, but kept the ticket.
In the corner lay {what}, covered with a thin layer of dust.
They agreed to meet at {where}, and only {who} came on time.
The tea had gone cold {when}, and still nobody got up.
{who} planted beans along the fence and hoped for a mild season.
A painter set up an easel near {where} and stayed until dusk.
{who} borrowed {what} and forgot to bring it back.
{when}, there were rumours that {where} would be sold.
The map was wrong: {where} lay on the other side of the hill.
{who} listened to the rain and thought about the years abroad.
It was {who} who noticed that {what} had been moved.
The bread was still warm when {who} brought it to {where}.
Somebody had tied a red ribbon around {what}.
{when}, the whole street gathered in front of {where} to watch.
{who} preferred the longer way, because it passed by {where}.
The key did not fit, so {who} climbed in through the window.
A letter arrived {when}, but the ink had run and it could not be read.
{who} wrapped {what} in an old coat and set off.
For a while the only sound at {where} was the ticking of a clock.
{who} offered to trade {what} for a good pair of gloves.
No one could say how {what} had come to {where}.
{when}, {who} swept the yard and fed the hens.
The floor creaked, and {who} stood still for a long moment.
On the way back from {where} the wheel broke, and they had to walk.
{who} had a habit of humming while sorting the mail.
"There is nothing left to decide," said {who}, {when}.
""".strip().splitlines()
"""The embedded haystack: no digits, so that the needle is the only number."""


def _invented(rng: np.random.Generator) -> Drawn:
    """Sentences that begin with a blank, or with an empty line where a paragraph begins."""
    words = {slot: choices.split("|") for slot, choices in WORDS.items()}

    def sentence() -> str:
        text = one_of(SENTENCES, rng).format(**{slot: one_of(choices, rng) for slot, choices in words.items()})
        return ("\n\n" if rng.random() < 0.15 else " ") + text[0].upper() + text[1:]

    return Drawn(sentence)


def drawn_haystack(sentences: list[str] | None, rng: np.random.Generator) -> Drawn:
    """`sentences` from a place drawn anew each time, and from the start again after their end; None: invented ones."""
    if not sentences:
        return _invented(rng)
    turned = itertools.islice(itertools.cycle(sentences), int(rng.integers(len(sentences))), None)
    return Drawn(lambda: next(turned))


def split_sentences(path: str | Path) -> list[str]:
    """The sentences of a file or folder, each with the blank before it: joined, they are the text again."""
    return [sentence for text in read_texts(path) for sentence in re.split(r"(?<=[.!?])(?=\s)", text) if sentence]


def needle_prompt(
    writer: Writer,
    length: int,
    depth: float,
    index: int,
    seed: int,
    *,
    sentences: list[str] | None = None,
    needle: str = NEEDLE,
    question: str = QUESTION,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """One needle at the end of a sentence, as many sentences around it as `length` tokens hold.

    `sentences` are the haystack, see `drawn_haystack`. `needle` and `question` may name {city}, the needle {answer}.
    """
    rng = generator("needle", seed, length, depth, index)
    names = {"city": one_of(CITIES.split(), rng), "answer": str(rng.integers(LOWEST, HIGHEST + 1))}
    haystack = drawn_haystack(sentences, rng)

    def build(count: int) -> tuple[str, str]:
        text = haystack.first(count)
        text.insert(int(depth * count + 0.5), " " + needle.format(**names))
        return "".join(text).strip() + f"\n\n{question.format(**names)} {INSTRUCTION}", "\nAnswer:"

    count = writer.fitted(build, length, answer_tokens, "sentence")
    said = needle.format(**names).partition(names["answer"])[0]
    return writer.prompt(*build(count), said=said, answer=names["answer"], depth=depth, sentences=count)


def needle(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    depths: Collection[float] | None = None,
    haystack: str | Path | None = None,
    needle: str = NEEDLE,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Share of answers whose first integer is the number of the needle, at each tenth of depth.

    Args:
        haystack: a text file, or a folder of .txt and .md files; None is the embedded text.
        needle: the fact; it may name {city} and must name {answer}.
        options: question (may name {city}), and those of `generation.measure`, whose yields these are.
    """
    if "{answer}" not in needle:
        raise TaskError(f"needle={needle!r} has no place for the answer: write {{answer}} where the number goes")
    sentences = None if haystack is None else split_sentences(haystack)
    settings = {"prompt": needle_prompt, "grade": first_integer, "depths": depths or TENTHS}
    if embedded.is_embedded(tokenizer):
        settings |= {"prompt": embedded.needle_prompt, "grade": contains, "answer_tokens": 1}
    else:
        settings |= {"needle": needle, "sentences": sentences}
    yield from measure(model, tokenizer, length, samples, seed, **{"answer_tokens": ANSWER_TOKENS} | settings | options)
