"""The picture of the strategies shows what the strategies drew."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cream_peft.cli import main
from cream_peft.evals.draw_positions import positions_figure
from cream_peft.positions import POSITION_STRATEGIES, generator

WINDOW, TARGET, ROWS = 256, 2048, 40
PICTURE = Path(__file__).parent.parent / "recipes/cream-peft-tiny/results/positions.png"


def draws(strategy):
    return [POSITION_STRATEGIES[strategy](TARGET, WINDOW, TARGET, generator(0, 0, row))[1] for row in range(ROWS)]


@pytest.fixture(scope="module")
def figure():
    return positions_figure(WINDOW, TARGET, ROWS)


def bars(axes, height):
    """(first token, tokens, hatch) of the bars around `height`, from left to right."""
    found = [bar for bar in axes.patches if hasattr(bar, "get_width") and abs(bar.get_y() + 0.08 - height) < 0.01]
    return [(round(bar.get_x()), round(bar.get_width()), bar.get_hatch()) for bar in found]


def test_each_row_is_one_draw_of_its_strategy_below_the_tokens_fed(figure):
    axes = figure.axes[0]
    labels = [label.get_text().split("\n")[0].lower() for label in axes.get_yticklabels()]
    assert labels == ["contiguous", "pose", "cream", "cream"]
    for place, label in enumerate(labels):
        fed, placed = bars(axes, place - 0.3), bars(axes, place + 0.1)
        shown = np.concatenate([np.arange(first, first + tokens) for first, tokens, _ in placed])
        assert any(np.array_equal(shown, ids) for ids in draws(label))
        assert [part[1:] for part in fed] == [part[1:] for part in placed], "the same segments, in the same look"
        assert [part[0] for part in fed] == [sum(part[1] for part in fed[:i]) for i in range(len(fed))]
        assert sum(part[1] for part in fed) == WINDOW
        assert len({hatch for *_, hatch in placed}) == len(placed), "told apart without colour"


def test_the_two_branches_of_cream_have_head_middle_and_tail(figure):
    axes = figure.axes[0]
    edges = {label.get_text(): bars(axes, place + 0.1) for place, label in enumerate(axes.get_yticklabels())}
    third, short = edges["CREAM\n(equal parts)"], edges["CREAM\n(short ends)"]
    assert [tokens for _, tokens, _ in third] == [WINDOW // 3, WINDOW - 2 * (WINDOW // 3), WINDOW // 3]
    assert [tokens for _, tokens, _ in short] == [4 * 8, WINDOW - 2 * 4 * 8, 4 * 8]
    written = [text.get_text() for text in axes.texts]
    assert all(written.count(name) == 2 for name in ("head", "middle", "tail"))
    assert min(text.get_fontsize() for text in axes.texts) >= 9


def test_the_curves_count_the_examples_that_hold_a_position_and_a_distance(figure):
    for line, strategy in enumerate(("contiguous", "pose", "cream")):
        positions, distances = np.zeros(TARGET), np.zeros(TARGET)
        for ids in draws(strategy):
            positions[ids] += 100 / ROWS
            apart = np.unique(np.abs(ids[:, None] - ids[None, :]))
            distances[apart] += 100 / ROWS
        for axes, counted in zip(figure.axes[1:], (positions, distances), strict=True):
            np.testing.assert_allclose(axes.lines[line].get_ydata(), counted, atol=1e-9)


def test_other_strategies_are_drawn_where_they_are_named():
    named = ["cream,sigma=inf", "pose,chunks=4", "segments,segment_length=64", "randpos"]
    figure = positions_figure(WINDOW, TARGET, ROWS, named)
    labels = [label.get_text().split("\n")[0] for label in figure.axes[0].get_yticklabels()]
    assert labels == ["CREAM sigma=inf"] * 2 + ["PoSE chunks=4", "segments segment_length=64", "RandPos"]
    assert [line.get_label() for line in figure.axes[1].lines] == labels[1:]
    assert len(bars(figure.axes[0], 2.1)) == 4
    drawn = [
        POSITION_STRATEGIES["pose"](TARGET, WINDOW, TARGET, generator(0, 0, row), chunks=4)[1] for row in range(ROWS)
    ]
    apart = [np.isin(np.arange(TARGET), ids[:, None] - ids[None, :]) for ids in drawn]
    np.testing.assert_allclose(figure.axes[2].lines[1].get_ydata(), 100 * np.mean(apart, axis=0), atol=1e-9)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("craem", "'craem' is no position strategy: use one of cream, "),
        ("cream,chunks=3", "'cream,chunks=3': cream takes sigma, not chunks"),
        ("randpos,sigma=3", "randpos takes no option, not sigma"),
        ("pose,chunks=x", "'pose,chunks=x': chunks must be a number"),
        ("pose,chunks=1", "chunks=1 must be at least 2"),
    ],
)
def test_a_strategy_that_is_not_there_is_not_drawn(strategy, said, capsys):
    assert main(["plot", "--positions", "--strategies", strategy]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_plot_positions_writes_the_picture_of_readme(tmp_path, capsys):
    path = tmp_path / "new" / "positions.png"
    assert main(["plot", "--positions", "--output", str(path)]) == 0
    assert f"The picture is {path}" in capsys.readouterr().out
    assert Image.open(path).size == Image.open(PICTURE).size == (1170, 832)


@pytest.mark.parametrize(
    "arguments", [["plot", "--positions", "a.json"], ["plot", "--positions", "--context_length", "9000"]]
)
def test_plot_positions_refuses_what_it_cannot_draw(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "RESULTS.json or --positions" in error or "at least context_length (9000)" in error
    assert not list(tmp_path.iterdir())
