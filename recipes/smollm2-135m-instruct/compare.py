"""SmolLM2-135M-Instruct extended with four position strategies under one budget, against RoPE scaling alone.

    python recipes/smollm2-135m-instruct/compare.py --budget cpu      # 8K to 16K, hours on two cores
    python recipes/smollm2-135m-instruct/compare.py --budget gpu --minutes 9    # 8K to 64K, again until it says done
    python recipes/smollm2-135m-instruct/compare.py --budget settings # what was tried, on other prompts; search: before

Trains and measures with cream-peft's own commands, a row at a time. What a kill or --minutes interrupts is resumed
by the same command. Writes compare.json and a picture to --output, and prints the table. With
--only several processes share the work.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cream_peft.cli import main as cream_peft
from cream_peft.evals.results import Cell, Results, compare_cells, file_name, mean_loss, wilson_interval
from cream_peft.evals.table import difference_in_words
from cream_peft.model.record import machine, versions

HOME = Path("runs/smollm2-135m-instruct")
RECIPE = Path(__file__).parent / "cream-8k-64k-qlora.yaml"
BASE, DATA = HOME / "base", HOME / "data"
FIFTHS = [0.1, 0.3, 0.5, 0.7, 0.9]
EIGHTHS = [(place + 0.5) / 8 for place in range(8)]
MIDDLE = (0.3, 0.7)
PATIENCE = 20
"""Seconds that an interrupted command has to end."""
STRATEGIES = ("contiguous", "randpos", "pose", "cream")


def words_of(value: Any) -> list[str]:
    """A setting as a command line has it."""
    return list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]


@dataclass(frozen=True)
class Row:
    """One model: a RoPE scaling (none: the base as it is) and a strategy (untuned: nothing is trained)."""

    scaling: str
    strategy: str
    seed: int = 0
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe that differ."""
    samples: int | None = None
    """Documents asked, if not as many as the budget says."""

    @property
    def name(self) -> str:
        changed = (f"{key} {'+'.join(words_of(value)).rpartition('/')[2]}" for key, value in self.changed.items())
        words = [self.scaling, self.strategy, *changed]
        return " ".join([*words, f"seed {self.seed}"] if self.seed else words)


@dataclass(frozen=True)
class Budget:
    """What is trained, for how long, and what is asked."""

    rows: list[Row]
    target_length: int
    lengths: list[int]
    samples: int
    seed: int
    """Of the prompts."""
    task: str
    depths: list[float]
    texts: list[str]
    """Held-out texts whose perplexity is measured, of data/held-out."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe's."""
    flags: tuple[str, ...] = ()
    """Flags of the evaluation."""
    first: tuple[str, ...] = ()
    """Rows of --first: what RoPE scaling alone does, and CREAM on it."""


ON_A_CPU = {
    "context_length": 1024, "max_steps": 96, "warmup_steps": 4, "gradient_accumulation_steps": 1, "max_documents": 400,
    "held_out_documents": 0, "eval_strategy": "no", "optim": "adamw_torch", "gradient_checkpointing": False,
    "load_in_4bit": False, "dtype": "bfloat16", "learning_rate": 1e-3, "save_steps": 24,
}  # fmt: skip
TRIED_FIRST = ON_A_CPU | {"max_steps": 48, "dtype": "float32", "learning_rate": 5e-4, "save_steps": 12}
CHOSEN = {name: ON_A_CPU[name] for name in ("max_steps", "dtype", "learning_rate", "save_steps")}
SCALINGS = ("none", "linear", "ntk", "yarn")
UNTUNED = [Row(scaling, "untuned") for scaling in SCALINGS]
BUDGETS = {
    "cpu": Budget(
        rows=[Row(scaling, "untuned", samples=2) for scaling in SCALINGS]
        + [Row("linear", strategy, samples=2) for strategy in STRATEGIES]
        + [Row("ntk", strategy) for strategy in STRATEGIES]
        + [Row("ntk", strategy, seed) for seed in (1, 2) for strategy in ("pose", "cream")]
        + [Row("yarn", "cream", changed={name: TRIED_FIRST[name] for name in CHOSEN}, samples=2)]
        + [Row("yarn", strategy, samples=2) for strategy in STRATEGIES],
        target_length=16_384, lengths=[4096, 16_384], samples=3, seed=2026, task="multikey_needle", depths=FIFTHS,
        texts=["paradise-lost"], train=ON_A_CPU, flags=("--no_4bit",), first=("ntk untuned", "ntk cream"),
    ),
    "search": Budget(
        rows=[Row("yarn", "untuned"), Row("yarn", "cream"), Row("yarn", "cream", changed={"learning_rate": 2e-3}),
              Row("none", "untuned"), Row("none", "cream"),
              Row("linear", "untuned"), Row("linear", "cream", changed=CHOSEN)],
        target_length=16_384, lengths=[16_384], samples=1, seed=77, task="multikey_needle", depths=EIGHTHS,
        texts=["areopagitica"], train=TRIED_FIRST, flags=("--no_4bit",),
    ),
    "settings": Budget(
        rows=[Row("ntk", "untuned"), Row("ntk", "cream")]
        + [Row("ntk", "cream", changed=changed) for changed in (
            {"dataset_name": f"{DATA}/plays.jsonl", "assistant_only_loss": False}, {"learning_rate": 3e-4},
            {"lora_modules_to_save": "norm", "dtype": "float32"})],
        target_length=16_384, lengths=[16_384], samples=2, seed=77, task="multikey_needle", depths=FIFTHS,
        texts=[], train=ON_A_CPU, flags=("--no_4bit",),
    ),
    "gpu": Budget(
        rows=UNTUNED
        + [Row(scaling, strategy) for scaling in ("yarn", "ntk", "linear") for strategy in STRATEGIES]
        + [Row(scaling, strategy, seed) for seed in (1, 2) for scaling in ("yarn", "ntk", "linear")
           for strategy in ("pose", "cream")],
        target_length=65_536, lengths=[4096, 8192, 16_384, 32_768, 65_536], samples=25, seed=2026,
        task="multikey_needle", depths=EIGHTHS, texts=["paradise-lost", "king-james-bible"],
        first=("yarn untuned", "yarn cream"),
    ),
}  # fmt: skip


class TimeIsUp(Exception):
    """--minutes are over; what runs was stopped in an orderly way."""


class Failed(Exception):
    """A row cannot be trained or measured."""


def call(arguments: list[str], deadline: float, log: Path) -> None:
    """`cream-peft` in a process of its own: its progress is shown, what it prints is added to `log`.

    Raises:
        TimeIsUp: at `deadline` (time.monotonic()); the process is interrupted as by Ctrl-C.
        Failed: it has said why.
    """
    if time.monotonic() > deadline:
        raise TimeIsUp
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", "cream_peft.cli", *arguments], stdout=output)
        try:
            process.wait(timeout=max(1.0, deadline - time.monotonic()) if deadline < float("inf") else None)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                # What it was importing or waiting for swallowed the interruption.
                process.kill()
            raise TimeIsUp from reason
    if process.returncode:
        raise Failed


def adapter_of(row: Row, output: Path) -> Path:
    return output / "adapters" / row.name.replace(" ", "-")


def train(row: Row, budget: Budget, output: Path, deadline: float) -> Path:
    """The adapter of `row`, trained unless it is there.

    Raises:
        Failed: if one is there that was trained with other settings.
    """
    folder = adapter_of(row, output)
    settings = {
        "model_name_or_path": BASE, "base_model_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "output_dir": folder,
        "target_length": budget.target_length, "position_strategy": row.strategy, "rope_scaling_type": row.scaling,
        "seed": row.seed, **budget.train, **row.changed,
    }  # fmt: skip
    asked, text = folder.with_name(f"{folder.name}.json"), json.dumps(settings, default=str, indent=1) + "\n"
    if asked.is_file() and asked.read_text(encoding="utf-8") != text:
        print(f"error: {folder} was trained with other settings: choose another --output", file=sys.stderr)
        raise Failed
    if (folder / "summary.json").is_file():
        return folder
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(text, encoding="utf-8")
    if list(folder.glob("checkpoint-*")):
        settings["resume_from_checkpoint"] = True
    if settings.get("eval_strategy") == "no":
        settings["load_best_model_at_end"] = False
    flags = [word for key, value in settings.items() for word in (f"--{key}", *words_of(value))]
    call(["train", "--config", str(RECIPE), *flags, "--json", str(folder / "summary.json")], deadline, output / "log")
    return folder


def evaluate(row: Row, budget: Budget, output: Path, deadline: float, folder: str, *task: str) -> None:
    """Measure `row`, trained first if need be, with one task; what `folder` holds already is kept."""
    if row.strategy == "untuned":
        model = str(BASE) if row.scaling == "none" else f"{BASE}+{row.scaling}"
    else:
        model = str(train(row, budget, output, deadline))
    common = [
        "evaluate",
        "--compare",
        f"{row.name}={model}",
        "--target_length",
        str(budget.target_length),
        *budget.flags,
    ]
    common += ["--base_model", str(BASE), "--seed", str(budget.seed), "--lengths", *map(str, budget.lengths)]
    call([*common, "--output_dir", str(output / folder), "--tasks", *task], deadline, output / "log")


def evaluations(budget: Budget, row: Row) -> dict[str, list[str]]:
    """Folder of the results -> task and its flags; what costs least comes first."""
    found = {}
    for text in budget.texts:
        path, longest = DATA / "held-out" / f"{text}.txt", str(max(budget.lengths))
        if path.is_file():
            words = ["perplexity", "--text", str(path), "--max_tokens", longest, "--samples", "1"]
            found[f"perplexity-{text}"] = words
    depths = map(str, budget.depths)
    return found | {"answers": [budget.task, "--samples", str(row.samples or budget.samples), "--depths", *depths]}


def found_of(folder: Path, row: Row) -> list[Cell]:
    path = folder / file_name(row.name)
    return Results.read(path).cells if path.is_file() else []


def chosen(cells: list[Cell], length: int, low: float = 0.0, high: float = 1.0) -> list[Cell]:
    """The cells at `length`, of the depths between `low` and `high`."""
    found = [cell for cell in cells if cell.length == length and low <= cell.depth <= high]
    return sorted(found, key=lambda cell: cell.depth)


def answers(cells: list[Cell]) -> str:
    """0 and 1 for each answer."""
    return "".join(cell.correct or "" for cell in cells)


def measured(cells: list[Cell], length: int) -> dict[str, Any]:
    """What a row's answers at `length` come to, over all depths and in the middle."""
    here, middle = chosen(cells, length), chosen(cells, length, *MIDDLE)
    asked = answers(here)
    found = {
        "accuracy": asked.count("1") / len(asked), "questions": len(asked),
        "interval": wilson_interval(asked.count("1"), len(asked)),
        "middle": answers(middle).count("1") / len(answers(middle)) if middle else None,
        "by depth": {str(cell.depth): cell.value for cell in here},
    }  # fmt: skip
    if mean_loss(here) is not None:
        found |= {"answer loss": mean_loss(here), "answer loss, middle": mean_loss(middle)}
        found["answer loss by depth"] = {str(cell.depth): mean_loss([cell]) for cell in here}
    return found


def compared(budget: Budget, given: dict[tuple[str, str, int], list[Cell]]) -> list[dict[str, Any]]:
    """CREAM against every other strategy (untuned too) of a RoPE scaling: the seeds and documents that both have."""
    differences = []
    for scaling, strategy in dict.fromkeys(key[:2] for key in given if key[1] != "cream"):
        for length in budget.lengths:
            for name, bounds in {"all depths": (0.0, 1.0), "middle": MIDDLE}.items():
                pairs, seeds = [], []
                for seed in sorted(key[2] for key in given if key[:2] == (scaling, strategy)):
                    sides = [given.get((scaling, one, seed), []) for one in (strategy, "cream")]
                    sides = [chosen(side, length, *bounds) for side in sides]
                    # Not where one of them is half measured.
                    if sides[0] and [cell.depth for cell in sides[0]] == [cell.depth for cell in sides[1]]:
                        pairs += zip(*sides, strict=True)
                        seeds.append(seed)
                found = compare_cells(pairs)
                if found:
                    where = {"scaling": scaling, "against": strategy, "length": length, "depths": name, "seeds": seeds}
                    differences.append(where | found)
    return differences


def summarise(budget: Budget, output: Path) -> dict[str, Any]:
    """What was measured so far: a row a model, and CREAM against each other strategy on the same questions."""
    rows, given = [], {}
    for row in budget.rows:
        found: dict[str, Any] = vars(row).copy()
        cells = found_of(output / "answers", row)
        if cells and not row.changed:
            given[row.scaling, row.strategy, row.seed] = cells
        for length in sorted({cell.length for cell in cells}):
            found[f"{budget.task} at {length}"] = measured(cells, length)
        for text in budget.texts:
            values = {str(cell.length): cell.value for cell in found_of(output / f"perplexity-{text}", row)}
            if values:
                found[f"perplexity of {text}"] = values
        summary = adapter_of(row, output) / "summary.json"
        if summary.is_file():
            found["training"] = json.loads(summary.read_text(encoding="utf-8"))
        if set(found) > set(vars(row)):
            rows.append(found)
    settings = {name: value for name, value in vars(budget).items() if name != "rows"} | {"recipe": RECIPE.name}
    return {
        "settings": settings,
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "cream minus": compared(budget, given),
    }


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown: a row a model, accuracy at all depths and in the middle, and perplexities."""
    lengths, texts, task = (summary["settings"][name] for name in ("lengths", "texts", "task"))
    head = ["RoPE scaling, positions", *(f"{task}, {length:,}" for length in lengths)]
    head += [f"perplexity of {text}, {length:,}" for text in texts for length in lengths]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in summary["rows"]:
        changed = [f"{key}={value}" for key, value in row["changed"].items() if key != "save_steps"]
        words = [row["scaling"], row["strategy"], *changed, *([f"seed {row['seed']}"] if row["seed"] else [])]
        columns = [" ".join(words)]
        for length in lengths:
            found = row.get(f"{task} at {length}")
            if not found:
                columns.append("not run")
                continue
            interval = "-".join(f"{bound:.2f}" for bound in found["interval"])
            middle = "" if found["middle"] is None else f", middle {found['middle']:.2f}"
            told = f"{found['accuracy']:.2f} of {found['questions']} ({interval}){middle}"
            if "answer loss" in found:
                middle = found["answer loss, middle"]
                told += f"; loss {found['answer loss']:.2f}" + ("" if middle is None else f", middle {middle:.2f}")
            columns.append(told)
        for text in texts:
            values = row.get(f"perplexity of {text}", {})
            columns += [f"{values[str(length)]:.1f}" if str(length) in values else "not run" for length in lengths]
        lines.append(f"| {' | '.join(columns)} |")
    for found in summary["cream minus"]:
        told = (
            f"{found['scaling']}, {found['length']:,} tokens, {found['depths']}: CREAM minus {found['against']} "
            f"{found['difference']:+.2f} (p = {found['p_value']:.2f}; {found['only_second']} to {found['only_first']})"
        )
        if "answer_loss" in found:
            loss = found["answer_loss"]
            told += f"; loss {difference_in_words(loss)}, {loss['documents']} documents"
        lines.append(told)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--budget", choices=BUDGETS, default=here, help=f"default: {here}, as this machine")
    parser.add_argument("--output", type=Path, help=f"default: {HOME}/BUDGET")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to resume later")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows")
    parser.add_argument("--first", action="store_true", help="two rows: RoPE scaling alone, and CREAM on it")
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], options.output or HOME / options.budget
    if not (BASE / "model.safetensors").is_file() or not (DATA / "plays.jsonl").is_file():
        print(f"error: {HOME} has no model and data: run {Path(__file__).parent / 'prepare.py'} first", file=sys.stderr)
        return 2
    names = [row.name for row in budget.rows]
    wanted = budget.first if options.first else options.only or names
    if not set(wanted) <= set(names):
        print(f"error: --budget {options.budget} has the rows {', '.join(names)}", file=sys.stderr)
        return 2
    deadline, failed = time.monotonic() + 60 * options.minutes, []
    output.mkdir(parents=True, exist_ok=True)
    try:
        for row in budget.rows:
            for folder, task in evaluations(budget, row).items() if row.name in wanted else ():
                start = time.monotonic()
                try:
                    evaluate(row, budget, output, deadline, folder, *task)
                    print(f"{row.name}, {folder}: {time.monotonic() - start:.0f} s", flush=True)
                except Failed:
                    failed.append(row.name)
                    break
        state = f"not done, these rows failed: {', '.join(failed)}" if failed else "done"
    except TimeIsUp:
        state = "not done: the same command resumes"
    summary = summarise(budget, output)
    (output / "compare.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(summary)))
    results = [str(output / "answers" / file_name(row.name)) for row in budget.rows]
    results = [path for path in results if Path(path).is_file()]
    if results:
        cream_peft(["plot", *results, "--output", str(output / "compare.png")])
    print(f"{state}; the results are in {output / 'compare.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
