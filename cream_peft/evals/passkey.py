"""Pass-key retrieval (Mohtashami and Jaggi, arXiv 2305.16300, also PoSE's): a number among idle sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from .answers import measure
from .prompts import FIFTHS, Prompt, Writer, first_integer, generator

# epfml/landmark-attention, llama/run_test.py
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION, LEAD = "What is the pass key?", " The pass key is"
HIGHEST = 50_000
ANSWER_TOKENS, SENTENCE_TOKENS = 10, 35


def passkey_prompt(
    writer: Writer, length: int, depth: float, index: int, seed: int, *, answer_tokens: int = ANSWER_TOKENS
) -> Prompt:
    """One question, the idle sentences repeated as often as `length` tokens hold."""
    key = int(generator("passkey", seed, length, depth, index).integers(1, HIGHEST + 1))

    def build(count: int) -> tuple[str, str]:
        before = int(depth * count + 0.5)
        information = f"The pass key is {key}. Remember it. {key} is the pass key."
        garbage = [" ".join([GARBAGE] * repeats) for repeats in (before, count - before)]
        return "\n".join([TASK, garbage[0], information, garbage[1], QUESTION]), LEAD

    count = writer.fitted(build, length, answer_tokens, "repeat")
    return writer.prompt(*build(count), said=f"{LEAD.strip()} ", answer=str(key), depth=depth, repeats=count)


def passkey(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    depths: Collection[float] | None = None,
    style: str = "auto",
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Share of answers whose first integer is the pass key, as the originals grade it.

    Args:
        depths: where the key stands; the originals draw it anywhere.
        options: those of `generation.measure`, whose yields these are.
    """
    # The originals' 10 tokens are for the bare number; a chat model answers in a sentence.
    room = ANSWER_TOKENS if Writer(tokenizer, style).style == "plain" else SENTENCE_TOKENS
    settings = {"prompt": passkey_prompt, "grade": first_integer, "depths": depths or FIFTHS, "style": style}
    yield from measure(model, tokenizer, length, samples, seed, **{"answer_tokens": room} | settings | options)
