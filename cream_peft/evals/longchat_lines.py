"""LongChat-Lines (LMSYS LongEval; arXiv 2308.10882): lines named by two words, each holding a number, one asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from .answers import measure
from .prompts import FIFTHS, Drawn, Prompt, Writer, first_integer, generator, one_of, position

PAPER_LENGTHS = (
    2500, 3600, 4200, 4800, 6000, 7100, 9400, 11800, 14000, 16000, 17500, 20000, 22000, 26000, 28000, 30000, 32000
)  # fmt: skip
"""The 17 lengths in tokens of the CREAM paper."""
# DachengLi1/LongChat, longeval/utils.py, generate_lines_testcases
HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
HIGHEST = 50_000
ANSWER_TOKENS = 35
ADJECTIVES = """
    able airy ample ancient angry apt arid ashen awake bald bare basic bitter blank bleak blind blunt bold brave brief
    bright brisk broad busy calm careful cheap chief civil clean clear clever close coarse cold common cool coy crisp
    cruel curly damp dark dear deep dense dim dizzy double dry dull dusty eager early easy elder empty equal even exact
    faint fair famous fancy fast fertile fierce fine firm flat fond formal frail frank free fresh full gentle giant glad
    golden grand gray great green grim happy hard harsh hasty heavy hollow honest huge humble hungry icy idle jolly keen
    kind large late lazy lean light lively local lone long loose loud loyal lucky mellow merry mild modest narrow
"""
NOUNS = """
    acorn actor anchor apple apron arrow autumn badge baker banjo barley barn basin basket beach beacon beard bell bench
    berry bird blanket boat bottle branch bread brick bridge broom brush bucket button cabin cable camel candle canoe
    canyon carpet castle cellar chair chapel cherry circle clock cloud coat comet copper corner cottage cousin cradle
    crane cricket crown curtain daisy desert diary donkey dragon drawer drum eagle engine falcon farmer feather fence
    ferry fiddle field finger flame flute forest fountain fox garden garlic gate glove goose grape guitar hammer harbor
    hatch hedge helmet heron hill honey horse island ivory jacket jewel kettle kitchen ladder lantern lemon letter
"""


def _lines(rng: np.random.Generator) -> Drawn:
    """(name, number) of each line; no name twice."""
    adjectives, nouns, seen = ADJECTIVES.split(), NOUNS.split(), set()

    def line() -> tuple[str, int]:
        name = f"{one_of(adjectives, rng)}-{one_of(nouns, rng)}"
        while name in seen:
            # There are as many names as words can be put in a row.
            name = f"{one_of(adjectives, rng)}-{name}"
        seen.add(name)
        return name, int(rng.integers(1, HIGHEST + 1))

    return Drawn(line)


def lines_prompt(
    writer: Writer,
    length: int,
    depth: float,
    index: int,
    seed: int,
    *,
    lines: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """One question over `lines` lines, or as many as `length` tokens hold. Every depth asks the same document."""
    drawn = _lines(generator("longchat_lines", seed, length, index))

    def build(count: int) -> tuple[str, str]:
        document = drawn.first(count)
        name = document[position(depth, count)][0]
        record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in document)
        question = f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
        # How the original has a base model go on (mpt-7b-storywriter).
        return f"{HEADER}{record}\n{question}", f" Line <{name}>: <REGISTER_CONTENT> is"

    count = writer.fitted(build, length, answer_tokens, "line", lines)
    asked = position(depth, count)
    name, number = drawn.first(count)[asked]
    said = f"The <REGISTER_CONTENT> in line {name} is <"
    return writer.prompt(*build(count), said=said, answer=str(number), depth=depth, lines=count, position=asked)


def longchat_lines(
    model: Any,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    *,
    depths: Collection[float] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Share of answers whose first integer is the line's number, as the CREAM paper grades it (LongEval: the last).

    Args:
        depths: where the line stands; the original draws it anywhere.
        options: lines (this many instead of as many as fit, as LongEval's 200 to 680), and those of
            `generation.measure`, whose yields these are. The paper's style is vicuna, for base models too.
    """
    settings = {"prompt": lines_prompt, "grade": first_integer, "depths": depths or FIFTHS}
    settings["shared_document"] = True
    yield from measure(model, tokenizer, length, samples, seed, **{"answer_tokens": ANSWER_TOKENS} | settings | options)
