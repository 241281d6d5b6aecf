"""A skill taught to SmolLM2-135M-Instruct on 1,000 tokens, asked in documents of up to 32,768.

    python recipes/smollm2-135m-instruct/compare.py --first       # what says most: three models, up to 16K
    python recipes/smollm2-135m-instruct/compare.py --minutes 90  # go on with the rest, again until it says done

Compares position strategies under RoPE scalings, with cream-peft's own commands. The work is cut into pieces, a line of
pieces.jsonl each: what is there is not done again, in results/skill beside this file (committed) or in --output. An
adapter is trained when a piece needs it. Writes skill.json, pictures and the table. With --only several processes share
the work.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from cream_peft.evals.plots import save, tasks_figure
from cream_peft.evals.results import (
    Cell,
    Results,
    Settings,
    compare_cells,
    file_name,
    interval,
    mean_loss,
    paired_means,
)
from cream_peft.evals.table import difference_in_words
from cream_peft.model.record import adapter_sha256, machine, versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from pieces import read_lines, with_tables  # noqa: E402

HOME = Path("runs/smollm2-135m-instruct")
RECIPE, RESULTS = HERE / "cream-8k-32k-qlora.yaml", HERE / "results/skill"
BASE, DATA = HOME / "base", HOME / "data"
TEST, OTHER = DATA / "held-out/paradise-lost.txt", DATA / "held-out/areopagitica.txt"
EIGHTHS = [(place + 0.5) / 8 for place in range(8)]
MIDDLE, LAST = (0.3, 0.7), (0.9, 1.0)
CONTEXT = 1024
"""Tokens fed, as the recipe says."""
PATIENCE = 20
"""Seconds that an interrupted command has to end."""
SEED = 2026
"""Of the first documents; a later block has the next one."""
UNLESS_NAMED: dict[str, Any] = {"max_steps": 64, "sigma": None, "save_steps": 8, "eval_steps": 8}
"""What a row has unless its name says otherwise. The recipe has the settings of cream+256 steps, which served best."""
ON_A_CPU = {
    "load_in_4bit": False, "gradient_checkpointing": False, "optim": "adamw_torch",
    "eval_strategy": "no", "load_best_model_at_end": False,
}  # fmt: skip


MORE = {
    "distillation": {"distillation_weight": 1.0},
    "contiguous": {"contiguous_share": 0.5},
    "growth": {"target_growth": 0.5},
    "128 steps": {"max_steps": 128},
    "256 steps": {"max_steps": 256},
    "default sigma": {"sigma": None},
}
"""What may keep what long positions cost: what the base computes, or the skill at the length that it is taught at. And
the package's own law, truncated, in place of the authors'."""


@dataclass(frozen=True)
class Row:
    """One model: a RoPE scaling (none: as it is) and a strategy (untuned: nothing is trained), perhaps with some of
    MORE, as in cream+128 steps+default sigma."""

    scaling: str
    strategy: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.scaling} {self.strategy}" + (f" seed {self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Budget:
    """What is trained and asked, in which order."""

    target_length: int
    train: dict[str, Any]
    """Settings of all rows that differ from the recipe's."""
    flags: tuple[str, ...]
    """Of evaluate."""
    documents: dict[int, int]
    """Length in tokens -> documents of a block, each asked at eight depths."""
    rounds: list[tuple[list[Row], list[int | str], int]]
    """Rows, lengths (or names of PRICE), block of documents; what says most comes first."""


def rows(scaling: str, *strategies: str, seed: int = 0) -> list[Row]:
    return [Row(scaling, strategy, seed) for strategy in strategies]


TRAINED = ("contiguous", "cream", "pose")
YARN, NTK, INSIDE = (rows(scaling, "untuned", *TRAINED) for scaling in ("yarn", "ntk", "none"))
DISTILLED = rows("yarn", "cream+distillation")
MORE_STEPS = ("cream+128 steps", "contiguous+128 steps", "pose+128 steps")
LONGER = rows("yarn", *MORE_STEPS)
MORE_INSIDE = rows("none", "cream+contiguous", "cream+growth", *MORE_STEPS)
SEEDS = [row for seed in (1, 2) for row in rows("yarn", *TRAINED, seed=seed)]
LONGER_AGAIN = [row for seed in (1, 2) for row in rows("yarn", *MORE_STEPS, seed=seed)]
LONGEST = rows("yarn", "cream+256 steps", "contiguous+256 steps", "pose+256 steps")
LONGEST_AGAIN = [Row("yarn", row.strategy, seed) for seed in (1, 2, 3) for row in LONGEST]
OWN_LAW = [row for seed in (0, 1, 2) for row in rows("yarn", "cream+128 steps+default sigma", seed=seed)]
INSIDE_AGAIN = rows("none", *TRAINED, seed=1)
SEEDS_AT = (8192, 16_384, 32_768)
"""Tokens at which the rows of several seeds are told apart."""
ONE_TEXT = ("perplexity", "--samples", "1", "--text")
PRICE = {
    "perplexity": [*ONE_TEXT, str(OTHER), "--lengths", "1024", "8192", "--max_tokens", "16384"],
    "chats": [*ONE_TEXT, str(DATA / "held-out/chats.txt"), "--lengths", "1024", "--max_tokens", "16384"],
    "passkey": ["passkey", "--lengths", "1024", "--samples", "4", "--depths", "0.1", "0.3", "0.5", "0.7", "0.9"],
}
"""What the model did before, on texts that are neither plays nor questions."""
# The effect shows from 8,192 tokens on, where a piece takes minutes.
FIRST = [(YARN[:3], [8192], 0), (YARN[:3], [1024, 4096, 16_384], 0)]
ROUNDS = [
    *FIRST,
    (YARN[3:], [1024, 4096, 8192, 16_384], 0),
    (YARN, list(PRICE), 0),
    (DISTILLED, ["chats", 4096, 1024, 16_384], 0),
    (LONGER, [16_384, 8192, 1024, 4096, 32_768], 0),
    (LONGEST, [8192, 1024, 16_384, 4096], 0),
    (LONGEST, [8192, 4096, 1024], 1),
    (LONGEST_AGAIN, [8192], 0),
    (LONGEST_AGAIN, [8192, 1024, 4096], 1),
    (LONGEST_AGAIN, [1024, 4096], 0),
    *((LONGEST_AGAIN[3:] + LONGEST + LONGEST_AGAIN[:3], [16_384, 32_768], block) for block in (0, 1, 2)),
    (LONGER, [1024, 4096], 1),
    (LONGER_AGAIN, [8192, 16_384, 1024, 4096], 0),
    (OWN_LAW, [8192, 16_384, 1024, 4096], 0),
    (INSIDE + MORE_INSIDE, [1024, 4096, 8192], 0),
    *((YARN, [1024, 4096, 16_384], block) for block in (1, 2)),
    (NTK, [1024, 4096, 16_384], 0),
    *((YARN, [32_768], block) for block in (0, 1, 2)),
    *((INSIDE + MORE_INSIDE, [1024, 4096, 8192], block) for block in (1, 2)),
    (INSIDE_AGAIN, [1024, 4096, 8192], 0),
    *((SEEDS, [1024, 4096, 8192, 16_384], block) for block in (0, 1, 2)),
    (LONGEST_AGAIN[3:6] + LONGER + INSIDE + MORE_INSIDE, list(PRICE), 0),
    (NTK, [8192, 32_768], 0),
]
BUDGETS = {
    "cpu": Budget(32_768, ON_A_CPU, ("--no_4bit",), {1024: 4, 4096: 4, 8192: 4, 16_384: 4, 32_768: 2}, ROUNDS),
    "gpu": Budget(
        65_536, {}, (), dict.fromkeys((1024, 4096, 8192, 16_384, 32_768, 65_536), 25),
        [*FIRST, *((some, [1024, 4096, 16_384, 65_536, 8192, 32_768, *PRICE], 0)
         for some in (YARN + DISTILLED + LONGER + LONGEST, INSIDE + MORE_INSIDE, NTK, SEEDS, LONGER_AGAIN,
         LONGEST_AGAIN + OWN_LAW, INSIDE_AGAIN))],
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


def target_of(row: Row, budget: Budget) -> int:
    """Tokens: inside the window where RoPE is not scaled."""
    return 8192 if row.scaling == "none" else budget.target_length


def training(row: Row, budget: Budget) -> dict[str, Any]:
    """The settings of a row's training that are neither the recipe's nor UNLESS_NAMED."""
    strategy, *more = row.strategy.split("+")
    # 3 at a factor of 8, as published.
    law: dict[str, Any] = {"sigma": 3 / 8 * target_of(row, budget) / CONTEXT} if strategy == "cream" else {}
    for name in more:
        law |= MORE[name]
    law = {key: value for key, value in law.items() if value is not None}
    inside = {"eval_length": target_of(row, budget)} if row.scaling == "none" else {}
    return law | inside | {
        "model_name_or_path": str(BASE), "base_model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "target_length": target_of(row, budget), "position_strategy": strategy, "rope_scaling_type": row.scaling,
        "seed": row.seed, **budget.train,
    }  # fmt: skip


@cache
def quicker_dtype() -> str:
    """What this CPU trains and asks in: bfloat16 where it multiplies that faster, which takes AVX-512 or AMX; elsewhere
    it takes eight times as long as float32."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))

    return min(("bfloat16", "float32"), key=lambda name: seconds(getattr(torch, name)))


def adapter_of(row: Row, output: Path) -> Path:
    return output / "adapters" / row.name.replace(" ", "-")


def trained(row: Row, budget: Budget, output: Path, deadline: float) -> Path:
    """The adapter of `row`, trained unless it is there.

    Raises:
        Failed: if one is there that was trained with other settings.
    """
    folder, settings = adapter_of(row, output), training(row, budget)
    summary, asked = (folder.with_name(f"{folder.name}{end}.json") for end in ("", "-settings"))
    earlier = json.loads(asked.read_text(encoding="utf-8")) if asked.is_file() else {}
    if not torch.cuda.is_available():
        settings["dtype"] = earlier.get("dtype") or quicker_dtype()
    if earlier and earlier != settings:
        print(f"error: {folder} was trained with other settings: choose another --output", file=sys.stderr)
        raise Failed
    if summary.is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    words = [word for key, value in (UNLESS_NAMED | settings).items() for word in (f"--{key}", str(value))]
    if list(folder.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "true"]
    command = ["train", "--config", str(RECIPE), *words, "--output_dir", str(folder), "--json", str(summary)]
    call(command, deadline, output / "log")
    return folder


def questions(budget: Budget, what: int | str, block: int) -> list[str]:
    """The words of `evaluate` for a length in tokens, or for one of PRICE."""
    if isinstance(what, str):
        return [*PRICE[what], "--seed", str(SEED)]
    depths, documents = map(str, EIGHTHS), str(budget.documents[what])
    task = ["multikey_needle", "--haystack", str(TEST), "--lengths", str(what), "--depths", *depths]
    return [*task, "--samples", documents, "--seed", str(SEED + block)]


def identity(row: Row, budget: Budget, output: Path, what: int | str, block: int) -> dict[str, Any]:
    """What a piece is: lines with the same one are not done again, unless another adapter was trained here since."""
    settings = {} if row.strategy == "untuned" else training(row, budget)
    adapter = adapter_sha256(adapter_of(row, output))
    return {
        "row": asdict(row), "what": what, "block": block, "questions": questions(budget, what, block),
        "target_length": target_of(row, budget), "training": settings, "flags": list(budget.flags),
    } | ({"adapter": adapter} if adapter else {})  # fmt: skip


def measure(row: Row, budget: Budget, output: Path, deadline: float, what: int | str, block: int) -> dict[str, Any]:
    """One piece: the row, trained if need be, asked."""
    summary, dtype = None, None
    if row.strategy == "untuned":
        model = str(BASE) if row.scaling == "none" else f"{BASE}+{row.scaling}"
    else:
        model = str(trained(row, budget, output, deadline))
        summary = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
        dtype = json.loads(Path(f"{model}-settings.json").read_text(encoding="utf-8")).get("dtype")
    folder, start = output / "measured" / f"{what}-{block}", time.monotonic()
    command = ["evaluate", "--compare", f"{row.name}={model}", "--target_length", str(target_of(row, budget))]
    asked_in = None if torch.cuda.is_available() else quicker_dtype()
    command += ["--dtype", asked_in] if asked_in else []
    command += [*budget.flags, "--base_model", str(BASE), "--output_dir", str(folder), "--tasks"]
    call([*command, *questions(budget, what, block)], deadline, output / "log")
    found = Results.read(folder / file_name(row.name)).asdict()
    told = {"seconds": round(time.monotonic() - start), "machine": machine(), "versions": versions(), "dtype": dtype}
    told |= {"asked in": asked_in, "trained": summary, "cells": found["cells"]}
    return identity(row, budget, output, what, block) | told


def unique(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of each row, question and block, in the order of the first ones; of a row those of its last adapter.

    The same command trains another adapter on another machine, or with other threads.
    """
    adapters = {json.dumps(piece["row"]): piece.get("adapter") for piece in pieces}
    pieces = [piece for piece in pieces if piece.get("adapter") == adapters[json.dumps(piece["row"])]]
    return list({json.dumps([piece["row"], piece["what"], piece["block"]]): piece for piece in pieces}.values())


def planned(budget: Budget, first: bool, only: list[str] | None) -> Iterator[tuple[Row, int | str, int]]:
    """The pieces, in order, each once."""
    rounds = budget.rounds[: len(FIRST) if first else None]
    yield from dict.fromkeys(
        (row, what, block)
        for some, things, block in rounds
        for row in some
        for what in things
        if only is None or row.name in only
    )


def pooled(pieces: list[dict[str, Any]]) -> list[Cell]:
    """One row's cells at one length, the documents of all blocks together in the order of the blocks."""
    found: dict[Any, Cell] = {}
    for piece in sorted(pieces, key=lambda piece: piece["block"]):
        for cell in (Cell(**cell) for cell in piece["cells"]):
            old = found.get((cell.length, cell.depth))
            found[cell.length, cell.depth] = replace(
                cell,
                value=(old.value * old.samples + cell.value * cell.samples) / (old.samples + cell.samples),
                samples=old.samples + cell.samples,
                correct=f"{old.correct}{cell.correct}",
                answer_loss=[*(old.answer_loss or ()), *(cell.answer_loss or ())],
            ) if old else cell  # fmt: skip
    return list(found.values())


def by_row(pieces: list[dict[str, Any]], what: int | str) -> dict[Row, dict[int, dict[str, Any]]]:
    """Row -> block of documents -> its piece of `what`."""
    found: dict[Row, dict[int, dict[str, Any]]] = defaultdict(dict)
    for piece in pieces:
        if piece["what"] == what:
            found[Row(**piece["row"])][piece["block"]] = piece
    return found


def alone(piece: dict[str, Any]) -> dict[str, Any] | None:
    """The piece with the loss of the number alone in place of the likelier form's; None if it was not recorded."""
    if not all("alone_loss" in cell for cell in piece["cells"]):
        return None
    return piece | {"cells": [cell | {"answer_loss": cell["alone_loss"]} for cell in piece["cells"]]}


def between(cells: list[Cell], low: float, high: float) -> list[Cell]:
    return [cell for cell in cells if low <= cell.depth <= high]


PLACES = {"all depths": (0.0, 1.0), "middle": MIDDLE, "last eighth": LAST}


def told(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """What one model's answers at one length come to."""
    cells, alone_cells = pooled(pieces), pooled([found for one in pieces if (found := alone(one))])
    asked = sum(cell.samples for cell in cells)
    found = {"accuracy": sum(cell.value * cell.samples for cell in cells) / asked, "questions": asked}
    found |= {"interval": interval(cells), "answer loss": mean_loss(cells)}
    found["loss of the number alone"] = mean_loss(alone_cells)
    found["of documents"] = sum(cell.samples for cell in alone_cells) // len(EIGHTHS)
    found["middle"] = mean_loss(between(cells, *MIDDLE))
    return found | {"loss by depth": {str(cell.depth): mean_loss([cell]) for cell in cells}}


def paired(blocks: list[Any], bounds: tuple[float, float]) -> list[tuple[Cell, ...]]:
    """Their cells and ours, of depths within bounds, from (our piece, their piece) for each block."""
    ours, theirs = ([pair[side] for pair in blocks] for side in (0, 1))
    return list(zip(*(between(pooled(pieces), *bounds) for pieces in (theirs, ours)), strict=True))


def against(strategy: str) -> str:
    """CREAM's strategy that another one is compared with: CREAM with as many steps, or without the last of MORE."""
    name, *more = strategy.split("+")
    return "+".join(["cream", *(more[:-1] if name == "cream" else more)])


def differences(pieces: list[dict[str, Any]], length: int) -> Iterator[dict[str, Any]]:
    """CREAM against the other rows of a scaling, on the seeds and blocks of documents that both have."""
    found = by_row(pieces, length)
    for other in dict.fromkeys((row.scaling, row.strategy) for row in found if row.strategy != "cream"):
        wanted = (other[0], against(other[1]))
        # The untuned base has no seeds: it stands against each of CREAM's.
        partners = [
            (ours, row) for row in found for ours in found
            if (row.scaling, row.strategy) == other and (ours.scaling, ours.strategy) == wanted
            and (ours.seed == row.seed or row.strategy == "untuned")
        ]  # fmt: skip
        for place, bounds in PLACES.items():
            pairs, pairs_alone = [], []
            for ours, row in partners:
                blocks = sorted(found[ours].keys() & found[row].keys())
                both = [(found[ours][block], found[row][block]) for block in blocks]
                pairs += paired(both, bounds)
                pairs_alone += paired([known for one in both if all(known := [*map(alone, one)])], bounds)
            if result := compare_cells(pairs):
                where = {"scaling": other[0], "against": other[1], "length": length, "depths": place}
                of_alone = (compare_cells(pairs_alone) or {}).get("answer_loss")
                yield where | {"seeds": sorted(ours.seed for ours, _ in partners)} | result | {"alone_loss": of_alone}


def over_seeds(rows: list[dict[str, Any]], other: tuple[str, str], length: int) -> dict[str, Any] | None:
    """CREAM less another scaling and strategy, with seeds as the unit: those of both, asked as much; None below two."""
    scaling, strategy = other
    ours, theirs = (
        {row["seed"]: row[str(length)] for row in rows
         if (row["scaling"], row["strategy"]) == (scaling, name) and str(length) in row}
        for name in (against(strategy), strategy)
    )  # fmt: skip
    seeds = [seed for seed in ours if seed in theirs and ours[seed]["questions"] == theirs[seed]["questions"]]
    if len(seeds) < 3:
        return None
    found = {"scaling": scaling, "against": strategy, "length": length, "seeds": seeds}
    for key in ("accuracy", "loss of the number alone"):
        values = [[side[seed][key] for seed in seeds] for side in (theirs, ours)]
        if None not in values[0] + values[1]:
            test = paired_means(*values)
            found[key] = {name: test[name] for name in ("difference", "interval", "p_value")}
    return found


def summarise(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """A row a model with what was measured of it, and CREAM against the others on the same questions."""
    lines: dict[Row, dict[str, Any]] = defaultdict(dict)
    compared = []
    things = dict.fromkeys(piece["what"] for piece in pieces)
    for what in sorted(things, key=lambda what: what if isinstance(what, int) else float("inf")):
        for row, blocks in by_row(pieces, what).items():
            if isinstance(what, int) or what == "passkey":
                lines[row][str(what)] = told(list(blocks.values()))
            else:
                lines[row][str(what)] = {str(cell.length): cell.value for cell in pooled(list(blocks.values()))}
        if isinstance(what, int):
            compared += differences(pieces, what)
    order = [row for some, _, _ in BUDGETS["cpu"].rounds for row in some]
    rows = [asdict(row) | {"name": row.name} | lines[row] for row in sorted(lines, key=order.index)]
    for row in rows:
        summaries = [
            piece["trained"] for piece in pieces if Row(**piece["row"]).name == row["name"] and piece["trained"]
        ]
        row["training"] = summaries[-1] if summaries else None
    others = dict.fromkeys((one["scaling"], one["against"], one["length"]) for one in compared)
    seeds = [found for *other, length in others if (found := over_seeds(rows, (other[0], other[1]), length))]
    found = {"command": "make smollm2", "recipe": RECIPE.name, "rows": rows}
    return found | {"cream minus": compared, "cream minus, over seeds": seeds}


def lengths_of(summary: dict[str, Any]) -> list[int]:
    return sorted({int(key) for row in summary["rows"] for key in row if key.isdecimal()})


def losses_of(measured: dict[str, Any], *names: str) -> str:
    """The mean losses of the right number; a dash where none was recorded."""
    return " / ".join("-" if (loss := measured[name]) is None else f"{loss:.2f}" for name in names)


def shown(measured: dict[str, Any] | None) -> str:
    """A cell of the table: accuracy, questions, losses of the right number; empty of what was not run."""
    if measured is None:
        return ""
    told = losses_of(measured, "loss of the number alone", "answer loss")
    return f"{measured['accuracy']:.2f} of {measured['questions']}, {told}"


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown: a row a model, a column a length: accuracy, questions, losses of the right number."""
    lengths = lengths_of(summary)
    lines = [f"| RoPE scaling, positions | {' | '.join(f'{length:,}' for length in lengths)} |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for row in summary["rows"]:
        columns = [shown(row.get(str(length))) for length in lengths]
        if any(columns):
            lines.append(f"| {row['name']} | {' | '.join(columns)} |")
    return lines


LABELS = ("untouched base", "RoPE scaling alone", "plain fine-tune", "CREAM", "PoSE")
"""Models in pictures and short tables, in the order of their colours."""
SHOWN = {"yarn": ("YaRN", 256), "none": ("no scaling", 128)}
"""RoPE scaling -> what it is called, and after how many steps it is shown first."""


def named(scaling: str, steps: int) -> dict[str, str]:
    """Strategy after so many steps, and untuned -> one of LABELS."""
    more = "" if steps == UNLESS_NAMED["max_steps"] else f"+{steps} steps"
    untuned = LABELS[0] if scaling == "none" else LABELS[1]
    return {"untuned": untuned} | {f"{name}{more}": label for name, label in zip(TRAINED, LABELS[2:], strict=True)}


def brief(measured: dict[str, Any] | None) -> str:
    """A cell: accuracy, and the loss of the number alone; empty of what was not run."""
    return f"{measured['accuracy']:.2f} ({losses_of(measured, 'loss of the number alone')})" if measured else ""


def together(rows: list[dict[str, Any]], length: int) -> str:
    """A cell of all questions of a row's seeds, and of how many seeds they are; empty of what was not run."""
    asked = [row[str(length)] for row in rows if str(length) in row]
    if not asked:
        return ""
    found = {}
    for key in ("accuracy", "loss of the number alone"):
        # Earlier pieces have no such loss.
        told = [one for one in asked if one[key] is not None]
        count = sum(one["questions"] for one in told)
        found[key] = sum(one[key] * one["questions"] for one in told) / count if told else None
    return brief(found) + (f", {len(asked)} seeds" if len(asked) > 1 else "")


def short_table(summary: dict[str, Any]) -> list[str]:
    """Markdown: what is shown first, beyond the window and within it, the seeds together."""
    rows, found = defaultdict(list), {}
    for row in summary["rows"]:
        rows[row["scaling"], row["strategy"]].append(row)
    lengths = lengths_of(summary)
    for scaling, (where, steps) in SHOWN.items():
        for strategy, name in named(scaling, steps).items():
            title = f"{where}: {name}" + ("" if strategy == "untuned" else f", {steps} steps")
            found[title] = [together(rows[scaling, strategy], length) for length in lengths]
    shown = [place for place in range(len(lengths)) if any(cells[place] for cells in found.values())]
    lines = [f"| | {' | '.join(f'{lengths[place]:,}' for place in shown)} |", "|---" * (len(shown) + 1) + "|"]
    return lines + [
        f"| {title} | {' | '.join(cells[place] for place in shown)} |" for title, cells in found.items() if any(cells)
    ]


def seeds_table(summary: dict[str, Any]) -> list[str]:
    """Markdown: the seeds of the rows after 128 and 256 steps under YaRN, in their order; a dash is one not run."""
    found = {(row["strategy"], row["seed"]): row for row in summary["rows"] if row["scaling"] == "yarn"}
    names = {key: f"{name}, {steps} steps" for steps in (128, 256) for key, name in named("yarn", steps).items()}
    names |= {OWN_LAW[0].strategy: "CREAM, truncated, 128 steps"}
    lines = [f"| | {' | '.join(f'{length:,}' for length in SEEDS_AT)} |", "|---" * (len(SEEDS_AT) + 1) + "|"]
    seeds = range(max((seed for _, seed in found), default=0) + 1)
    for strategy, name in names.items():
        if strategy != "untuned" and any((strategy, seed) in found for seed in seeds):
            told = [
                ", ".join(brief(found.get((strategy, seed), {}).get(str(length))) or "-" for seed in seeds)
                for length in SEEDS_AT
            ]
            lines.append(f"| {name} | {' | '.join(cell.rstrip(', -') for cell in told)} |")
    return lines


def in_words(loss: dict[str, Any] | None) -> str:
    """A difference of losses, its interval over documents, and how many these are."""
    return f"{difference_in_words(loss)}, {loss['documents']}" if loss else ""


def differences_table(summary: dict[str, Any]) -> list[str]:
    """Markdown: CREAM against each other row at each length: accuracy and losses on the same questions."""
    lines = ["| CREAM minus | tokens | accuracy | p | number alone | likelier form |", "|---" * 6 + "|"]
    # A pair's lengths, which are in order, together.
    for one in sorted(summary["cream minus"], key=itemgetter("scaling", "against")):
        if one["depths"] == "all depths":
            losses = " | ".join(in_words(one[key]) for key in ("alone_loss", "answer_loss"))
            lines.append(
                f"| {one['scaling']} {one['against']} | {one['length']:,} | {one['difference']:+.2f} | "
                f"{one['p_value']:.3f} | {losses} |"
            )
    return lines


def price_table(summary: dict[str, Any]) -> list[str]:
    """Markdown: perplexity of prose and of chats, and passkeys found, for the rows that were asked."""
    lines = [
        "| RoPE scaling, positions | prose, 1,024 | prose, 8,192 | chats, 1,024 | passkey, 1,024 |",
        "|---" * 5 + "|",
    ]
    for row in summary["rows"]:
        values = [row.get("perplexity", {}).get(length) for length in ("1024", "8192")]
        values += [row.get("chats", {}).get("1024"), row.get("passkey", {}).get("accuracy")]
        if any(values):
            lines.append(
                f"| {row['name']} | {' | '.join('' if value is None else f'{value:.2f}' for value in values)} |"
            )
    return lines


def results_of(pieces: list[dict[str, Any]], scaling: str) -> list[Results]:
    """What is shown first under a RoPE scaling, the seeds together, as `cream-peft plot` draws it; after fewer steps
    where that was not run."""
    where, steps = SHOWN[scaling]
    mine = [piece for piece in pieces if isinstance(piece["what"], int) and piece["row"]["scaling"] == scaling]
    if not any(piece["row"]["strategy"] in named(scaling, steps) for piece in mine if piece["trained"]):
        steps = UNLESS_NAMED["max_steps"]
    asked: dict[str, dict[int, list[dict[str, Any]]]] = {name: defaultdict(list) for name in named(scaling, steps)}
    for piece in mine:
        if piece["row"]["strategy"] in asked:
            asked[piece["row"]["strategy"]][piece["what"]].append(piece)
    counts = {
        len({piece["row"]["seed"] for piece in there})
        for name, at in asked.items() if name != "untuned" for there in at.values()
    }  # fmt: skip
    seeds = f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seeds" if counts - {1} else "one seed"
    model, found = f"SmolLM2, {where}, {steps} steps, {seeds}", []
    for strategy, label in named(scaling, steps).items():
        if at := asked[strategy]:
            cells = [cell for what in sorted(at) for cell in pooled(at[what])]
            settings = Settings(label=label, pretrained_window=8192)
            found.append(Results(model, None, {}, SEED, settings, cells))
    return found


def draw(results: list[Results], title: str, path: Path) -> None:
    """A panel for each model and task, if there is one."""
    if results:
        save(tasks_figure(sorted(results, key=lambda one: LABELS.index(one.settings.label or "")), title), path)


def draw_skill(pieces: list[dict[str, Any]], folder: Path) -> None:
    """The picture of the page: skill.png, a panel for each RoPE scaling."""
    results = [one for scaling in SHOWN for one in results_of(pieces, scaling)]
    draw(results, "A number asked for, taught on 1,000 tokens", folder / "skill.png")


def publish(pieces: list[dict[str, Any]]) -> None:
    """Write the pieces, the summary and the pictures into results/skill, and the tables into the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "pieces.jsonl").write_text("".join(json.dumps(piece) + "\n" for piece in pieces), encoding="utf-8")
    summary = summarise(pieces)
    (RESULTS / "skill.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_skill(pieces, RESULTS)
    tiny = json.loads((HERE.parent / "cream-peft-tiny/results/demo.json").read_text(encoding="utf-8"))["results"]
    front = [*map(Results.parse, tiny.values()), *results_of(pieces, "yarn")]
    title = "A skill taught on short examples (left 256 tokens, right 1,000), asked in longer documents"
    draw(front, title, RESULTS / "front.png")
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    tables = {
        "short": short_table(summary),
        "seeds": seeds_table(summary),
        "skill": table(summary),
        "differences": differences_table(summary),
        "price": price_table(summary),
    }
    page.write_text(with_tables(text, tables), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--budget", choices=BUDGETS, default=here, help=f"default: {here}, as this machine")
    parser.add_argument("--output", type=Path, help=f"default: {HOME}/skill-BUDGET")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, to resume later")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, such as 'yarn cream'")
    parser.add_argument(
        "--first", action="store_true", help="what says most: three models under YaRN, up to 16,384 tokens"
    )
    parser.add_argument("--again", action="store_true", help="do not count what is committed as done")
    parser.add_argument("--publish", action="store_true", help="write what is done into results/ and into the page")
    options = parser.parse_args()
    budget, output = BUDGETS[options.budget], options.output or HOME / f"skill-{options.budget}"
    if not (BASE / "model.safetensors").is_file() or not (DATA / "skill-validation.jsonl").is_file():
        print(f"error: {HOME} has no model and data: run {HERE / 'prepare.py'} first", file=sys.stderr)
        return 2
    names = dict.fromkeys(row.name for some, _, _ in budget.rounds for row in some)
    if not set(options.only or ()) <= set(names):
        print(f"error: --budget {options.budget} has the rows {', '.join(names)}", file=sys.stderr)
        return 2
    deadline, failed = time.monotonic() + 60 * options.minutes, []
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / "pieces.jsonl"] + ([] if options.again else [RESULTS / "pieces.jsonl"])
    try:
        for row, what, block in () if options.publish else planned(budget, options.first, options.only):
            wanted = identity(row, budget, output, what, block)
            if row.name in failed or any(wanted.items() <= piece.items() for piece in read_lines(*paths)):
                continue
            try:
                piece = measure(row, budget, output, deadline, what, block)
            except Failed:
                failed.append(row.name)
                continue
            with paths[0].open("a", encoding="utf-8") as file:
                file.write(json.dumps(piece) + "\n")
            print(f"{row.name}, {what}, block {block}: {piece['seconds']} s", flush=True)
        state = f"not done, these rows failed: {', '.join(failed)}" if failed else "done"
    except TimeIsUp:
        state = "not done: the same command resumes"
    pieces = unique(read_lines(*reversed(paths)))
    if pieces:
        summary = summarise(pieces)
        (output / "skill.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        draw_skill(pieces, output)
        print("\n".join([*table(summary), "", *differences_table(summary)]))
    if options.publish:
        publish(pieces)
    print(f"{state}; the results are in {output / 'skill.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
