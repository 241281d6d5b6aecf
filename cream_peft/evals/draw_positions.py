"""A picture of the position strategies: the segments that are fed, and the positions that they are given."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..positions import POSITION_STRATEGIES, generator, options_of

SHOWN = ("contiguous", "pose", "cream")
LABELS = {"pose": "PoSE", "cream": "CREAM", "randpos": "RandPos"}
LINES = ("b-.", "g:", "r-", "k--", "m-", "c--", "y-")
NAMES = {"contiguous": ["all tokens"], "pose": ["first chunk", "second chunk"], "cream": ["head", "middle", "tail"]}
LOOKS = (("#d9d9d9", ""), ("#f4a582", "////"), ("#92c5de", "...."))
Segments = list[tuple[int, int]]
"""(first position, tokens) of each segment of one example."""


def parsed(strategy: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a strategy as it is written for the picture: `pose`, `pose,chunks=4`, `cream,sigma=inf`.

    Raises:
        ValueError: no such strategy or option, or a value that is no number.
    """
    name, *words = strategy.split(",")
    if name not in POSITION_STRATEGIES:
        raise ValueError(f"{strategy!r} is no position strategy: use one of {', '.join(POSITION_STRATEGIES)}")
    known, given = options_of(name), {}
    for word in words:
        option, _, value = word.partition("=")
        if option not in known:
            raise ValueError(f"{strategy!r}: {name} takes {', '.join(known) or 'no option'}, not {option}")
        try:
            given[option] = float(value) if known[option] is None else type(known[option])(value)
        except ValueError:
            raise ValueError(f"{strategy!r}: {option} must be a number") from None
    return name, given


def segments_of(strategy: str, context_length: int, target_length: int, row: int) -> Segments:
    """The segments of one example, from a document of `target_length` tokens."""
    name, options = parsed(strategy)
    rng = generator(0, 0, row)
    _, position_ids = POSITION_STRATEGIES[name](target_length, context_length, target_length, rng, **options)
    runs = np.split(position_ids, np.flatnonzero(np.diff(position_ids) > 1) + 1)
    return [(int(run[0]), len(run)) for run in runs]


def _draw_example(axes: Axes, place: int, segments: Segments, names: list[str]) -> None:
    """The tokens that are fed, side by side, and below them the same segments at their positions."""
    fed = 0
    # Names of another number of segments are not of these.
    shown = names if len(names) == len(segments) else [""] * len(segments)
    for (first, tokens), (color, hatch), name in zip(segments, cycle(LOOKS), shown, strict=False):
        for left, height in ((fed, place - 0.3), (first, place + 0.1)):
            axes.barh(height, tokens, 0.16, left, color=color, hatch=hatch, edgecolor="black", linewidth=0.8)
        corners = [fed, fed + tokens, first + tokens, first], [place - 0.22] * 2 + [place + 0.02] * 2
        axes.fill(*corners, facecolor=color, edgecolor="#555555", alpha=0.4)
        if name:
            axes.annotate(name, (first, place + 0.2), (2, 0), textcoords="offset points", va="top")
        fed += tokens


def _draw_shares(below: list[Axes], line: str, label: str, examples: list[Segments], target_length: int) -> None:
    """The share of examples that hold a position, and of those that hold two positions so far apart."""
    counts = np.zeros((2, target_length))
    for segments in examples:
        first, tokens = np.array(segments).T
        one, other = np.triu_indices(len(segments))
        nearest = np.maximum(0, first[other] - first[one] - tokens[one] + 1)
        farthest = first[other] + tokens[other] - first[one] - 1
        for count, begin, end in ((counts[0], first, first + tokens), (counts[1], nearest, farthest + 1)):
            size = target_length + 1
            count += np.cumsum(np.bincount(begin, minlength=size) - np.bincount(end, minlength=size))[:-1] > 0
    for axes, count in zip(below, counts, strict=True):
        axes.plot(100 * count / len(examples), line, label=label)


def _typical(strategy: str, examples: list[Segments], context_length: int) -> dict[str, Segments]:
    """Label -> an example with the median number of segments; of CREAM one of each branch."""
    name, _, options = strategy.partition(",")
    label = f"{LABELS.get(name, name)} {options}".strip()
    found: dict[str, Segments] = {}
    usual = sorted(len(example) for example in examples)[len(examples) // 2]
    for example in examples:
        if len(example) == usual:
            branch = "\n(equal parts)" if example[0][1] == context_length // 3 else "\n(short ends)"
            found.setdefault(label + branch * (name == "cream"), example)
    return found


def positions_figure(
    context_length: int, target_length: int, rows: int = 2000, strategies: Sequence[str] = SHOWN
) -> Figure:
    """One example of each strategy (CREAM: one of each branch); below, how many of `rows` examples train what.

    Raises:
        ValueError: a strategy that `parsed` refuses, or what the strategy does.
    """
    with rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        top, *below = figure.subplot_mosaic([["top"] * 2, ["a", "b"]], height_ratios=[2.6, 1]).values()
        place, labels = 0, []
        for strategy, line in zip(strategies, cycle(LINES), strict=False):
            examples = [segments_of(strategy, context_length, target_length, row) for row in range(rows)]
            drawn = _typical(strategy, examples, context_length)
            _draw_shares(below, line, next(iter(drawn)).split("\n")[0], examples, target_length)
            for example in drawn.values():
                _draw_example(top, place, example, NAMES.get(strategy.split(",")[0], []))
                place += 1
            labels += drawn
        top.set(yticks=range(place), yticklabels=labels, ylim=(place - 0.45, -0.5))
        top.text(context_length * 1.1, -0.1, f"the {context_length:,} tokens fed\n\n\ntheir positions", va="center")
        for axes, what in zip((top, *below), ("position", "position", "distance"), strict=True):
            axes.set(xlim=(0, target_length * 1.02), xticks=np.linspace(0, target_length, 5), xlabel=f"{what} (tokens)")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        below[0].legend(loc="upper center")
        below[0].set_ylabel("% of examples with it")
        return figure
