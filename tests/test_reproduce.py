"""The reproduction on the tiny model: which runs are done, its statistics, and its page."""

import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cream_peft.tiny import documents
from cream_peft.train.watch import TrainingError

FOLDER = Path(__file__).parent.parent / "recipes/cream-peft-tiny"
sys.path.insert(0, str(FOLDER))

import reproduce  # noqa: E402
import reproduce_distances  # noqa: E402
import reproduce_report  # noqa: E402

PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
FIGURES = json.loads((FOLDER / "results/reproduce.json").read_text())


@pytest.fixture
def committed(tmp_path):
    return reproduce.read_runs(tmp_path)[0]


def test_a_new_machine_does_not_do_again_what_is_committed(tmp_path, committed, monkeypatch):
    done = {reproduce.key(run) for run in committed}
    assert len(done) == len(committed) >= 192
    assert not done & {reproduce.key(run) for run in reproduce.missing(committed, [])}
    # Without the committed file each of them would be missing.
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    everything, _ = reproduce.read_runs(tmp_path)
    assert everything == [] and len(reproduce.missing([], [])) == len(reproduce.planned())


@pytest.mark.parametrize("words", [(), ("recall", "seed=0", "base=0"), ("new_skill", "pose", "seed=1", "base=0")])
def test_runs_made_anew_are_reported_however_few_there_are(words, tmp_path, committed, monkeypatch, capsys):
    some = [run for run in committed if words and set(words) <= set(reproduce.key(run).replace("task=", "").split())]
    assert bool(some) == bool(words) and len(some) < 30
    (tmp_path / reproduce.RUNS).write_text("".join(json.dumps(run) + "\n" for run in some))
    monkeypatch.setattr(reproduce_report, "attention_to_the_key", lambda base: {})
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--again", "--report", "--output", str(tmp_path)])
    reproduce.main()
    printed = capsys.readouterr().out
    if words:
        assert f"{len(some)} of {len(reproduce.planned())} runs in" in printed
        assert len(json.loads((tmp_path / "reproduce.json").read_text())["rows"]) <= len(some)
        assert len(list(tmp_path.glob("*.png"))) == 1
    else:
        assert "no run is finished yet" in printed
    # A run that is committed alone counts as missing.
    left = reproduce.missing(reproduce.read_runs(tmp_path, again=True)[0], [])
    assert len(left) == len(reproduce.planned()) - len(some)


def test_no_run_is_planned_twice():
    keys = [reproduce.key(run) for run in reproduce.planned()]
    assert len(set(keys)) == len(keys)


def test_the_new_skill_is_asked_with_a_value_as_mark_and_the_demos_form_with_a_filler():
    marks = {task: reproduce.documents_of(task).get("mark") for task in reproduce.TRAINING}
    assert marks == {"recall": None, "new_skill": documents.VOCABULARY_SIZE - 1, "filler_mark": documents.MARK}
    options = reproduce.documents_of("new_skill")
    (ids,), (labels,) = documents.training_rows(1, 256, seed=0, **options).values()
    asked = np.flatnonzero(labels != documents.IGNORED)
    assert asked.size and (ids[asked - 1] == marks["new_skill"]).all() and (ids[asked] >= documents.FIRST_VALUE).all()
    drawn = documents.evaluation_document(np.random.default_rng(0), 256, options["mark"])
    assert (drawn[0][drawn[1]] == marks["new_skill"]).all() and (drawn[0][drawn[1] + 1] == drawn[2]).all()


def test_every_committed_run_is_a_planned_run_with_figures_seconds_and_versions(tmp_path, committed):
    assert {reproduce.key(run) for run in committed} <= {reproduce.key(run) for run in reproduce.planned()}
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
    only = ["filler_mark", "ntk", "seed=100"]
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


def test_another_strategy_with_options_is_a_run_of_its_own():
    plain = reproduce.new_skill_runs()[-1] | {"strategy": "pose"}
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
    assert FIGURES["finished_runs"] == len(committed) and FIGURES["planned_runs"] == len(reproduce.planned())
    again = json.loads(json.dumps(reproduce_report.summarise(committed)))
    assert {name: FIGURES[name] for name in again} == again


def test_the_tables_of_the_page_are_those_of_its_json():
    lines = reproduce_report.tables(FIGURES)
    assert all(f"<!-- table: {name} -->\n{table[0]}\n" in PAGE for name, table in lines.items())
    assert reproduce_report.with_tables(PAGE, lines) == PAGE
    assert reproduce_report.with_tables(PAGE, lines | {"recall": lines["recall"][:-1]}) != PAGE


def test_the_answer_about_distances_says_what_its_json_says():
    text = " ".join(PAGE.split("## Why PoSE led")[1].split("\n## ")[0].split())
    found = json.loads((FOLDER / "results/reproduce-distances.json").read_text())
    scalings, near = found["by_scaling"], found["linear_near_the_end"]
    times = [2**ratio for ratio in found["log2_cream_to_pose"]]
    assert f"its distances {times[0]:.1f} times" in text and f"trains it {times[-1]:.2f}".replace("0.", ".") in text
    assert f"depths .5 to .7 {np.mean(times[5:7]):.1f} times as often" in text
    first = sorted(of["cream_minus_pose"][0] for of in scalings.values())
    assert f"leads there by {first[0]:.2f} to {first[-1]:.2f}".replace("0.", ".") in text
    shares = {name: of["cream_minus_pose"][0] / sum(of["cream_minus_pose"]) for name, of in scalings.items()}
    assert 0.3 < shares.pop("none") < 0.37 and min(shares.values()) > 0.5
    of_all = sorted(of["correlation"] for of in scalings.values())
    rest = sorted(of["correlation_without_first_tenth"] for of in scalings.values())
    assert f"{of_all[0]:.2f} to {of_all[-1]:.2f}".replace("0.", ".") in text
    assert f"−{-rest[0]:.2f} to −{-rest[-1]:.2f}".replace("0.", ".") in text
    bases = zip(near["cream at 2048, 96 to 192, by base"], near["pose at 2048, 96 to 192, by base"], strict=True)
    assert ", ".join(f"{cream:.2f} against {pose:.2f}" for cream, pose in bases).replace("0.", ".") in text
    inside = near["pose at 256, 96 to 192, by base"] + near["cream at 256, 96 to 192, by base"]
    assert {f"{value:.2f}" for value in inside} <= {"0.99", "1.00"}
    assert f"{scalings['linear']['accuracy_by_tenth']['contiguous'][-1]:.2f}"[1:] == ".03" and "has .03" in text


def test_what_the_page_says_of_recall_holds_in_its_json():
    gaps = {(g["task"], g["scaling"], g["strategy"]): g for g in FIGURES["cream_minus"] if g["documents"] == "window"}
    pose = {scaling: gaps["recall", scaling, "pose"] for scaling in reproduce.SCALINGS}
    for gap in pose.values():
        assert min(gap["target"]["by_base"].values()) > 0 and gap["target"]["half_width_95"] > gap["target"]["mean"]
    last = pose["linear"]["last tenth"]
    assert last["mean"] + last["half_width_95"] < 0
    rows = {(row["scaling"], row["strategy"]): row for row in FIGURES["rows"]
            if (row["task"], row["documents"], row["context_length"]) == ("recall", "window", 256)}  # fmt: skip
    plain, untuned = (rows["linear", name]["target"]["by_base"] for name in ("contiguous", "untuned"))
    assert all(plain[base] < untuned[base] for base in plain)
    best = max(rows.values(), key=lambda row: row["target"]["mean"])
    assert (best["scaling"], best["strategy"]) == ("yarn", "cream sigma=3")


def test_what_the_page_says_of_the_new_skill_holds_in_its_json():
    def of(kind, strategy, scaling="ntk", fed=256):
        (found,) = (one for one in FIGURES[kind] if (one["task"], one["strategy"]) == ("new_skill", strategy)
                    and one["scaling"] == scaling and one["context_length"] == fed)  # fmt: skip
        return found

    settled = {"contiguous": {"ntk", "yarn", "linear"}, "pose": {"yarn", "none", "linear"}}
    for strategy, left_out in settled.items():
        gaps = {
            scaling: of("cream_minus", strategy, scaling)["target"] for scaling in ("ntk", "yarn", "none", "linear")
        }
        assert all(min(gap["by_base"].values()) > 0 and len(gap["by_base"]) == 3 for gap in gaps.values())
        assert {scaling for scaling, gap in gaps.items() if gap["mean"] > gap["half_width_95"]} == left_out
    led = {name: max(of("cream_minus", "pose", name)["last tenth"]["by_base"].values()) < 0 for name in gaps}
    assert led == {"ntk": True, "yarn": False, "none": True, "linear": False}
    rng = np.random.default_rng(reproduce.EVALUATION_SEED)
    drawn = [documents.evaluation_document(rng, 2048, documents.MARK) for _ in range(reproduce.QUESTIONS // 16)]
    asked = sum(int((depths >= 0.9).sum()) for *_, depths in drawn)
    assert f"in {asked} questions a base" in " ".join(PAGE.split())
    plain, inside = of("rows", "contiguous", "none", 64), of("cream_minus", "pose", "none", 64)["target"]
    assert min(plain["last tenth"]["by_base"].values()) == 1 and f"{plain['first tenth']['mean']:.2f}" == "0.06"
    assert f"{of('cream_minus', 'contiguous', 'none', 64)['target']['mean']:.1f}" == "0.5"
    assert min(inside["by_base"].values()) > 0 and inside["mean"] < inside["half_width_95"]
    lowest = min(of("rows", "contiguous")["256"]["by_base"].values())
    assert f"it answers {lowest:.2f}".replace("0.", ".") + " or more at 256 tokens" in " ".join(PAGE.split())


def test_what_the_page_says_of_strategies_beside_cream_holds_in_its_json():
    found = {}
    for where in reproduce.PLACES:
        cases = {"PoSE": ("pose", {})} | reproduce.beside(*where[1:])
        for name, (strategy, options) in cases.items():
            label = reproduce.label({"strategy": strategy, "options": options})
            (found[name, where],) = (
                gap for gap in FIGURES["cream_minus"]
                if gap["task"] == "new_skill" and reproduce.place(gap) == where and gap["strategy"] == label
            )  # fmt: skip
    assert len(found) == 8 * 5 and all(len(gap["target"]["by_base"]) == 3 for gap in found.values())
    seeds = {name: {gap["pairs"] // 3 for (other, _), gap in found.items() if other == name} for name, _ in found}
    assert seeds == {
        name: {3 if name == "PoSE" else 2 if name in reproduce.CLOSE else 1} for name in seeds
    }  # fmt: skip

    def led(part):
        """Strategy -> the places where it is ahead of CREAM on all three bases."""
        ahead = [at for at, gap in found.items() if max(gap[part]["by_base"].values()) < 0]
        names = {where: reproduce_report.place_name(*where).split(",")[0] for where in reproduce.PLACES}
        return {name: [names[where] for other, where in ahead if other == name] for name, _ in ahead}

    assert led("target") == {} and led("middle") == {"short random segments": ["linear", "64 to 256"]}
    with_scalings = ["ntk", "none", "linear"]
    ahead = {"PoSE": ["ntk", "none"], "PoSE, four chunks": with_scalings, "short random segments": with_scalings}
    assert led("last tenth") == ahead
    settled = [name for (name, _), gap in found.items() if gap["target"]["mean"] > gap["target"]["half_width_95"]]
    assert Counter(settled) == {"RandPos": 5, "RandPos, growing target": 4, "PoSE": 3, "short random segments": 1}
    behind = [gap["target"]["by_base"].values() for (name, _), gap in found.items() if name.startswith("RandPos")]
    assert min(map(min, behind)) > 0.1
    default = {where[0]: found["CREAM, default sigma", where]["target"] for where in reproduce.PLACES[:4]}
    lost = [scaling for scaling, gap in default.items() if min(gap["by_base"].values()) > 0]
    assert lost == ["linear"] and all(abs(gap["mean"]) < gap["half_width_95"] for gap in default.values())
    (row,) = (
        row
        for row in FIGURES["rows"]
        if (row["task"], row["scaling"], row["strategy"]) == ("new_skill", "ntk", "randpos")
    )
    assert f"{row['256']['mean']:.2f} at 256 tokens under".removeprefix("0") in " ".join(PAGE.split())


def test_what_the_page_says_of_a_filler_as_mark_holds_in_its_json():
    text = " ".join(PAGE.split("### The demo's form is not learned")[1].split("\n## ")[0].split())
    attention = FIGURES["attention_to_the_key_at_a_mark"].values()
    low, high = (f"{of(one['value'] for one in attention):.2f}".removeprefix("0") for of in (min, max))
    assert f"(attention {low} to {high})" in text
    assert f"({max(one['filler'] for one in attention):.2f} at most)".replace("0.", ".") in text
    trained = [row for row in FIGURES["filler_mark"] if row["strategy"] != "untuned"]
    untuned = [row for row in FIGURES["filler_mark"] if row["strategy"] == "untuned"]
    assert max(row["window"]["2"] for row in trained) <= untuned[0]["window"]["2"]
    assert min(row["window"]["0"] for row in trained) > 0.99


def test_what_the_front_page_says_of_strategies_holds_in_the_json():
    text = " ".join((FOLDER.parent.parent / "README.md").read_text(encoding="utf-8").split())
    cases = [gap for gap in FIGURES["cream_minus"]
             if (gap["strategy"], gap["documents"], gap["context_length"]) == ("pose", "window", 256)]  # fmt: skip
    assert len(cases) == 8 and all(len(gap["target"]["by_base"]) == 3 for gap in cases)
    assert all(min(gap["target"]["by_base"].values()) > 0 for gap in cases)
    assert sum(gap["target"]["mean"] > gap["target"]["half_width_95"] for gap in cases) == 3
    assert sum(max(gap["last tenth"]["by_base"].values()) < 0 for gap in cases) == 3
    assert sum(gap["last tenth"]["mean"] < 0 for gap in cases) == 5
    assert "in three of them by more than chance; for answers in the last tenth" in text
    told = "PoSE leads in five, in three of those on every base."
    assert told in text
    others = [gap for gap in FIGURES["cream_minus"] if gap["task"] == "new_skill"]
    assert all(max(gap["target"]["by_base"].values()) > 0 for gap in others)
    assert "Over all depths no strategy is ahead of CREAM on all bases." in text
    inside = {row["strategy"]: row["target"]["mean"] for row in FIGURES["rows"]
              if (row["task"], row["context_length"]) == ("new_skill", 64)}  # fmt: skip
    told = [f"{inside[name]:.2f}" for name in ("contiguous", "pose", "cream sigma=1.5")]
    assert "plain fine-tuning answers {} right, PoSE {}, CREAM {}".format(*told) in text


def test_the_front_page_counts_the_runs_of_recall(committed):
    readme = (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    runs = sum(run["task"] == "recall" for run in committed)
    assert all(int(number) == runs for number in re.findall(r"\[(\d+) runs\]\(recipes/cream-peft-tiny", readme))
