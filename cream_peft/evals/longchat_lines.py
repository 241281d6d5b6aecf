"""LongChat-Lines (LMSYS LongEval; arXiv 2308.10882): lines named by two words, each holding a number, one asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .prompts import WORDS, Case, Prompt, Request, Writer, drawn, one_of, position, prompt_rng

# DachengLi1/LongChat, longeval/utils.py, generate_lines_testcases
HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
HIGHEST = 50_000


def drawn_lines(rng: np.random.Generator) -> Callable[[int], list[tuple[str, int]]]:
    """(name, number) of each line; no name twice."""
    adjectives, nouns = WORDS["adjectives"], WORDS["nouns"]
    seen: set[str] = set()

    def line() -> tuple[str, int]:
        name = f"{one_of(adjectives, rng)}-{one_of(nouns, rng)}"
        while name in seen:
            # A longer name is always left.
            name = f"{one_of(adjectives, rng)}-{name}"
        seen.add(name)
        return name, int(rng.integers(1, HIGHEST + 1))

    return drawn(line)


def lines_prompt(writer: Writer, case: Case, *, lines: int = 0) -> Prompt:
    """One of `lines` lines (LongEval: 200 to 680), or of as many as fit. The document is the same at every depth."""
    record = drawn_lines(prompt_rng("longchat_lines", case.seed, case.length, case.index))

    def build(count: int) -> Request:
        asked, document = position(case.depth, count), record(count)
        text = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in document)
        name, number = document[asked]
        question = f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
        # How the original begins a base model's answer (mpt-7b-storywriter).
        lead = f" Line <{name}>: <REGISTER_CONTENT> is"
        said = f"The <REGISTER_CONTENT> in line {name} is <"
        return Request(f"{HEADER}{text}\n{question}", lead, said, str(number), {"lines": count, "position": asked})

    return writer.fitted(case, build, "line", lines)
