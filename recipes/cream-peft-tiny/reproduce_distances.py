"""Do the distances that a strategy trains explain its accuracy by depth? Histograms, and a correlation with recall.

python recipes/cream-peft-tiny/reproduce_distances.py    (20 minutes)

trains PoSE and CREAM under linear scaling again (recall, three bases); writes their accuracy by distance near the end.
"""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from reproduce import EVALUATION_SEED, EXTENSION, HERE, SCALINGS, Run, quiet, recall_runs, train
from scipy import stats

from cream_peft.positions import POSITION_STRATEGIES, generator
from cream_peft.tiny.documents import IGNORED, evaluate_recall, evaluation_document, training_rows

STRATEGIES = ("contiguous", "randpos", "pose", "cream")
BIN = 32
ROWS, DOCUMENTS = 3000, 300
WINDOW, TARGET = EXTENSION


def trained_pairs(strategy: str, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Of training documents of recall: the distance from each question to each earlier statement of its key, and the
    positions of the questions (tokens)."""
    distances, positions = [], []
    columns = training_rows(rows, WINDOW, seed=1)
    options = {"sigma": 3.0} if strategy == "cream" else {}
    for row, (ids, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
        _, position_ids = POSITION_STRATEGIES[strategy](WINDOW, WINDOW, TARGET, generator(0, 0, row), **options)
        for question in np.flatnonzero(labels != IGNORED) - 1:
            stated = np.flatnonzero(ids[:question] == ids[question])
            distances.extend(position_ids[question] - position_ids[stated])
            positions.append(position_ids[question])
    return np.array(distances), np.array(positions)


def asked_distances(documents: int = DOCUMENTS) -> list[np.ndarray]:
    """For each tenth of depth, the distances (tokens) from questions to records in documents of the target length."""
    rng, tenths = np.random.default_rng(2), [[] for _ in range(10)]
    for _ in range(documents):
        _, questions, _, depths = evaluation_document(rng, TARGET)
        for question, depth in zip(questions, depths, strict=True):
            tenths[int(depth * 10)].append(question - round(depth * TARGET))
    return [np.array(tenth) for tenth in tenths]


def density(values: np.ndarray) -> np.ndarray:
    """Share of `values` per token, in bins of 32 tokens from 0 to the target."""
    return np.histogram(values, np.arange(0, TARGET + BIN, BIN))[0] / len(values) / BIN


def explain(runs: list[Run], output: Path) -> None:
    """Write reproduce-distances.json and .png."""
    asked = asked_distances()
    pairs = {strategy: trained_pairs(strategy) for strategy in STRATEGIES}
    distances = {strategy: density(found[0]) for strategy, found in pairs.items()}
    by_tenth = {s: [float(found[tenth // BIN].mean()) for tenth in asked] for s, found in distances.items()}
    ratio = np.log2(np.array(by_tenth["cream"]) / np.array(by_tenth["pose"]))
    found: dict[str, Any] = {}
    for scaling in SCALINGS:
        of = {s: _of(runs, scaling, s) for s in STRATEGIES}
        accuracy = {s: [fmean(run["by_depth"][tenth] for run in of[s]) for tenth in of[s][0]["by_depth"]] for s in of}
        gap = np.array(accuracy["cream"]) - np.array(accuracy["pose"])
        at_window = {s: fmean(run["by_length"][str(WINDOW)] for run in of[s]) for s in of}
        found[scaling] = {
            "accuracy_by_tenth": accuracy,
            "accuracy_at_window": at_window,
            "cream_minus_pose": gap.tolist(),
            "correlation": stats.pearsonr(ratio, gap).statistic,
            "correlation_without_first_tenth": stats.pearsonr(ratio[1:], gap[1:]).statistic,
        }
    content = {
        "command": "make reproduce",
        "trained_per_token_by_tenth": by_tenth,
        "log2_cream_to_pose": ratio.tolist(),
        "questions_in_last_tenth": {s: float(np.mean(where >= 0.9 * TARGET)) for s, (_, where) in pairs.items()},
        "by_scaling": found,
        "linear_near_the_end": summary_of_near(distances),
    }
    (output / "reproduce-distances.json").write_text(json.dumps(content, indent=1) + "\n")
    _draw(
        distances, {s: density(where) for s, (_, where) in pairs.items()}, content, output / "reproduce-distances.png"
    )


def near_the_end(model: Any, length: int, documents: int = 256) -> list[tuple[int, int]]:
    """(right answers, questions) for each 32 tokens of distance, up to a quarter of the target."""
    found = evaluate_recall(model, length, documents, EVALUATION_SEED)
    rng = np.random.default_rng(EVALUATION_SEED)
    drawn = [evaluation_document(rng, length) for _ in range(documents)]
    distance = np.concatenate([questions - np.rint(depths * length) for _, questions, _, depths in drawn])
    edges = np.arange(0, TARGET // 4 + 1, BIN)
    asked, right = (np.histogram(distance[of], edges)[0] for of in (slice(None), found["correct"]))
    return list(zip(right.tolist(), asked.tolist(), strict=True))


def summary_of_near(distances: dict[str, np.ndarray]) -> dict[str, Any]:
    """What main wrote: accuracy by distance with the bases pooled, beside how often the distance is trained."""
    runs = json.loads((HERE / "results/reproduce-near.json").read_text())["runs"]
    found: dict[str, Any] = {"bin": BIN}
    for length, strategy in product(map(str, EXTENSION), ("pose", "cream")):
        of_base = [r["right_and_asked_by_distance"][length] for r in runs if r["strategy"] == strategy]
        right, asked = np.array(of_base).transpose(2, 0, 1)
        # A bin that a short document hardly reaches is left out.
        bins = asked.sum(0) >= 50
        found[f"{strategy} at {length}"] = (right.sum(0)[bins] / asked.sum(0)[bins]).tolist()
        found[f"{strategy} at {length}, 96 to 192, by base"] = (right[:, 3:6].sum(1) / asked[:, 3:6].sum(1)).tolist()
    gap = np.array(found[f"cream at {TARGET}"]) - np.array(found[f"pose at {TARGET}"])
    ratio = np.log2(distances["cream"] / distances["pose"])[: len(gap)]
    return found | {"log2_cream_to_pose": ratio.tolist(), "correlation": stats.pearsonr(ratio, gap).statistic}


def main() -> None:
    from cream_peft.model.record import machine, versions

    quiet()
    found: dict[str, Any] = {"command": "python recipes/cream-peft-tiny/reproduce_distances.py"}
    found |= {"versions": versions(), "machine": machine(), "runs": []}
    for run in recall_runs():
        where = (run["scaling"], run["documents"], run["context_length"], run["seed"])
        if where == ("linear", "window", WINDOW, 0) and run["strategy"] in ("pose", "cream"):
            with tempfile.TemporaryDirectory() as scratch:
                model = train(run, scratch)
            of = {str(length): near_the_end(model, length) for length in EXTENSION}
            found["runs"].append(run | {"right_and_asked_by_distance": of})
            print(json.dumps(found["runs"][-1]), flush=True)
    (HERE / "results/reproduce-near.json").write_text(json.dumps(found) + "\n")


def _of(runs: list[Run], scaling: str, strategy: str) -> list[Run]:
    return [
        run
        for run in runs
        if (run["task"], run["scaling"], run["strategy"], run["documents"], run["context_length"])
        == ("recall", scaling, strategy, "window", WINDOW)
    ]


def _draw(distances: dict, positions: dict, content: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    colors = dict(zip(STRATEGIES, ("#e08214", "#8073ac", "#2166ac", "#b2182b"), strict=True))
    figure, axes = plt.subplot_mosaic("AAABBBCCCDDD;000111222333", figsize=(12, 5.8), layout="constrained")
    edges, tenths = np.arange(0, TARGET + 1, BIN), np.arange(0.05, 1, 0.1)
    for strategy, color in colors.items():
        # A question at the end meets distance (1 - depth) times the target.
        axes["A"].stairs(distances[strategy][::-1], 1 - edges[::-1] / TARGET, color=color, label=strategy)
        axes["B"].stairs(positions[strategy], edges, color=color)
        for column, (scaling, found) in enumerate(content["by_scaling"].items()):
            axes[str(column)].plot(tenths, found["accuracy_by_tenth"][strategy], color=color, marker=".")
            axes[str(column)].set(title=scaling, xlabel="depth at 2,048 tokens", ylim=(0, 1.03))
    for marker, (scaling, found) in zip("o^sD", content["by_scaling"].items(), strict=True):
        axes["C"].scatter(content["log2_cream_to_pose"], found["cream_minus_pose"], marker=marker, s=14, label=scaling)
    near = content["linear_near_the_end"]
    for strategy in ("pose", "cream"):
        accuracy = near[f"{strategy} at {TARGET}"]
        axes["D"].plot(BIN * (np.arange(len(accuracy)) + 0.5), accuracy, color=colors[strategy], marker=".")
    axes["D"].set(xlabel="distance (tokens)", ylabel="accuracy", title="linear, near the end", ylim=(0.7, 1))
    axes["A"].set(yscale="log", ylim=(1e-5, None), xlabel="depth seen from the end")
    axes["A"].set(ylabel="share per token", title="distances that are trained")
    axes["B"].set(yscale="log", ylim=(1e-5, None), xlabel="position (tokens)", title="positions of trained questions")
    axes["C"].set(xlabel="trained by CREAM over PoSE (log2)", ylabel="CREAM minus PoSE", title="each tenth of depth")
    axes["C"].legend(fontsize=8, frameon=False)
    axes["0"].set_ylabel("accuracy (recall)")
    figure.legend(*axes["A"].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
