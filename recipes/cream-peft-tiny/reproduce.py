"""Position strategies under every RoPE scaling on the tiny model: three bases by three seeds, for two tasks.

python recipes/cream-peft-tiny/reproduce.py [--minutes 30] [--only new_skill ntk]

`recall` is the form of question that the base knows, `new_skill` one that it never saw: `key MARK value`, where MARK is
the last value. `filler_mark` is the demo's form, where MARK is a filler: not every base learns it. The bases are the
shipped one and the two in bases/, not quantized. The evaluation documents are drawn from a seed that no setting was
chosen on.

A finished run is a line of reproduce-runs.jsonl. Runs that are in the output folder, or without --again in results/,
are not done again.
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
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from pieces import read_lines  # noqa: E402

Run = dict[str, Any]

RUNS = "reproduce-runs.jsonl"
BASES, SEEDS, TRIED_SEED = (0, 2, 4), (0, 1, 2), 100
EVALUATION_SEED, QUESTIONS = 20_261_123, 512
TRAINING = {  # Windows of 256 tokens in a step; shorter windows are as many more.
    "recall": {"max_steps": 150, "batch": 16, "warmup_steps": 10},
    "new_skill": {"max_steps": 150, "batch": 8, "warmup_steps": 20},
    "filler_mark": {"max_steps": 400, "batch": 8, "warmup_steps": 30},
}
RATE = {
    "recall": {"none": 5e-3, "linear": 1e-2, "ntk": 5e-3, "yarn": 5e-3},
    "new_skill": {"ntk": 4e-3, "yarn": 4e-3, "none": 4e-3, "linear": 4e-3},
}
TRIED_RATES = (2e-3, 4e-3)
"""Of filler_mark."""
SCALINGS = tuple(RATE["recall"])
EXTENSION, IN_WINDOW = (256, 2048), (64, 256)
"""(context_length, target_length); the bases' window is 256 tokens."""
PLACES = [*((scaling, *EXTENSION) for scaling in RATE["new_skill"]), ("none", *IN_WINDOW)]
"""(scaling, context_length, target_length) of the new skill."""


def sigma(context_length: int, target_length: int) -> float:
    """The published sigma of CREAM, 3 half windows at a factor of 8, and its shape at others."""
    return 3 / 8 * target_length / context_length


def strategies(context_length: int, target_length: int) -> list[tuple[str, dict[str, Any]]]:
    """(position_strategy, its options) that the new skill is trained with, with three seeds a base."""
    return [("contiguous", {}), ("pose", {}), ("cream", {"sigma": sigma(context_length, target_length)})]


def beside(context_length: int, target_length: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Strategies beside them, by the names that they have in tables; those of CLOSE with two seeds a base, the others
    with one. Another one is a line here."""
    published = {"sigma": sigma(context_length, target_length)}
    return {
        "CREAM, default sigma": ("cream", {}),
        "CREAM, uniform middle": ("cream", {"sigma": float("inf")}),
        "PoSE, four chunks": ("pose", {"chunks": 4}),
        "CREAM, a fifth plain": ("cream", published | {"contiguous_share": 0.2}),
        "short random segments": ("segments", {}),
        "RandPos": ("randpos", {}),
        "RandPos, growing target": ("randpos", {"target_growth": 0.8}),
    }


CLOSE = ("CREAM, default sigma", "CREAM, uniform middle", "PoSE, four chunks")


def label(run: Run) -> str:
    """The strategy with its options: `pose`, `cream sigma=3`."""
    return " ".join([run["strategy"], *(f"{name}={value:g}" for name, value in run["options"].items())])


def key(run: Run) -> str:
    """What a run is known by: its settings."""
    names = ("task", "scaling", "context_length", "target_length", "documents", "rate", "base", "seed")
    return " ".join([label(run), *(f"{name}={run[name]}" for name in names)])


def place(run: Run) -> tuple[str, int, int]:
    """Where a strategy is compared with others."""
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
        | {"rate": None if seed is None else RATE["recall"][scaling]}
        for case, lengths, documents, seed in cases
        for scaling, base in product(SCALINGS, BASES)
    ]


def new_skill_runs() -> list[Run]:
    """The grid, what says most first."""

    def grid(where: tuple[str, int, int], cases: list, seed: int | None = SEEDS[0]) -> list[Run]:
        rate = None if seed is None else RATE["new_skill"][where[0]]
        return [_run("new_skill", where, case, base, seed, rate=rate) for case, base in product(cases, BASES)]

    ntk, *others, linear, inside = PLACES
    runs = [run for where in (ntk, *others) for run in grid(where, strategies(*where[1:]))]
    runs += [run for where in PLACES for run in grid(where, [("untuned", {})], None)]
    for where in PLACES:
        cases = beside(*where[1:])
        runs += grid(where, list(cases.values())) + grid(where, [cases[name] for name in CLOSE], SEEDS[1])
    runs += [run for where in (ntk, *others) for seed in SEEDS[1:] for run in grid(where, strategies(*where[1:]), seed)]
    return runs + [
        run for where in (inside, linear) for seed in SEEDS for run in grid(where, strategies(*where[1:]), seed)
    ]


def filler_mark_runs() -> list[Run]:
    """The demo's form under ntk, on every base, by rates, with plain positions and with CREAM's."""
    where = ("ntk", *EXTENSION)
    plain, _, cream = strategies(*EXTENSION)
    runs = [_run("filler_mark", where, ("untuned", {}), base, None) for base in BASES]
    return runs + [
        _run("filler_mark", where, case, base, TRIED_SEED, rate=rate)
        for rate, base, case in product(TRIED_RATES, BASES, (plain, cream))
    ]


def planned() -> list[Run]:
    """Every run, in the order in which they are done: the first seed of all comes first."""
    return sorted(new_skill_runs() + recall_runs() + filler_mark_runs(), key=lambda run: run["seed"] or 0)


def read_runs(output: Path, again: bool = False) -> tuple[list[Run], dict[str, Any]]:
    """The finished runs of results/ (not with `again`) and of `output`, and the environments that they name."""
    lines = read_lines(*([] if again else [HERE / "results" / RUNS]), output / RUNS)
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


def documents_of(task: str) -> dict[str, Any]:
    """Options of `training_document`."""
    from cream_peft.tiny.documents import CONFIGURATIONS, VOCABULARY_SIZE

    if task == "new_skill":
        return CONFIGURATIONS["new_skill"] | {"mark": VOCABULARY_SIZE - 1}
    return CONFIGURATIONS["new_skill" if task == "filler_mark" else task]


def train(run: Run, scratch: str) -> Any:
    """The base of the run, trained as the run says."""
    from datasets import Dataset
    from peft import LoraConfig

    from cream_peft import CREAMConfig, CREAMTrainer
    from cream_peft.model.base import load_base
    from cream_peft.model.tokenizer import load_tokenizer
    from cream_peft.tiny.documents import training_rows
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
    options, count = documents_of(run["task"]), settings["max_steps"] * batch
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
    options = {"mark": documents_of(run["task"]).get("mark"), "queries": queries}
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
    runs = [run for run in planned() if key(run) not in finished]
    return [run for run in runs if set(only) <= {*key(run).split(), *key(run).replace("=", " ").split()}]


def work(output: Path, workers: int, minutes: float, only: list[str], again: bool = False) -> None:
    """Do the missing runs, and begin none after so many minutes."""
    start, current = time.perf_counter(), environment()
    done, known = read_runs(output, again)
    pending: dict[Future, str] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), quiet) as pool, (output / RUNS).open("a") as file:
        # Ends a line that a kill cut off; empty lines are passed over.
        print(file=file)
        if current["environment"] not in known:
            print(json.dumps(current), file=file, flush=True)
        while True:
            ready = [run for run in missing(done, only) if key(run) not in pending.values()]
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
                print(f"{len(done)} of {len(planned())}: {key(found)}: {at_target:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--only", nargs="+", default=[], help="words that a run must hold: new_skill ntk seed=0")
    parser.add_argument("--again", action="store_true", help="do not count what is committed as done")
    parser.add_argument("--report", action="store_true", help="only write the figures of the runs that are done")
    parser.add_argument("--publish", action="store_true", help="write them into results/, and the tables into the page")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.report or options.publish):
        work(options.output, options.workers, options.minutes, options.only, options.again)
    from reproduce_report import report

    report(options.output, HERE if options.publish else None, options.again)


if __name__ == "__main__":
    sys.exit(main())
