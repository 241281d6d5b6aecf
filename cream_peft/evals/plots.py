"""Results of `cream-peft evaluate` -> pictures: accuracy by length and by depth, needle heat maps, perplexity.

Pictures are at most 9 inches wide, which a README shows at about 900 pixels, so that a font of 9 points stays one.
Nothing is told apart by colour alone. Intervals are Wilson's and take the samples for independent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from .results import Cell, Compared, Results, interval, mean_by

WIDTH = 9.0
CHARACTER = 0.08  # Inches that one of the 9 point font takes, about.
MAX_PANELS = 6
MAX_BARS = 60  # Intervals in one of several panels, above which they are left out: they would hide the lines.
MAX_VALUES = 480  # Cells of a picture up to which values are written in: more make a heavy file.

SHARE = "accuracy (share right)"
INTERVAL = f"{SHARE}\nbars: 95 % interval"
DEPTH = "depth (0 = start, 1 = end)"
LOOK = Path(__file__).parent / "plots.mplstyle"


def length_label(length: int) -> str:
    """4096 -> 4K, 2500 -> 2,500 (tokens)."""
    return f"{length // 1024:,}K" if length % 1024 == 0 else f"{length:,}"


def _metrics(results: Compared, shown: str | None = None) -> dict[str, str]:
    """task -> metric; refuses results without cells and, unless `shown` is None, all but one task of that metric."""
    metrics = dict(sorted((cell.task, cell.metric) for cell in _cells(results)))
    if not metrics:
        raise ValueError("nothing to draw: the results have no cells; `cream-peft evaluate` fills them")
    if shown and list(metrics.values()) != [shown]:
        found = ", ".join(f"{task} ({metric})" for task, metric in metrics.items())
        raise ValueError(f"this kind of picture shows {shown}, of one task, not {found}: set another --kind or --task")
    return metrics


def _cells(results: Compared) -> list[Cell]:
    return [cell for result in results.values() for cell in result.cells]


def _all(results: Compared, key: str) -> list[Any]:
    return sorted({getattr(cell, key) for cell in _cells(results)})


def _draw_line(axes: Axes, place: int, models: int, values: dict[Any, float], reach: Any = None) -> None:
    """Draw the next model, `place` of `models`: values, and bars that reach [2, values] below and above them."""
    line = axes.errorbar(list(values), list(values.values()), yerr=reach, elinewidth=0.8, clip_on=False)
    # Some points aside, so that equal values do not hide each other.
    points = (place - (models - 1) / 2) * min(3.0, 10 / models)
    for artist in line.get_children():
        # The layout is lost where a model has nothing to draw.
        artist.set_in_layout(False)
        artist.set_transform(artist.get_transform() + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans))


def _draw_accuracy(axes: Axes, results: Compared, key: str, length: int | None = None, bars: bool = True) -> None:
    """A line a model: accuracy by `key` (length or depth) of the cells of `length`, of all if None, with intervals."""
    for place, result in enumerate(results.values()):
        cells = [cell for cell in result.cells if length in (None, cell.length)]
        values = mean_by(cells, key)
        bounds = [interval([cell for cell in cells if getattr(cell, key) == at]) for at in values]
        # abs, as rounding may leave -1e-17, which matplotlib refuses.
        reach = np.abs(np.reshape(bounds, (-1, 2)).T - list(values.values()))
        _draw_line(axes, place, len(results), values, reach if bars else None)
    axes.set(ylim=(-0.03, 1.03), yticks=np.linspace(0, 1, 6))
    axes.grid(axis="y", alpha=0.3)
    if key == "depth":
        axes.set(xlim=(-0.03, 1.03), xticks=np.linspace(0, 1, 5))
        axes.xaxis.set_major_formatter("{x:g}")


def _length_axis(axes: Axes, results: Compared) -> None:
    """A logarithmic axis of lengths, with a tick at each and a label where there is room, and the windows marked."""
    lengths = _all(results, "length")
    first, last = lengths[0], lengths[-1]
    margin = (last / first) ** 0.05 if last > first else 2.0
    labelled = [first]
    for length in lengths[1:]:
        if length == last or min(length / labelled[-1], last / length) >= (last / first) ** 0.1:
            labelled.append(length)
    axes.set_xscale("log", base=2)
    axes.set_xticks(labelled, [length_label(length) for length in labelled])
    axes.set_xticks(lengths, [""] * len(lengths), minor=True)
    axes.set(xlim=(first / margin, last * margin), xlabel="length (tokens)")
    windows = {window for result in results.values() if (window := result.settings.pretrained_window)}
    for row, window in enumerate(sorted(windows)):
        if first / margin <= window <= last * margin:
            axes.axvline(window, color="black", linewidth=1, zorder=1)
            label, above = f"pretrained window {length_label(window)}", axes.get_xaxis_transform()
            axes.annotate(label, (window, 1.0), (0, 3 + 11 * row), above, "offset points", ha="center", va="bottom")


def _grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `width` inches and `panels` panels in rows of `height` inches, with labels at the outer ones."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width, 1.0 + rows * height), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.remove()
    for axes in grid[panels - columns : panels]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:panels]


def _finish(figure: Figure, axes: Axes, results: Compared, title: str) -> Figure:
    """Put the legend of `axes` below, for which the figure grows, and the title above."""
    room = int(WIDTH / CHARACTER) - 8
    labels = [textwrap.fill(label, room) for label in results]
    columns = max(1, min(4, room // (8 + max(len(line) for label in labels for line in label.split("\n")))))
    lines = math.ceil(len(labels) / columns) * (1 + max(label.count("\n") for label in labels))
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)
    handles: list[Any] = list(axes.containers)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)
    figure.suptitle(textwrap.fill(title, 90))
    return figure


@matplotlib.rc_context(fname=LOOK)
def accuracy_figure(results: Compared, title: str = "") -> Figure:
    """Accuracy by length over all depths, and beside it by depth, if there are depths, at the longest length that all
    have."""
    _metrics(results, shown="accuracy")
    lengths, depths = [{cell.length for cell in result.cells} for result in results.values()], _all(results, "depth")
    longest = max(set.intersection(*lengths) or set.union(*lengths))
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    by_length, *others = figure.subplots(1, min(2, len(depths)), sharey=True, squeeze=False)[0]
    _draw_accuracy(by_length, results, "length")
    _length_axis(by_length, results)
    by_length.set_ylabel(INTERVAL)
    for by_depth in others:
        _draw_accuracy(by_depth, results, "depth", longest)
        by_depth.set(title=f"{length_label(longest)} tokens", xlabel=DEPTH)
    return _finish(figure, by_length, results, title)


@matplotlib.rc_context(fname=LOOK)
def depth_figure(results: Compared, title: str = "") -> Figure:
    """Accuracy by depth, a panel a length: the shortest, the longest and some evenly between."""
    _metrics(results, shown="accuracy")
    lengths = _all(results, "length")
    bars = len(results) * len(_all(results, "depth")) <= MAX_BARS
    panels = min(MAX_PANELS, len(lengths))
    columns = panels if panels <= 3 else math.ceil(panels / 2)
    figure, grid = _grid(panels, columns, WIDTH, 2.4)
    for axes, place in zip(grid, np.linspace(0, len(lengths) - 1, panels).round().astype(int), strict=True):
        _draw_accuracy(axes, results, "depth", lengths[place], bars)
        axes.set_title(f"{length_label(lengths[place])} tokens")
    for axes in grid[-columns:]:
        axes.set_xlabel(DEPTH)
    for axes in grid[::columns]:
        axes.set_ylabel(INTERVAL if bars else SHARE)
    return _finish(figure, grid[0], results, title)


def _draw_heatmap(axes: Axes, result: Results, lengths: list[int], depths: list[float], written: bool) -> Any:
    """Draw a row a depth and a column a length, with the values if `written`; return what a colour bar is made of."""
    matrix = np.full((len(depths), len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for depth, value in mean_by([cell for cell in result.cells if cell.length == length], "depth").items():
            row, text = depths.index(depth), f"{value:.2f}".removeprefix("0")
            matrix[row, column] = value
            if written:
                axes.text(column, row, text, color="wk"[value >= 0.5], ha="center", va="center", in_layout=False)
    inside = sum(length <= (result.settings.pretrained_window or 0) for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="white", linewidth=5)
        axes.axvline(inside - 0.5, color="black", linewidth=2)
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{round(depth, 2):g}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")


@matplotlib.rc_context(fname=LOOK)
def heatmap_figure(results: Compared, title: str = "") -> Figure:
    """Accuracy by length (across) and depth (down, the start on top), a panel a model; a line ends its window."""
    _metrics(results, shown="accuracy")
    lengths, depths = _all(results, "length"), _all(results, "depth")
    cell = max(0.36, CHARACTER * (1 + max(len(length_label(length)) for length in lengths)))
    columns = max(1, min(len(results), int((WIDTH - 1.5) / (len(lengths) * cell + 0.1))))
    # As many in each row: 2 and 2 rather than 3 and 1.
    columns = math.ceil(len(results) / math.ceil(len(results) / columns))
    width = min(WIDTH, max(4.5, 1.5 + columns * (len(lengths) * 0.7 + 0.1)))
    names = [textwrap.fill(label, int((width - 1.5) / columns / CHARACTER)) for label in results]
    height = 0.45 + max(1.2, 0.2 * len(depths)) + 0.15 * max(name.count("\n") for name in names)
    figure, grid = _grid(len(results), columns, width, height)
    written = len(results) * len(lengths) * len(depths) <= MAX_VALUES
    for axes, name, result in zip(grid, names, results.values(), strict=True):
        image = _draw_heatmap(axes, result, lengths, depths, written)
        axes.set_title(name)
        axes.tick_params("x", rotation=0 if len(lengths) * cell < WIDTH - 1.5 else 90)
    has_line = any(axes.lines for axes in grid)
    figure.supxlabel("length (tokens)" + "; line: end of the pretrained window" * has_line)
    figure.supylabel("depth (0 = start)")
    figure.colorbar(image, ax=grid, label=SHARE, fraction=0.02, pad=0.02, aspect=40)
    figure.suptitle(textwrap.fill(title, int(width / CHARACTER / 1.3)))
    return figure


@matplotlib.rc_context(fname=LOOK)
def perplexity_figure(results: Compared, title: str = "") -> Figure:
    """Perplexity per token by length; logarithmic where the values span more than a decade."""
    _metrics(results, shown="perplexity")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(results.values()):
        _draw_line(axes, place, len(results), mean_by(result.cells, "length"))
    values = [value for value in _all(results, "value") if math.isfinite(value)]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_minor_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel("perplexity (per token)")
    axes.grid(axis="y", alpha=0.3)
    _length_axis(axes, results)
    return _finish(figure, axes, results, title)


@matplotlib.rc_context(fname=LOOK)
def tasks_figure(results: Iterable[Results], title: str = "") -> Figure:
    """Accuracy by length, a panel for each model and task.

    Results of one label are of one colour in all panels.
    """
    results = list(results)
    places = dict.fromkeys((result.model, cell.task) for result in results for cell in result.cells)
    labels = dict.fromkeys(result.settings.label or result.model for result in results)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(places), squeeze=False)[0]
    for axes, (model, task) in zip(panels, places, strict=True):
        here = [replace(result, cells=result.of_task(task)) for result in results if result.model == model]
        found = {result.settings.label or model: result for result in here if result.cells}
        _metrics(found, shown="accuracy")
        # Those that this panel lacks keep their place and colour.
        shown = {label: found.get(label, replace(here[0], cells=[])) for label in labels}
        _draw_accuracy(axes, shown, "length")
        _length_axis(axes, found)
        axes.set_title(f"{model.rpartition('/')[2]}: {task}\n")
    panels[0].set_ylabel(INTERVAL)
    return _finish(figure, panels[0], dict.fromkeys(labels, results[0]), title)


def told_apart(files: Iterable[str | Path], by_model: bool) -> list[Results]:
    """The results in files, each of a label of its own; with `by_model` among those of its model.

    Raises:
        ValueError: a file that is no results file, or in which nothing was measured yet.
    """
    found: dict[tuple[str, str], Results] = {}
    for file in files:
        result = Results.read(file)
        if not result.cells:
            raise ValueError(f"{file} cannot be drawn: nothing was measured in it yet; `cream-peft evaluate` fills it")
        label, model = result.settings.label or Path(file).stem, result.model if by_model else ""
        label = f"{label} ({file})" if (label, model) in found else label
        found[label, model] = replace(result, settings=replace(result.settings, label=label))
    return list(found.values())


KINDS = {"accuracy": accuracy_figure, "depth": depth_figure, "heatmap": heatmap_figure, "perplexity": perplexity_figure}


@matplotlib.rc_context(fname=LOOK)
def save(figure: Figure, path: Path) -> Path:
    """Write a .png or .svg; make its folder if need be."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: the ending must be .png or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".png":
        # A palette takes a third of the bytes, and the difference is not seen.
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    return path


def plot_results(
    results: Compared, path: str | Path, kind: str | None = None, task: str | None = None, title: str = ""
) -> list[Path]:
    """Draw each task, or `task` alone; return the paths: `path`, or <name>-TASK.png for each of several tasks.

    With no `kind` (of KINDS), needle becomes a heat map, perplexity a curve, the others accuracy by length and depth.

    Raises:
        ValueError: no cells, no such task, a kind that cannot show a task's metric, or neither .png nor .svg.
    """
    path, metrics = Path(path), _metrics(results)
    if task and task not in metrics:
        raise ValueError(f"the results have no task {task!r}: there is {', '.join(metrics)}")
    chosen, drawn = [task] if task else list(metrics), {}
    for name in chosen:
        usual = "perplexity" if metrics[name] == "perplexity" else "heatmap" if name == "needle" else "accuracy"
        found = {label: replace(result, cells=result.of_task(name)) for label, result in results.items()}
        of_task = {label: result for label, result in found.items() if result.cells}
        one = path if len(chosen) == 1 else path.with_name(f"{path.stem}-{name}{path.suffix}")
        heading = f"{title}: {name}" if title and len(chosen) > 1 else title or name
        drawn[one] = KINDS[kind or usual](of_task, heading)
    return [save(figure, one) for one, figure in drawn.items()]
