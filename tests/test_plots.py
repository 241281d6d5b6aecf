"""Known results in, and what is drawn of them: heights, places, panels, and the files."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from cream_peft import cli
from cream_peft.evals import plots
from cream_peft.evals.plots import (
    accuracy_figure,
    depth_figure,
    heatmap_figure,
    length_label,
    perplexity_figure,
    plot_results,
    tasks_figure,
)
from cream_peft.evals.results import Cell, Results, Settings

LENGTHS, DEPTHS = [2048, 8192, 32768], [0.0, 0.5, 1.0]


def result(value_of, lengths=LENGTHS, depths=DEPTHS, task="recall", samples=20, window=4096, metric="accuracy"):
    cells = [
        Cell(task, length, depth, metric, value_of(length, depth), samples, seconds=1.0)
        for length in lengths
        for depth in depths
    ]
    return Results("m", None, {}, 0, Settings(pretrained_window=window), cells)


def perplexity(value_of, lengths=LENGTHS, window=4096):
    return result(lambda length, _: value_of(length), lengths, [1.0], "perplexity", 10_000, window, "perplexity")


def noise(seed):
    """Accuracies in steps of 1/20."""
    generator = np.random.default_rng(seed)
    return lambda length, depth: float(generator.integers(0, 21)) / 20


def curves(axes):
    """The points [points, 2] of each model's line."""
    return [container[0].get_xydata() for container in axes.containers]


def windows(axes):
    return [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() == "black"]


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize(
    "length, label", [(256, "256"), (1024, "1K"), (32768, "32K"), (2500, "2,500"), (131072, "128K"), (2**20, "1,024K")]
)
def test_lengths_are_written_short(length, label):
    assert length_label(length) == label


def test_accuracy_is_pooled_by_length_and_shown_by_depth_at_the_longest():
    by_length, by_depth = accuracy_figure(
        {"a": result(lambda length, depth: 1.0 if length < 4096 else depth), "b": result(lambda *_: 0.25)}
    ).axes
    a, b = curves(by_length)
    assert a.tolist() == [[2048, 1.0], [8192, 0.5], [32768, 0.5]]
    assert b.tolist() == [[2048, 0.25], [8192, 0.25], [32768, 0.25]]
    assert curves(by_depth)[0].tolist() == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    assert by_depth.get_title() == "32K tokens"
    assert [label.get_text() for label in by_length.get_xticklabels()] == ["2K", "8K", "32K"]
    assert windows(by_length) == [4096] and windows(by_depth) == []
    assert [text.get_text() for text in by_length.texts] == ["pretrained window 4K"]


@pytest.mark.parametrize("lengths, shown", [([2048, 8192], "8K tokens"), ([4096], "32K tokens")])
def test_depth_is_shown_at_the_longest_length_that_all_were_asked_at_if_there_is_one(lengths, shown):
    whole, part = (result(lambda length, depth: depth, some) for some in (LENGTHS, lengths))
    assert accuracy_figure({"a": whole, "b": part}).axes[1].get_title() == shown


def test_the_bars_are_wilson_intervals_of_all_samples_at_a_length():
    (by_length, by_depth) = accuracy_figure({"a": result(lambda length, depth: 0.9, samples=20)}).axes
    for axes, samples in ((by_length, 60), (by_depth, 20)):
        _, _, (bars,) = axes.containers[0]
        theirs = binomtest(round(0.9 * samples), samples).proportion_ci(0.95, method="wilson")
        for segment in bars.get_segments():
            assert segment[:, 1] == pytest.approx([theirs.low, theirs.high])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_wrong_and_all_right_are_drawn_with_bars_inside_the_axes(value):
    for axes in accuracy_figure({name: result(lambda *_: value) for name in "ab"}).axes:
        for _, _, (bars,) in axes.containers:
            heights = np.array(bars.get_segments())[:, :, 1]
            assert heights.min() >= 0 and heights.max() <= 1 and np.ptp(heights) > 0.05


def test_models_of_equal_accuracy_stand_side_by_side_and_keep_their_true_values():
    by_length = accuracy_figure({name: result(lambda *_: 1.0) for name in "abc"}).axes[0]
    lines = [container[0] for container in by_length.containers]
    assert len({tuple(map(tuple, line.get_xydata())) for line in lines}) == 1
    places = [line.get_transform().transform((8192, 1.0)) for line in lines]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1] == pytest.approx(by_length.transData.transform((8192, 1.0)))


def test_sixteen_models_are_told_apart_without_colour():
    by_length = accuracy_figure({f"model {index}": result(lambda *_: 0.5) for index in range(16)}).axes[0]
    lines = [container[0] for container in by_length.containers]
    assert len({line.get_marker() for line in lines[:8]}) == 8
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 16


def test_the_window_is_marked_between_lengths_and_not_outside_of_them():
    for window, marked in ((4096, [4096]), (3000, [3000]), (32768, [32768]), (131072, []), (128, []), (None, [])):
        assert windows(accuracy_figure({"a": result(noise(0), window=window)}).axes[0]) == marked
    two = {"a": result(noise(0), window=4096), "b": result(noise(1), window=8192)}
    assert windows(accuracy_figure(two).axes[0]) == [4096, 8192]
    axes = perplexity_figure({"a": perplexity(lambda length: 7.0, window=5000)}).axes[0]
    assert windows(axes) == [5000]


def test_a_task_of_one_depth_has_no_panel_by_depth():
    assert len(accuracy_figure({"a": result(noise(0), depths=[1.0])}).axes) == 1
    assert len(accuracy_figure({"a": result(noise(0), depths=[0.5, 1.0])}).axes) == 2


def test_seventeen_lengths_keep_their_ticks_and_labels_that_do_not_overlap():
    lengths = [2500, 3600, 4200, 4800, 6000, 7100, 9400, 11800, 14000, 16000, 17500, 20000, 22000, 26000, 28000]
    figure = accuracy_figure({"a": result(noise(0), [*lengths, 30000, 32000])})
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    labelled = [label.get_text() for label in axis.get_ticklabels()]
    assert labelled[0] == "2,500" and labelled[-1] == "32,000" and len(labelled) >= 6
    assert set(axis.get_minorticklocs()) | set(axis.get_majorticklocs()) >= {*lengths, 30000, 32000}
    boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("count, panels", [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (17, 6)])
def test_depth_has_a_panel_a_length_from_the_shortest_to_the_longest(count, panels):
    lengths = [1024 * (index + 1) for index in range(count)]
    figure = depth_figure({"a": result(lambda length, depth: depth, lengths)})
    assert len(titles(figure)) == panels
    assert titles(figure)[0] == "1K tokens" and titles(figure)[-1] == f"{count}K tokens"
    for axes in figure.axes:
        assert curves(axes)[0].tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    shown = [int(title.split("K")[0]) for title in titles(figure)]
    gaps = np.diff(shown)
    assert panels == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_a_model_that_lacks_a_length_keeps_its_colour_and_the_layout(recwarn, tmp_path):
    results = {"a": result(noise(0), LENGTHS[:1]), "b": result(noise(1)), "c": result(noise(2))}
    figure = depth_figure(results)
    assert [len(points) for points in curves(figure.axes[-1])] == [0, 3, 3]
    colors = [[container[0].get_color() for container in axes.containers] for axes in figure.axes]
    assert colors[0] == colors[-1] and len(set(colors[0])) == 3
    plot_results(results, tmp_path / "depth.png", "depth")
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]


def test_the_heat_map_has_depth_downwards_and_length_across():
    figure = heatmap_figure(
        {"a": result(lambda length, depth: depth if length == 32768 else 1.0), "b": result(noise(1))}
    )
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == [[1, 1, 0], [1, 1, 0.5], [1, 1, 1]]
    assert image.get_extent()[2] > image.get_extent()[3]  # the first row is at the top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.5", "1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2K", "8K", "32K"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[2, 0] == ".00" and written[2, 1] == ".50" and written[2, 2] == "1.00" and len(written) == 9
    assert titles(figure) == ["a", "b"]
    # 4096 lies between the first length and the second.
    assert {line.get_xdata()[0] for line in axes.lines} == {0.5}


def test_the_heat_map_reads_in_black_and_white():
    image = heatmap_figure({"a": result(noise(0))}).axes[0].images[0]
    red, green, blue = image.cmap(np.linspace(0, 1, 101))[:, :3].T
    assert (np.diff(0.299 * red + 0.587 * green + 0.114 * blue) > 0).all()
    assert image.get_clim() == (0, 1)


def test_what_was_not_measured_stays_empty_in_the_heat_map():
    partial = result(noise(0))
    del partial.cells[4]
    axes = heatmap_figure({"a": partial, "b": result(noise(1))}).axes[0]
    assert np.argwhere(axes.images[0].get_array().mask).tolist() == [[1, 1]]
    assert len(axes.texts) == 8


def test_a_window_that_all_lengths_fit_in_has_no_line_in_the_heat_map():
    for window in (32768, 1024, None):
        assert not heatmap_figure({"a": result(noise(0), window=window)}).axes[0].lines


def test_perplexity_is_logarithmic_only_where_it_explodes():
    calm = perplexity_figure({"a": perplexity(lambda length: 8 - length / 32768)}).axes[0]
    assert calm.get_yscale() == "linear" and calm.get_xscale() == "log"
    assert curves(calm)[0].tolist() == [[2048, 8 - 1 / 16], [8192, 7.75], [32768, 7.0]]
    wild = {"a": perplexity(lambda length: 7.0), "b": perplexity(lambda length: 6.0 if length < 4096 else 4000.0)}
    axes = perplexity_figure(wild).axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and 1 < low < 6 and 4000 < high < 40_000
    endless = {"a": perplexity(lambda length: float("inf") if length > 8192 else 7.0)}
    assert perplexity_figure(endless).axes[0].get_yscale() == "linear"


def test_labels_that_matplotlib_would_take_for_something_else_are_in_the_legend():
    labels = ["_base", "$x$ and $y$", "organisation/" + "a-very-long-name-" * 12]
    figure = accuracy_figure({label: result(noise(0)) for label in labels})
    figure.draw_without_rendering()
    found = figure.legends[0].get_texts()
    assert [re.sub(r"\s", "", text.get_text()) for text in found] == [re.sub(r"\s", "", label) for label in labels]
    assert not any(text.get_parse_math() for text in found)
    width, height = figure.bbox.size
    box, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= axes.y0 and axes.height > 0.4 * height


def fading(seed):
    """Accuracies that fall with the length, less at the ends, in steps of 1/20: as measured ones do."""
    generator = np.random.default_rng(seed)

    def value_of(length, depth):
        beyond = max(0.0, np.log2(length / 4096))
        right = np.clip(1.02 - beyond * (0.3 - 0.04 * seed) - (beyond > 0) * depth * (1 - depth), 0, 1)
        return float(generator.binomial(20, right)) / 20

    return value_of


@pytest.mark.parametrize("kind, models", [("accuracy", 7), ("depth", 7), ("heatmap", 5)])
def test_pictures_of_many_models_are_light(kind, models, tmp_path):
    lengths, depths = [2**power for power in range(10, 18)], [tenth / 10 for tenth in range(11)]
    results = {f"model {seed}": result(fading(seed), lengths, depths) for seed in range(models)}
    (png,) = plot_results(results, tmp_path / "picture.png", kind)
    (svg,) = plot_results(results, tmp_path / "picture.svg", kind)
    assert png.stat().st_size < 120_000 and svg.stat().st_size < 150_000
    with Image.open(png) as picture:
        assert 900 <= picture.width <= 1300 and len(picture.convert("RGB").getcolors()) > 20
    assert "<text" in svg.read_text()  # which a reader can select, and which is light


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_results_make_the_same_file(ending, tmp_path):
    results = {"a": perplexity(lambda length: 7.0)}
    first, second = (plot_results(results, tmp_path / f"{name}.{ending}")[0].read_bytes() for name in "ab")
    assert first == second
    (other,) = plot_results({"b": results["a"]}, tmp_path / f"c.{ending}")
    assert other.read_bytes() != first  # control


def test_intervals_and_values_are_left_out_where_they_would_be_too_many(monkeypatch):
    monkeypatch.setattr(plots, "MAX_BARS", 6)
    monkeypatch.setattr(plots, "MAX_VALUES", 18)
    for models, drawn in ((2, True), (3, False)):
        results = {f"model {seed}": result(noise(seed)) for seed in range(models)}
        axes = depth_figure(results).axes[0]
        assert all(bool(container[2]) == drawn for container in axes.containers)
        assert ("95 % interval" in axes.get_ylabel()) == drawn
        assert len(heatmap_figure(results).axes[0].texts) == 9 * drawn


def test_each_task_gets_the_kind_that_suits_it_and_a_file_of_its_own(tmp_path):
    needle, curve = result(noise(0), task="needle"), perplexity(lambda length: 7.0)
    mixed = dataclasses.replace(needle, cells=needle.cells + curve.cells + result(noise(1)).cells)
    results = {"a": mixed, "b": result(noise(2), task="needle")}
    paths = plot_results(results, tmp_path / "new" / "picture.svg")
    assert [path.name for path in paths] == ["picture-needle.svg", "picture-perplexity.svg", "picture-recall.svg"]
    texts = [path.read_text() for path in paths]
    assert "<image" in texts[0] and ">a<" in texts[0] and ">b<" in texts[0]
    assert "perplexity (per token)" in texts[1] and ">b<" not in texts[1]  # b has none of it
    assert "accuracy (share right)" in texts[2] and "<image" not in texts[2]
    assert plot_results(results, tmp_path / "one.svg", task="needle", kind="depth") == [tmp_path / "one.svg"]
    assert "<image" not in (tmp_path / "one.svg").read_text()


def test_accuracy_is_saved_with_the_window_of_the_results_and_the_title(tmp_path):
    (own,) = plot_results({"a": result(noise(0))}, tmp_path / "own.svg", title="A title")
    assert "pretrained window 4K" in own.read_text() and "A title" in own.read_text()


MIXED = {"a": result(noise(0)), "b": perplexity(lambda length: 7.0)}


@pytest.mark.parametrize(
    "results, options, expected",
    [
        ({"a": result(noise(0), [])}, {}, ["no cells", "cream-peft evaluate"]),
        ({"a": result(noise(0))}, {"task": "needle"}, ["no task 'needle'", "recall"]),
        ({"a": result(noise(0))}, {"kind": "perplexity"}, ["shows perplexity", "recall (accuracy)", "--kind"]),
        (MIXED, {"kind": "heatmap"}, ["shows accuracy", "perplexity (perplexity)", "--task"]),
        (MIXED, {"kind": "depth", "task": "perplexity"}, ["shows accuracy", "perplexity (perplexity)", "--kind"]),
        ({"a": result(noise(0))}, {"path": "picture.gif"}, ["picture.gif", ".png or .svg"]),
        ({"a": result(noise(0))}, {"path": "picture"}, ["picture", ".png or .svg"]),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line_and_leaves_no_file(results, options, expected, tmp_path):
    path = tmp_path / options.get("path", "picture.png")
    with pytest.raises(ValueError) as error:
        plot_results(results, path, options.get("kind"), options.get("task"))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    for part in expected:
        assert part in str(error.value)


def test_parts_of_two_machines_are_two_lines_in_one_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or path)
    for folder, lengths in (("first", [256, 512]), ("second", [1024, 2048])):
        (tmp_path / folder).mkdir()
        result(lambda length, depth: 0.5, lengths, task="needle").write(tmp_path / folder / "x.json")
    parts = [str(tmp_path / folder / "x.json") for folder in ("first", "second")]
    assert cli.main(["plot", *parts, "--kind", "tasks"]) == 0
    (axes,) = drawn[0].axes
    assert [curve[:, 0].tolist() for curve in curves(axes)] == [[256, 512], [1024, 2048]]


def test_tasks_of_several_models_stand_side_by_side_with_one_colour_a_label(tmp_path):
    def of(label, model, task, lengths, value):
        found = result(lambda length, depth: value, lengths, task=task, window=lengths[0])
        return dataclasses.replace(found, model=model, settings=dataclasses.replace(found.settings, label=label))

    small, real = ("tiny", "new_skill", [256, 512]), ("hub/Real", "multikey_needle", [1024, 4096, 16_384])
    everything = [of("base", *small, 0.1), of("CREAM", *small, 0.9), of("CREAM", *real, 0.8)]
    figure = tasks_figure(everything)
    assert titles(figure) == ["tiny: new_skill\n", "Real: multikey_needle\n"]
    heights = [[curve[:, 1].tolist() for curve in curves(axes)] for axes in figure.axes]
    # The second panel has no base, and CREAM in the colour of the first.
    assert heights == [[[0.1] * 2, [0.9] * 2], [[], [0.8] * 3]]
    colours = [[container[0].get_color() for container in axes.containers] for axes in figure.axes]
    assert colours[0] == colours[1] and len(set(colours[0])) == 2
    assert [windows(axes) for axes in figure.axes] == [[256], [1024]]
    assert "share right" in figure.axes[0].get_ylabel()
    with pytest.raises(ValueError, match="shows accuracy"):
        tasks_figure([perplexity(lambda length: 9.0)])


def test_tasks_are_never_pooled_in_one_picture():
    both = result(noise(0))
    both.cells += result(noise(1), task="needle").cells
    with pytest.raises(ValueError, match=r"of one task, not needle \(accuracy\), recall \(accuracy\)"):
        accuracy_figure({"a": both})
