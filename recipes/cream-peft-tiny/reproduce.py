"""Position strategies under every RoPE scaling on the tiny model: three bases by three seeds, for two tasks.

python recipes/cream-peft-tiny/reproduce.py [--minutes 30] [--only new_skill ntk]

`recall` is the form of question that the base knows, `new_skill` one that it never saw. The rate of the new skill was
chosen for each RoPE scaling on another seed, by the accuracy at the window. The bases are the shipped one and the two
in bases/, not quantized. The evaluation documents are drawn from a seed that no setting was chosen on.

A finished run is a line of reproduce-runs.jsonl. Runs that are in results/ or in the output folder are not done again.
At the end, or with --report, the figures of all finished runs are written into the output folder; --publish writes them
into results/ and the tables into the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from pieces import read_lines  # noqa: E402

Run = dict[str, Any]

RUNS = "reproduce-runs.jsonl"
BASES, SEEDS, SEARCH_SEED = (0, 2, 4), (0, 1, 2), 100
EVALUATION_SEED, QUESTIONS = 20_261_123, 512
RECALL_RATE = {"none": 5e-3, "linear": 1e-2, "ntk": 5e-3, "yarn": 5e-3}
TRAINING = {  # Windows of 256 tokens in a step; shorter windows are as many more.
    "recall": {"max_steps": 150, "batch": 16, "warmup_steps": 10},
    "new_skill": {"max_steps": 400, "batch": 8, "warmup_steps": 30},
}
EXTENSION, IN_WINDOW = (256, 2048), (64, 256)
"""(context_length, target_length); the bases' window is 256 tokens."""
SEARCHED = {
    ("ntk", *EXTENSION): (2e-3, 4e-3),
    ("none", *EXTENSION): (2e-3, 4e-3),
    ("none", *IN_WINDOW): (2e-3, 4e-3),
    ("yarn", *EXTENSION): (1e-3, 2e-3),
    ("linear", *EXTENSION): (4e-3, 8e-3),
}
"""(scaling, context_length, target_length) -> the rates that are searched for the new skill."""


def sigma(context_length: int, target_length: int) -> float:
    """The published law of CREAM, 3 half windows at a factor of 8, and its shape at others."""
    return 3 / 8 * target_length / context_length


def strategies(context_length: int, target_length: int) -> list[tuple[str, dict[str, Any]]]:
    """(position_strategy, its options) that the new skill is trained with, with three seeds a base."""
    return [("contiguous", {}), ("pose", {}), ("cream", {"sigma": sigma(context_length, target_length)})]


BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("cream", {}),
    ("cream", {"sigma": float("inf")}),
    ("pose", {"chunks": 4}),
    ("segments", {}),
    ("randpos", {}),
    ("randpos", {"target_growth": 0.8}),
    ("cream", {"sigma": 3.0, "contiguous_share": 0.2}),
]
"""Strategies beside them, in extension, with one seed a base. Another one is a line here."""


def label(run: Run) -> str:
    """The strategy with its options: `pose`, `cream sigma=3`."""
    return " ".join([run["strategy"], *(f"{name}={value:g}" for name, value in run["options"].items())])


def key(run: Run) -> str:
    """What a run is known by: its settings."""
    names = ("task", "scaling", "context_length", "target_length", "documents", "rate", "base", "seed")
    return " ".join([label(run), *(f"{name}={run[name]}" for name in names)])


def place(run: Run) -> tuple[str, int, int]:
    """What a rate is chosen for."""
    return run["scaling"], run["context_length"], run["target_length"]


def _run(
    task: str, where: tuple[str, int, int], case: tuple[str, dict], base: int, seed: int | None, **more: Any
) -> Run:
    scaling, context_length, target_length = where
    run = {"task": task, "scaling": scaling, "context_length": context_length, "target_length": target_length}
    run |= {"strategy": case[0], "options": case[1], "documents": "window", "rate": None, "base": base, "seed": seed}
    return run | more


def recall_runs() -> list[Run]:
    """Three seeds a base on documents of the window; one for crops and for full length.

    documents: `window` are documents of 256 tokens; `target` are documents of 2,048 tokens, from which the strategy
    crops 256. contiguous and randpos take the first 256 tokens either way, so they need no second run.
    """
    whole = (EXTENSION[1], EXTENSION[1])
    pose, cream = ("pose", {}), ("cream", {"sigma": sigma(*EXTENSION)})
    short = [(case, EXTENSION, "window") for case in (("contiguous", {}), ("randpos", {}), pose, cream)]
    long = [(pose, EXTENSION, "target"), (cream, EXTENSION, "target"), (("contiguous", {}), whole, "target")]
    cases = [(("untuned", {}), EXTENSION, "window", None)]
    cases += [(*case, 0) for case in short + long] + [(*case, seed) for seed in SEEDS[1:] for case in short]
    return [
        _run("recall", (scaling, *lengths), case, base, seed, documents=documents)
        | {"rate": None if seed is None else RECALL_RATE[scaling]}
        for case, lengths, documents, seed in cases
        for scaling, base in product(RECALL_RATE, BASES)
    ]


def search_runs(where: tuple[str, int, int]) -> list[Run]:
    """Each rate on each base, with plain positions and with CREAM's."""
    plain, _, cream = strategies(*where[1:])
    return [
        _run("new_skill", where, case, base, SEARCH_SEED, rate=rate)
        for rate, base, case in product(SEARCHED[where], BASES, (plain, cream))
    ]


def mean_at_window(done: list[Run], where: tuple[str, int, int]) -> dict[float, float]:
    """Rate -> accuracy at the window, averaged over the search's runs; empty until all are done."""
    finished = {key(run): run for run in done}
    wanted = search_runs(where)
    if not all(key(run) in finished for run in wanted):
        return {}
    window = str(where[1])
    return {
        rate: fmean(finished[key(run)]["by_length"][window] for run in wanted if run["rate"] == rate)
        for rate in SEARCHED[where]
    }


def new_skill_runs(done: list[Run]) -> list[Run]:
    """The search and the grid, what says most first. A run whose search is not done has no rate yet."""

    def grid(where: tuple[str, int, int], cases: list, seeds: tuple[int, ...]) -> list[Run]:
        found = mean_at_window(done, where)
        rate = max(found, key=found.__getitem__) if found else None
        return [
            _run("new_skill", where, case, base, seed, rate=rate) for seed, case, base in product(seeds, cases, BASES)
        ]

    runs = []
    for where in SEARCHED:
        runs += [_run("new_skill", where, ("untuned", {}), base, None) for base in BASES]
        seeds = SEEDS if where[1:] == IN_WINDOW else SEEDS[:1]
        runs += search_runs(where) + grid(where, strategies(*where[1:]), seeds)
    for where in SEARCHED:
        if where[1:] == EXTENSION:
            runs += grid(where, BESIDE, SEEDS[:1])
    for seed in SEEDS[1:]:
        for where in SEARCHED:
            runs += grid(where, strategies(*where[1:]), (seed,))
    return list({key(run): run for run in runs}.values())


def planned(done: list[Run]) -> list[Run]:
    """Every run, in the order in which they are done."""
    return recall_runs() + new_skill_runs(done)


def read_runs(output: Path) -> tuple[list[Run], dict[str, Any]]:
    """The finished runs of results/ and of `output`, and the environments that they name."""
    lines = read_lines(HERE / "results" / RUNS, output / RUNS)
    environments = {line["environment"]: line for line in lines if "versions" in line}
    return list({key(line): line for line in lines if "versions" not in line}.values()), environments


def environment() -> dict[str, Any]:
    """The versions and the machine, under a short hash."""
    from cream_peft.model.record import machine, versions

    found = {"versions": versions(), "machine": machine()}
    return {"environment": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]} | found


def base_of(seed: int) -> Path:
    """The base pretrained from `seed`: the one that the package ships, or one of the two beside this file."""
    from cream_peft.tiny import base_folder

    return base_folder() if seed == BASES[0] else HERE / "bases" / str(seed)


def train(run: Run, scratch: str) -> Any:
    """The base of the run, trained as the run says."""
    from datasets import Dataset
    from peft import LoraConfig

    from cream_peft import CREAMConfig, CREAMTrainer
    from cream_peft.model.base import load_base, load_tokenizer
    from cream_peft.tiny.documents import CONFIGURATIONS, training_rows
    from cream_peft.train.watch import TrainingError

    scaling, context_length, target_length = place(run)
    folder, scaling = str(base_of(run["base"])), None if scaling == "none" else scaling
    model = load_base(folder, target_length=target_length, rope_scaling_type=scaling, load_in_4bit=False)
    if run["strategy"] == "untuned":
        return model
    settings = dict(TRAINING[run["task"]])
    batch = settings.pop("batch") * EXTENSION[0] // context_length
    arguments = CREAMConfig(
        scratch,
        context_length=context_length,
        target_length=target_length,
        position_strategy=run["strategy"],
        **run["options"],
        rope_scaling_type=scaling,
        learning_rate=run["rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        seed=run["seed"],
        **settings,
    )
    tokens = target_length if run["documents"] == "target" else context_length
    options, count = CONFIGURATIONS[run["task"]], settings["max_steps"] * batch
    trainer = CREAMTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(training_rows(count, tokens, seed=10_000 + run["seed"], **options)),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
    )
    try:
        trainer.train()
    except TrainingError as error:
        # It stops before what is not finite reaches the weights: the run counts as far as it came.
        run["stopped"] = str(error)
    return trainer.model


def lengths(run: Run) -> list[int]:
    """Document lengths (tokens) of the evaluation: the window of the training, doubled up to the target."""
    window = min(run["context_length"], EXTENSION[0])
    return [window << doubling for doubling in range((run["target_length"] // window).bit_length())]


def measure(model: Any, run: Run) -> dict[str, Any]:
    """Accuracy by length, and by tenth of depth at the target length."""
    from cream_peft.tiny.documents import NUM_QUERIES, evaluate_recall

    # A document of 64 tokens has room for four questions.
    queries = NUM_QUERIES * min(run["context_length"], EXTENSION[0]) // EXTENSION[0]
    options = {"marked": run["task"] == "new_skill", "queries": queries}
    by_length = {}
    for length in lengths(run):
        found = evaluate_recall(model, length, QUESTIONS // queries, EVALUATION_SEED, **options)
        by_length[str(length)] = float(found["correct"].mean())
    # The last length is the target. Depths are below 1, since the questions come last.
    tenths = (found["depth"] * 10).astype(int)
    by_depth = {
        f"0.{tenth}5": float(found["correct"][tenths == tenth].mean()) for tenth in sorted(set(tenths.tolist()))
    }
    return {"by_length": by_length, "by_depth": by_depth}


def quiet() -> None:
    """What a worker does first: one thread, and no word of the libraries."""
    import logging
    import warnings

    import datasets
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def finish(run: Run) -> Run:
    """The run with its figures and its seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        model = train(run, scratch)
    middle = time.perf_counter()
    found = measure(model, run)
    seconds = {"train_seconds": round(middle - start, 1), "evaluation_seconds": round(time.perf_counter() - middle, 1)}
    return run | found | seconds


def missing(done: list[Run], only: list[str]) -> list[Run]:
    """The planned runs that are not done and hold every word of `only`."""
    finished = {key(run) for run in done}
    runs = [run for run in planned(done) if key(run) not in finished]
    return [run for run in runs if set(only) <= {*key(run).split(), *key(run).replace("=", " ").split()}]


def work(output: Path, workers: int, minutes: float, only: list[str]) -> None:
    """Do the missing runs, and begin none after so many minutes."""
    start, current = time.perf_counter(), environment()
    done, known = read_runs(output)
    pending: dict[Future, str] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), quiet) as pool, (output / RUNS).open("a") as file:
        # Ends a line that a kill cut off; empty lines are passed over.
        print(file=file)
        if current["environment"] not in known:
            print(json.dumps(current), file=file, flush=True)
        while True:
            ready = [r for r in missing(done, only) if r["strategy"] == "untuned" or r["rate"] is not None]
            ready = [run for run in ready if key(run) not in pending.values()]
            if time.perf_counter() - start < 60 * minutes:
                pending |= {pool.submit(finish, run): key(run) for run in ready[: workers - len(pending)]}
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                del pending[future]
                found = future.result() | {"environment": current["environment"]}
                print(json.dumps(found), file=file, flush=True)
                done.append(found)
                at_target = found["by_length"][str(found["target_length"])]
                print(f"{len(done)} of {len(planned(done))}: {key(found)}: {at_target:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--only", nargs="+", default=[], help="words that a run must hold: new_skill ntk seed=0")
    parser.add_argument("--report", action="store_true", help="only write the figures of the runs that are done")
    parser.add_argument("--publish", action="store_true", help="write them into results/, and the tables into the page")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.report or options.publish):
        work(options.output, options.workers, options.minutes, options.only)
    from reproduce_report import report

    report(options.output, HERE if options.publish else None)


if __name__ == "__main__":
    sys.exit(main())
