"""A picture of the position strategies: the segments that are fed, and the positions that they are given."""

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..positions import POSITION_STRATEGIES, generator

LINES = {"contiguous": "k:", "PoSE": "b--", "CREAM": "r-"}
NAMES = {1: ["all tokens"], 2: ["first chunk", "second chunk"], 3: ["head", "middle", "tail"]}
LOOKS = (("#d9d9d9", ""), ("#f4a582", "////"), ("#92c5de", "...."))


def segments_of(strategy: str, context_length: int, target_length: int, row: int) -> list[tuple[int, int]]:
    """(first position, tokens) of each segment of one example, from a document of `target_length` tokens."""
    draw = POSITION_STRATEGIES[strategy.lower()]
    _, position_ids = draw(target_length, context_length, target_length, generator(0, 0, row))
    runs = np.split(position_ids, np.flatnonzero(np.diff(position_ids) > 1) + 1)
    return [(int(run[0]), len(run)) for run in runs]


def _draw_example(axes: Axes, place: int, segments: list[tuple[int, int]]) -> None:
    """The tokens that are fed, side by side, and below them the same segments at their positions."""
    fed = 0
    for (first, tokens), (color, hatch), name in zip(segments, LOOKS, NAMES[len(segments)], strict=False):
        for left, height in ((fed, place - 0.3), (first, place + 0.1)):
            axes.barh(height, tokens, 0.16, left, color=color, hatch=hatch, edgecolor="black", linewidth=0.8)
        corners = [fed, fed + tokens, first + tokens, first], [place - 0.22] * 2 + [place + 0.02] * 2
        axes.fill(*corners, facecolor=color, edgecolor="#555555", alpha=0.4)
        axes.annotate(name, (first, place + 0.2), (2, 0), textcoords="offset points", va="top")
        fed += tokens


def _draw_shares(below: list[Axes], label: str, examples: list[list[tuple[int, int]]], target_length: int) -> None:
    """The share of examples that hold a position, and of those that hold two positions so far apart."""
    counts = np.zeros((2, target_length))
    for segments in examples:
        seen = np.zeros(counts.shape, dtype=bool)
        for index, (first, tokens) in enumerate(segments):
            seen[0, first : first + tokens] = True
            for later, length in segments[index:]:
                seen[1, max(0, later - first - tokens + 1) : later - first + length] = True
        counts += seen
    for axes, count in zip(below, counts, strict=True):
        axes.plot(100 * count / len(examples), LINES[label], label=label)


def positions_figure(context_length: int, target_length: int, rows: int = 2000) -> Figure:
    """One example of each strategy (CREAM: one of each branch); below, how many of `rows` examples train what."""
    with rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        top, *below = figure.subplot_mosaic([["top"] * 2, ["a", "b"]], height_ratios=[2.6, 1]).values()
        drawn: dict[str, list[tuple[int, int]]] = {}
        for label, count in zip(LINES, NAMES, strict=True):
            examples = [segments_of(label, context_length, target_length, row) for row in range(rows)]
            _draw_shares(below, label, examples, target_length)
            for example in examples:
                kind = "\n(equal parts)" if example[0][1] == context_length // 3 else "\n(short ends)"
                if len(example) == count:
                    drawn.setdefault(label + kind * (label == "CREAM"), example)
        for place, example in enumerate(drawn.values()):
            _draw_example(top, place, example)
        top.set(yticks=range(len(drawn)), yticklabels=list(drawn), ylim=(len(drawn) - 0.45, -0.5))
        top.text(context_length * 1.1, -0.1, f"the {context_length:,} tokens fed\n\n\ntheir positions", va="center")
        for axes, what in zip((top, *below), ("position", "position", "distance between two tokens"), strict=True):
            axes.set(xlim=(0, target_length * 1.02), xticks=np.linspace(0, target_length, 5), xlabel=f"{what} (tokens)")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        below[0].legend(title="% of examples with it", loc="upper center")
        return figure
