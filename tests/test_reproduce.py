"""The reproduction on the tiny model: which runs are done, how rates are chosen, its statistics, and its page."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cream_peft.train.watch import TrainingError

FOLDER = Path(__file__).parent.parent / "recipes/cream-peft-tiny"
sys.path.insert(0, str(FOLDER))

import reproduce  # noqa: E402
import reproduce_distances  # noqa: E402
import reproduce_report  # noqa: E402

NTK = ("ntk", 256, 2048)
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
FIGURES = json.loads((FOLDER / "results/reproduce.json").read_text())


@pytest.fixture
def committed(tmp_path):
    return reproduce.read_runs(tmp_path)[0]


def search(accuracy):
    """The search of ntk with accuracy(rate) at the window; at the target the highest rate is the best."""
    return [
        run | {"by_length": {"256": accuracy(run["rate"]), "2048": run["rate"]}} for run in reproduce.search_runs(NTK)
    ]


def rates_of_grid(done):
    runs = reproduce.new_skill_runs(done)
    return {run["rate"] for run in runs if reproduce.place(run) == NTK and run["seed"] == 0}


def test_a_new_machine_does_not_do_again_what_is_committed(tmp_path, committed, monkeypatch):
    done = {reproduce.key(run) for run in committed}
    assert len(done) == len(committed) >= 192
    assert not done & {reproduce.key(run) for run in reproduce.missing(committed, [])}
    # Without the committed file each of them would be missing.
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    everything, _ = reproduce.read_runs(tmp_path)
    assert everything == [] and len(reproduce.missing([], [])) == len(reproduce.planned([]))


def test_every_committed_run_is_a_planned_run_with_figures_seconds_and_versions(tmp_path, committed):
    assert {reproduce.key(run) for run in committed} <= {reproduce.key(run) for run in reproduce.planned(committed)}
    environments = reproduce.read_runs(tmp_path)[1]
    for run in committed:
        assert list(map(int, run["by_length"])) == reproduce.lengths(run) or run["context_length"] == 2048
        assert run["train_seconds"] >= 0 and run["environment"] in environments


def test_runs_resume_after_a_kill_and_none_begins_after_the_minutes(tmp_path, monkeypatch):
    asked, stop_after = [], [3]

    def finish(run):
        if len(asked) == stop_after[0]:
            raise KeyboardInterrupt
        asked.append(reproduce.key(run))
        return run | {"by_length": {"256": 0.5, "2048": 0.25}, "by_depth": {}}

    monkeypatch.setattr(reproduce, "HERE", tmp_path / "nothing committed")
    monkeypatch.setattr(reproduce, "finish", finish)
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    only = ["new_skill", "ntk", "seed=100"]
    reproduce.work(tmp_path, 1, 0, only)
    assert asked == []
    with pytest.raises(KeyboardInterrupt):
        reproduce.work(tmp_path, 1, 10, only)
    with (tmp_path / reproduce.RUNS).open("a") as file:
        file.write('{"task": "new_sk')
    before = {reproduce.key(run) for run in reproduce.read_runs(tmp_path)[0]}
    stop_after[0] = 1000
    reproduce.work(tmp_path, 1, 10, only)
    assert len(asked) == len(set(asked)) and before >= set(asked[:3])
    assert reproduce.missing(reproduce.read_runs(tmp_path)[0], only) == []


def test_the_rate_is_the_best_at_the_window_whatever_the_target_says_and_of_equals_the_lowest():
    low, middle, high = reproduce.SEARCHED[NTK]
    assert rates_of_grid(search(lambda rate: rate == middle)) == {middle}
    assert rates_of_grid(search(lambda rate: rate == high)) == {high}
    assert rates_of_grid(search(lambda rate: 1.0)) == {low}
    # One run short, no rate is chosen: the grid waits.
    assert rates_of_grid(search(lambda rate: 1.0)[:-1]) == {None}


def test_another_strategy_with_options_is_a_run_of_its_own():
    plain = reproduce.new_skill_runs([])[-1] | {"strategy": "pose"}
    assert reproduce.label(plain | {"options": {"chunks": 4}}) == "pose chunks=4"
    assert reproduce.key(plain) != reproduce.key(plain | {"options": {"chunks": 4}})


def test_the_interval_takes_bases_as_the_unit_and_is_not_that_of_nine_runs():
    values = {(base, seed): base / 10 + seed / 100 for base in (0, 2, 4) for seed in (0, 1, 2)}
    found = reproduce_report.over_bases(values)
    means = [0.01, 0.21, 0.41]
    theirs = stats.ttest_1samp(means, 0).confidence_interval()
    assert list(found["by_base"].values()) == pytest.approx(means)
    assert (found["mean"] - found["half_width_95"], found["mean"] + found["half_width_95"]) == pytest.approx(theirs)
    nine = stats.ttest_1samp(list(values.values()), 0).confidence_interval()
    assert nine.high - nine.low < theirs.high - theirs.low
    assert reproduce_report.over_bases({(0, 0): 0.5, (0, 1): 0.7})["half_width_95"] is None


def test_a_run_of_64_tokens_in_the_window_is_trained_and_measured(monkeypatch):
    monkeypatch.setitem(reproduce.TRAINING, "new_skill", {"max_steps": 1, "batch": 1, "warmup_steps": 0})
    monkeypatch.setattr(reproduce, "QUESTIONS", 64)
    where = ("none", *reproduce.IN_WINDOW)
    strategy = reproduce.strategies(*reproduce.IN_WINDOW)[2]
    found = reproduce.finish(reproduce._run("new_skill", where, strategy, 0, 0, rate=1e-3))
    assert list(found["by_length"]) == ["64", "128", "256"] and len(found["by_depth"]) >= 8
    assert reproduce.label(found) == "cream sigma=1.5" and "stopped" not in found


def test_a_run_that_diverges_is_measured_as_far_as_it_came(monkeypatch):
    def diverge(trainer):
        raise TrainingError("the gradients of step 1 are not finite")

    monkeypatch.setattr("cream_peft.CREAMTrainer.train", diverge)
    monkeypatch.setattr(reproduce, "QUESTIONS", 16)
    found = reproduce.finish(reproduce._run("new_skill", ("none", *reproduce.IN_WINDOW), ("pose", {}), 0, 0, rate=1.0))
    assert "step 1" in found["stopped"] and set(found["by_length"]) == {"64", "128", "256"}


def test_plain_positions_train_distances_within_the_window_and_cream_trains_those_up_to_the_target():
    plain, cream = (reproduce_distances.trained_pairs(name, rows=40)[0] for name in ("contiguous", "cream"))
    assert plain.size == cream.size and plain.min() > 0 and plain.max() < 256
    assert np.histogram(cream, [1, 256, 1024, 2048])[0].min() > 50 and cream.max() > 1900
    asked = reproduce_distances.asked_distances(documents=20)
    for tenth, distances in enumerate(asked):
        assert (distances <= 2048 - tenth * 204.8).all() and (distances >= 2048 - (tenth + 1) * 204.8 - 64).all()


def test_the_figures_are_those_of_the_committed_runs(committed):
    assert FIGURES["finished_runs"] == len(committed) and FIGURES["planned_runs"] == len(reproduce.planned(committed))
    again = json.loads(json.dumps(reproduce_report.summarise(committed)))
    assert {name: FIGURES[name] for name in again} == again


def test_the_tables_of_the_page_are_those_of_its_json():
    lines = reproduce_report.tables(FIGURES)
    assert all(f"<!-- table: {name} -->\n{table[0]}\n" in PAGE for name, table in lines.items())
    assert reproduce_report.with_tables(PAGE, lines) == PAGE
    assert reproduce_report.with_tables(PAGE, lines | {"recall": lines["recall"][:-1]}) != PAGE
