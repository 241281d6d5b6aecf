"""Every position strategy under every RoPE scaling on the tiny task, three bases by three seeds.

python recipes/cream-peft-tiny/reproduce.py [--output runs/reproduce] [--workers 2]

The base is not quantized; 150 steps of 16 x 256 tokens, a learning rate of 5e-3, or of 1e-2 under linear scaling.
The evaluation documents are drawn from a seed that no setting was chosen on. The three
bases are the shipped one and the two in bases/. Every run is kept as one line of runs.jsonl: killed and started again,
the command resumes where it stopped. Writes reproduce.json and reproduce.png into the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy import stats

SCALINGS = ("ntk", "none", "linear", "yarn")
STRATEGIES = ("contiguous", "randpos", "pose", "cream")
BASE_SEEDS = (0, 2, 4)
RUN_SEEDS = (0, 1, 2)
WINDOW, TARGET, STEPS, BATCH = 256, 2048, 150, 16
LENGTHS = (256, 512, 1024, 2048)
EVALUATION_SEED, EVALUATION_DOCUMENTS = 20_261_123, 32
LEARNING_RATE = {"none": 5e-3, "linear": 1e-2, "ntk": 5e-3, "yarn": 5e-3}


def all_runs() -> list[dict[str, Any]]:
    """Every run of the grid, those that say most first.

    Three seeds a base on documents of the window; one for crops and for full length.
    documents: `window` are documents of 256 tokens; `target` are documents of 2,048 tokens, from which the strategy
    crops 256. contiguous and randpos take the first 256 tokens either way, so they need no second run.
    """
    window = {strategy: (strategy, "window") for strategy in STRATEGIES}
    first, others = RUN_SEEDS[:1], RUN_SEEDS[1:]
    parts = [
        ([("untuned", None)], (None,)),
        (list(window.values()), first),
        ([window["pose"], window["cream"]], others),
        ([("pose", "target"), ("cream", "target")], first),
        ([("full", "target")], first),
        ([window["contiguous"]], others),
        ([window["randpos"]], others),
    ]
    return [
        {"base": base, "scaling": scaling, "strategy": strategy, "documents": documents, "seed": seed}
        for cases, seeds in parts
        for seed in seeds
        for scaling, base in itertools.product(SCALINGS, BASE_SEEDS)
        for strategy, documents in cases
    ]


def key(run: dict[str, Any]) -> tuple:
    return tuple(run[name] for name in ("base", "scaling", "strategy", "documents", "seed"))


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line cut off by a kill is dropped."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def trained(folder: Path, run: dict[str, Any], scratch: str) -> Any:
    """The base of the run, trained as the run says."""
    from datasets import Dataset
    from peft import LoraConfig

    from cream_peft import CREAMConfig, CREAMTrainer
    from cream_peft.model.base import load_base, load_tokenizer
    from cream_peft.tiny.documents import training_rows

    scaling = None if run["scaling"] == "none" else run["scaling"]
    model = load_base(str(folder), target_length=TARGET, rope_scaling_type=scaling, load_in_4bit=False)
    if run["strategy"] == "untuned":
        return model
    full = run["strategy"] == "full"
    tokens = TARGET if run["documents"] == "target" else WINDOW
    batch = BATCH * WINDOW // TARGET if full else BATCH
    arguments = CREAMConfig(
        scratch,
        context_length=TARGET if full else WINDOW,
        target_length=TARGET,
        position_strategy="contiguous" if full else run["strategy"],
        rope_scaling_type=scaling,
        learning_rate=LEARNING_RATE[run["scaling"]],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=10,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=50,
        dataloader_pin_memory=False,
        report_to="none",
        seed=run["seed"],
    )
    trainer = CREAMTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(training_rows(STEPS * batch, tokens, seed=10_000 + run["seed"])),
        processing_class=load_tokenizer(str(folder)),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    return trainer.model


def measure(model: Any) -> dict[str, Any]:
    """Accuracy by length, and by tenth of depth at the target length."""
    from cream_peft.evals.results import Cell, mean_by
    from cream_peft.evals.tasks import TASKS

    cells = [
        Cell(task="recall", length=length, **cell)
        for length in LENGTHS
        for cell in TASKS["recall"](model, None, length, EVALUATION_DOCUMENTS, EVALUATION_SEED)
    ]
    at_target = [cell for cell in cells if cell.length == TARGET]
    return {"by_length": mean_by(cells, "length"), "by_depth": mean_by(at_target, "depth")}


def work(output: Path, index: int, workers: int) -> None:
    """Do every `workers`-th run that is not done yet."""
    import logging
    import warnings

    import datasets
    import torch

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    path = output / "runs.jsonl"
    for run in all_runs()[index::workers]:
        if key(run) in {key(done) for done in read_runs(path)}:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            model = trained(base_of(run["base"]), run, scratch)
        middle = time.perf_counter()
        found = {**run, **measure(model), "train_seconds": round(middle - start, 1)}
        found["evaluation_seconds"] = round(time.perf_counter() - middle, 1)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{len(read_runs(path))}/{len(all_runs())}  {run}  {found['by_length'][TARGET]:.3f}", flush=True)


def base_of(seed: int) -> Path:
    """The base pretrained from `seed`: the one that the package ships, or one of the two beside this file."""
    from cream_peft.tiny import base_folder

    return base_folder() if seed == BASE_SEEDS[0] else Path(__file__).parent / "bases" / str(seed)


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % t interval over runs (None for fewer than two)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return mean, stats.t.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5


def figures(run: dict[str, Any]) -> dict[str, float]:
    """What is compared: accuracy at each length, and at the target its middle (depths .3 to .7) and last tenth."""
    depths = {float(depth): value for depth, value in run["by_depth"].items()}
    middle = [value for depth, value in depths.items() if 0.3 < depth < 0.7]
    by_length = {str(length): value for length, value in run["by_length"].items()}
    return by_length | {"middle": sum(middle) / len(middle), "last tenth": depths[0.95]}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals for every kind of run, and CREAM's paired differences from the others."""
    kinds: dict[tuple, dict[tuple, dict[str, float]]] = {}
    for run in runs:
        kind = (run["scaling"], run["strategy"], run["documents"])
        kinds.setdefault(kind, {})[run["base"], run["seed"]] = figures(run)
    rows = []
    for (scaling, strategy, documents), found in kinds.items():
        row = {"scaling": scaling, "strategy": strategy, "documents": documents, "runs": len(found)}
        for name in next(iter(found.values())):
            mean, half = interval([values[name] for values in found.values()])
            row[name] = {"mean": mean, "half_width_95": half}
        rows.append(row)
    differences = []
    for (scaling, strategy, documents), ours in kinds.items():
        if strategy != "cream":
            continue
        for other in ("pose", "randpos", "contiguous"):
            theirs = kinds.get((scaling, other, documents)) or kinds.get((scaling, other, "window"), {})
            pairs = sorted(set(ours) & set(theirs))
            if not pairs:
                continue
            row = {"scaling": scaling, "documents": documents, "against": other, "pairs": len(pairs)}
            for name in ("2048", "middle", "last tenth"):
                gaps = {pair: ours[pair][name] - theirs[pair][name] for pair in pairs}
                mean, half = interval(list(gaps.values()))
                bases = sorted({base for base, _ in pairs})
                of_base = [interval([gap for (b, _), gap in gaps.items() if b == base])[0] for base in bases]
                row[name] = {"mean": mean, "half_width_95": half, "by_base": dict(zip(bases, of_base, strict=True))}
            differences.append(row)
    return {"rows": rows, "cream_minus": differences}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by length (above) and by depth at 2,048 tokens (below), a column for each scaling."""
    from matplotlib import pyplot as plt

    styles = {
        "untuned": ("#aaaaaa", "o", ":"), "contiguous": ("#e08214", "s", "--"), "randpos": ("#8073ac", "v", "--"),
        "pose": ("#2166ac", "^", "-."), "cream": ("#b2182b", "D", "-"), "full": ("black", "", "-"),
    }  # fmt: skip
    figure, axes = plt.subplots(2, len(SCALINGS), figsize=(11, 5.6), sharey=True, layout="constrained")
    for column, scaling in enumerate(SCALINGS):
        for strategy, (color, marker, dash) in styles.items():
            chosen = [r for r in runs if r["scaling"] == scaling and r["strategy"] == strategy]
            chosen = [r for r in chosen if strategy == "full" or r["documents"] != "target"]
            if not chosen:
                continue
            style = {"color": color, "marker": marker, "linestyle": dash, "markersize": 4, "label": strategy}
            for row, name in enumerate(("by_length", "by_depth")):
                means = {x: sum(r[name][x] for r in chosen) / len(chosen) for x in chosen[0][name]}
                places = range(len(means)) if name == "by_length" else [float(x) for x in means]
                axes[row, column].plot(places, list(means.values()), **style)
        axes[0, column].set_title("no RoPE scaling" if scaling == "none" else scaling)
        axes[0, column].set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS])
        axes[0, column].set_xlabel("document length (tokens)")
        axes[1, column].set_xlabel("depth at 2,048 tokens")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=100)


def report(output: Path) -> None:
    """Write reproduce.json and reproduce.png from the runs that are done."""
    from cream_peft.model.record import machine, versions

    runs = read_runs(output / "runs.jsonl")
    summary = summarise(runs)
    origins = {seed: json.loads((base_of(seed) / "origin.json").read_text()) for seed in BASE_SEEDS}
    content = {
        "command": "make reproduce",
        "versions": versions(),
        "machine": machine(),
        "settings": {
            "context_length": WINDOW,
            "target_length": TARGET,
            "steps": STEPS,
            "batch": BATCH,
            "lora_r": 16,
            "learning_rate": LEARNING_RATE,
            "evaluation_seed": EVALUATION_SEED,
            "evaluation_documents": EVALUATION_DOCUMENTS,
            "queries_per_document": 16,
        },
        "bases": origins,
        "planned_runs": len(all_runs()),
        "finished_runs": len(runs),
        "summary": summary,
        "runs": runs,
    }
    (output / "reproduce.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(runs, output / "reproduce.png")
    print(f"{len(runs)} of {len(all_runs())} runs; the figures are in {output}/reproduce.json and reproduce.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write the figures of the runs that are done")
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.index is not None:
        work(options.output, options.index, options.workers)
        return
    if options.report:
        report(options.output)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--output", str(options.output), "--workers", str(options.workers)]
    processes = [subprocess.Popen([*command, "--index", str(index)]) for index in range(options.workers)]
    if sum(process.wait() for process in processes):
        sys.exit("a worker failed; start the command again to resume")
    report(options.output)


if __name__ == "__main__":
    main()
