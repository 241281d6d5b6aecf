"""Known answers for what is measured, and the way of the demo: train, evaluate, plot."""

import json
import sys

import numpy as np
import pytest

from cream_peft import cli
from cream_peft.evals import mean_by, recall, runner
from cream_peft.evals.table import table_of
from cream_peft.measure import Subject
from cream_peft.plots import plot_accuracy


class Oracle:
    """Stands in for the embedded model's answers: right where `knows` says so of the depth."""

    def __init__(self, monkeypatch, knows):
        depth = np.linspace(0, 0.999, 500)
        answers = {"depth": depth, "correct": np.array([knows(d) for d in depth])}
        # By its module: cream_peft.evals.recall, the attribute, is the function of that name.
        monkeypatch.setattr(sys.modules["cream_peft.evals.recall"], "evaluate_recall", lambda *arguments: answers)
        self.config = type("Config", (), {"vocab_size": 385})


@pytest.mark.parametrize(
    "knows, expected",
    [
        (lambda depth: True, [1.0] * 10),
        (lambda depth: False, [0.0] * 10),
        (lambda depth: depth < 0.1 or depth >= 0.9, [1.0] + [0.0] * 8 + [1.0]),
    ],
    ids=["always right", "always wrong", "only at the ends"],
)
def test_recall_by_depth_has_the_known_answer(monkeypatch, knows, expected):
    cells = list(recall(Oracle(monkeypatch, knows), None, 512, 8, 0))
    assert [cell["value"] for cell in cells] == expected
    assert [cell["depth"] for cell in cells] == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert sum(cell["samples"] for cell in cells) == 500


def test_recall_is_refused_for_a_model_of_another_vocabulary(monkeypatch):
    oracle = Oracle(monkeypatch, lambda depth: True)
    oracle.config.vocab_size = 32_000
    with pytest.raises(ValueError, match="embedded model's 385 tokens; this model has 32000"):
        list(recall(oracle, None, 512, 8, 0))


def test_means_weigh_cells_by_their_samples():
    cells = [{"length": 10, "value": 1.0, "samples": 1}, {"length": 10, "value": 0.0, "samples": 3}]
    assert mean_by(cells, "length") == {10: 0.25}


def test_a_subject_is_read_from_the_command_line(tmp_path, monkeypatch):
    assert Subject.parse("a/b") == Subject("b", "a/b", None)
    assert Subject.parse("my label=a/b+yarn") == Subject("my label", "a/b", "yarn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run+1").mkdir()
    assert Subject.parse("run+1").name == "run+1"
    with pytest.raises(ValueError, match="unknown RoPE scaling 'dynamic'"):
        Subject.parse("a/b+dynamic")


def test_the_demos_way_leaves_an_adapter_results_a_table_and_a_picture(tmp_path, capsys):
    adapter, results = tmp_path / "adapter", tmp_path / "results"
    train = ["train", "--max_steps", "2", "--output_dir", str(adapter), "--json", str(tmp_path / "t.json")]
    assert cli.main(train) == 0
    assert json.loads((tmp_path / "t.json").read_text())["steps"] == 2
    evaluate = ["evaluate", "--compare", "base=cream-peft-tiny", "scaled=cream-peft-tiny+ntk", f"tuned={adapter}",
                "--lengths", "256", "512", "--samples", "4", "--output_dir", str(results)]  # fmt: skip
    assert cli.main([*evaluate, "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    for line in ("The adapter is in", "kv_retrieval: accuracy by length (tokens) and depth", "The results are in"):
        assert line in printed
    found = runner.read_results(results / "tuned.json")
    assert found["model"] == "cream-peft-tiny" and found["adapter"] == "adapter" and found["seed"] == 1000
    assert str(tmp_path) not in (results / "tuned.json").read_text()
    assert {cell["length"] for cell in found["cells"]} == {256, 512}
    assert {"task", "length", "depth", "metric", "value", "samples", "seconds"} <= set(found["cells"][0])
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["results"]["tuned"] == found
    assert {(row["model"], row["against"]) for row in table["comparisons"]} == {("scaled", "base"), ("tuned", "base")}
    inside = mean_by(runner.read_results(results / "base.json")["cells"], "length")
    assert inside[256] > 0.9 > inside[512]
    assert table_of({"tuned": found})[2].split()[:2] == ["tuned", "256"]

    picture = tmp_path / "picture.png"
    assert cli.main(["plot", str(results / "base.json"), str(results / "tuned.json"), "--output", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 200_000
    svg = plot_accuracy({"tuned": found}, tmp_path / "picture.svg", pretrained_window=256)
    assert "<svg" in svg.read_text()
    written = (results / "tuned.json").stat().st_mtime_ns
    assert cli.main(evaluate) == 0  # nothing is measured twice
    assert (results / "tuned.json").stat().st_mtime_ns == written
