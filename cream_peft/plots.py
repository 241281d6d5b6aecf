"""Results JSON -> a picture: accuracy by length, and by depth at the longest length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .evals import mean_by

# Told apart by marker and dash too, so that a black-and-white print still reads.
STYLES = [("#888888", "o", ":"), ("#e08214", "s", "--"), ("#2166ac", "^", "-."), ("#b2182b", "D", "-")]


def plot_accuracy(
    results: dict[str, dict[str, Any]], path: str | Path, pretrained_window: int | None = None, title: str = ""
) -> Path:
    """Draw labelled results over one another and save the picture; the ending of `path` chooses PNG or SVG.

    Left: accuracy by length, the pretrained window marked. Right: accuracy by depth at the longest length.
    """
    figure, (by_length, by_depth) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    lengths = sorted({cell["length"] for result in results.values() for cell in result["cells"]})
    for index, (label, result) in enumerate(results.items()):
        color, marker, dash = STYLES[index % len(STYLES)]
        style = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 2, "label": label}
        points = mean_by(result["cells"], "length")
        by_length.plot([lengths.index(length) for length in points], list(points.values()), **style)
        points = mean_by([cell for cell in result["cells"] if cell["length"] == lengths[-1]], "depth")
        by_depth.plot(list(points), list(points.values()), **style)
    by_length.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    by_length.set(xlabel="document length (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03))
    if pretrained_window in lengths:
        place = lengths.index(pretrained_window)
        by_length.axvline(place, color="black", linewidth=1)
        by_length.annotate(
            "pretrained window", (place, 0.0), (4, 2), textcoords="offset points", rotation=90, va="bottom", fontsize=8
        )
    by_depth.set(xlabel=f"depth of the record in {lengths[-1]:,} tokens", xlim=(0, 1))
    for axes in (by_length, by_depth):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*by_length.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
