"""Words counted over a whole text: common_words and frequent_words, after RULER (arXiv 2404.06654).

The wording is that of NVIDIA/RULER, scripts/data/synthetic/constants.py; its solved example in the prompt is left out.
"""

from __future__ import annotations

import math

import numpy as np

from .longchat_lines import drawn_lines
from .prompts import Case, Prompt, Request, Writer, prompt_rng

COMMON_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{text}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_LEAD = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
FREQUENT_TASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FREQUENT_LEAD = " Answer: According to the coded text above, the three most frequently appeared words are:"
SHORT = 4096
"""Below so many tokens words are repeated less often."""


def common_words_prompt(writer: Writer, case: Case) -> Prompt:
    """Ten words of a shuffled list stand there 30 times, the others 3 times; below 4,096 tokens 6 times and once."""
    place = (case.seed, case.length, case.index)
    lines = drawn_lines(prompt_rng("common_words", *place))
    often, seldom = (30, 3) if case.length >= SHORT else (6, 1)

    def build(count: int) -> Request:
        words = [name for name, _ in lines(COMMON + count)]
        listed = words[:COMMON] * often + words[COMMON:] * seldom
        order = prompt_rng("common_words", *place, count).permutation(len(listed))
        text = " ".join(f"{number}. {listed[index]}" for number, index in enumerate(order, 1))
        said, answer = "The 10 most common words are ", ", ".join(words[:COMMON])
        return Request(COMMON_TASK.format(text=text), COMMON_LEAD, said, answer, {"words": len(listed)})

    return writer.fitted(case, build, "word")


def frequent_words_prompt(writer: Writer, case: Case) -> Prompt:
    """The three most frequent of coded words; the one of rank k stands there with a share of 1 / k**2 (Zipf's law).

    The first rank is dots, which are to be ignored.
    """
    place = (case.seed, case.length, case.index)
    rng = prompt_rng("frequent_words", *place)
    # As many different words as in RULER.
    codes = rng.choice(26**6, size=max(8, case.length // 50), replace=False).tolist()
    words = ["...", *("".join(chr(97 + code // 26**digit % 26) for digit in range(6)) for code in codes)]
    shares = np.arange(1, len(words) + 1) ** -2.0 * 6 / math.pi**2

    def build(count: int) -> Request:
        # With fewer, ranks 4 and 5 are as frequent.
        listed = np.repeat(words, ((100 + 10 * count) * shares).astype(int))
        order = prompt_rng("frequent_words", *place, count).permutation(len(listed))
        text = " ".join(listed[order].tolist())
        said, answer = "The three most frequent words are ", ", ".join(words[1:4])
        return Request(FREQUENT_TASK.format(text=text), FREQUENT_LEAD, said, answer, {"words": len(listed)})

    return writer.fitted(case, build, "word")
