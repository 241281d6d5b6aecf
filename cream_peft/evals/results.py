"""The results JSON: what was measured on one model. Read, written, pooled and compared here, with its statistics."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..model.fields import known_fields
from ..model.secrets import without_secrets

FORMAT = 2
NEEDED = ("model", "adapter", "versions", "seed", "settings", "cells")
NEEDED_OF_CELL = ("task", "metric", "length", "depth", "value", "samples")
SIGNIFICANT = 0.05


def write_whole(path: Path, text: str) -> None:
    """Replace the file whole, so that a kill leaves the old one or the new one, never half of one."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


@dataclass(frozen=True)
class Cell:
    """One task at one length and depth."""

    task: str
    length: int
    """Tokens."""
    depth: float
    """Where the answer stands, in [0, 1]."""
    metric: str
    """accuracy (in [0, 1]) or perplexity (per token)."""
    value: float
    samples: int
    """Questions asked; of perplexity the tokens scored."""
    seconds: float = 0.0
    tokens: float | None = None
    """Mean length of the prompts, without the answers."""
    correct: str | None = None
    """0 or 1 for each sample."""
    answer_loss: list[float] | None = None
    """For each sample the loss of the right answer, in nats per token, in the likelier form of a right reply."""
    alone_loss: list[float] | None = None
    """The same where the reply is the answer alone, as a model that was trained so replies; of chat models only."""
    first_prompt: str | None = None
    """A digest of the tokens of the first prompt: it tells other tokenizers and other forms apart."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1 or self.depth > 1:
            raise ValueError(
                f"samples {self.samples} and length {self.length} must be at least 1, depth {self.depth:g} at most 1"
            )
        if self.correct is not None and (len(self.correct) != self.samples or self.correct.strip("01")):
            raise ValueError(f"correct must be {self.samples} times 0 or 1, as there are samples")


@dataclass(frozen=True)
class Settings:
    """How a model was loaded and asked. None where an earlier file does not say."""

    label: str | None = None
    load_in_4bit: bool | None = None
    dtype: str | None = None
    """Of what is not quantized, if it was set."""
    pretrained_window: int | None = None
    target_length: int | None = None
    rope_scaling_type: str | None = None
    adapter_sha256: str | None = None
    """None for a base."""
    base_sha256: str | None = None
    """Of some values of the weights of a base in a local folder, whose name may stand for another one tomorrow."""
    base_revision: str | None = None
    """The commit of a base on the Hub."""
    samples: int | None = None
    """At each length and depth."""
    machine: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> options of its own."""


@dataclass
class Results:
    """What was measured on one model: the content of a results file, format 2. Earlier ones are read too."""

    model: str
    """Hub id or folder name of the base."""
    adapter: str | None
    versions: dict[str, str]
    seed: int
    settings: Settings
    cells: list[Cell] = field(default_factory=list)
    format: int = FORMAT

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """One results file.

        Raises:
            ValueError: if it is not there, or no results file.
        """
        if not Path(path).is_file():
            raise ValueError(f"no such results file: {path}; `cream-peft evaluate` writes them")
        lost = f"{path} is not a results file of `cream-peft evaluate`, as they lie in its --output_dir"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if missing := [key for key in NEEDED if key not in content]:
                raise ValueError(f"{', '.join(missing)} missing")
            if missing := sorted({key for cell in content["cells"] for key in NEEDED_OF_CELL if key not in cell}):
                raise ValueError(f"cells without {', '.join(missing)}")
            return cls.parse(content)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{lost}: {error}") from None

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Results:
        """The object that `asdict` made JSON of."""
        head = known_fields(cls, content)
        if head.get("format", 1) > FORMAT:
            raise ValueError(f"it has format {head['format']}: upgrade cream-peft to read it")
        head["cells"] = [Cell(**known_fields(Cell, cell, f"cells[{n}].")) for n, cell in enumerate(head["cells"])]
        head["settings"] = Settings(**known_fields(Settings, head["settings"], "settings."))
        head["format"] = FORMAT
        return cls(**head)

    def asdict(self) -> dict[str, Any]:
        """The JSON object: without what a cell has not, without tokens and local paths."""
        cells = [{key: value for key, value in asdict(cell).items() if value is not None} for cell in self.cells]
        return without_secrets(asdict(replace(self, cells=[])) | {"cells": cells})

    def write(self, path: Path) -> None:
        """Write the file, whole."""
        write_whole(path, json.dumps(self.asdict(), indent=1) + "\n")

    def of_task(self, task: str) -> list[Cell]:
        """The cells of one task."""
        return [cell for cell in self.cells if cell.task == task]


Compared = Mapping[str, Results]
"""Label -> results, the first being what the others are compared with."""


def file_name(label: str) -> str:
    """The name of a label's results file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label) + ".json"


def mean_by(cells: Iterable[Cell], key: str) -> dict[Any, float]:
    """Mean over all samples pooled, for each value of `key` (length or depth)."""
    right: dict[Any, float] = defaultdict(float)
    asked: dict[Any, int] = defaultdict(int)
    for cell in cells:
        right[getattr(cell, key)] += cell.value * cell.samples
        asked[getattr(cell, key)] += cell.samples
    return {value: right[value] / asked[value] for value in sorted(asked)}


def tasks_in(results: Compared) -> list[str]:
    """The tasks that were measured, in alphabetical order."""
    return sorted({cell.task for result in results.values() for cell in result.cells})


def mean_loss(cells: Iterable[Cell]) -> float | None:
    """Of the right answers, in nats per token; None of cells that have none."""
    losses = [loss for cell in cells for loss in cell.answer_loss or ()]
    return mean(losses) if losses else None


def interval(cells: list[Cell]) -> tuple[float, float]:
    """Of the accuracy over all samples of the cells at 95 % (Wilson 1927), sound near 0 and 1 and for few."""
    # Half a second, which no other command needs.
    from scipy.stats import binomtest

    samples, right = sum(cell.samples for cell in cells), round(sum(cell.value * cell.samples for cell in cells))
    bounds = binomtest(right, samples).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def compare_cells(pairs: list[tuple[Cell, Cell]]) -> dict[str, Any] | None:
    """The second model's cells against the first's, on the documents that all of them have; None if there are none.

    Returns:
        what `paired_comparison` says of the answers; as `answer_loss`, if all cells have it, what `paired_means` says
        of the loss of the right answers, a document's being the mean over the cells that have it.
    """
    pairs = [pair for pair in pairs if all(cell.correct is not None for cell in pair)]
    if not pairs:
        return None
    # The first documents are the same however many there are.
    counts = [min(len(cell.correct or "") for cell in pair) for pair in pairs]
    sides = [list(zip(side, counts, strict=True)) for side in zip(*pairs, strict=True)]
    answers = ("".join((cell.correct or "")[:count] for cell, count in side) for side in sides)
    found: dict[str, Any] = dict(paired_comparison(*answers))
    # Of recall a depth has as many questions as fall there, and no losses.
    if all(cell.answer_loss is not None for pair in pairs for cell in pair):
        base, other = (
            [mean((cell.answer_loss or [])[n] for cell, count in side if n < count) for n in range(max(counts))]
            for side in sides
        )
        found["answer_loss"] = paired_means(base, other)
    return found


def places(first: Iterable[Cell], second: Iterable[Cell]) -> list[tuple[Cell, Cell]]:
    """Pairs of two models' cells of one task, those of one length and depth together."""
    at = {(cell.length, cell.depth): cell for cell in first}
    return [(at[cell.length, cell.depth], cell) for cell in second if (cell.length, cell.depth) in at]


def same_places(first: Iterable[Cell], second: Iterable[Cell], length: int) -> list[tuple[Cell, Cell]]:
    """Those of `places` at `length` where both models read the same."""
    return [pair for pair in places(first, second) if pair[0].length == length and not read_otherwise(*pair)]


def read_otherwise(first: Cell, second: Cell) -> bool:
    """Whether two models are known to have read other tokens, with another tokenizer or in another form."""
    return None not in (first.first_prompt, second.first_prompt) and first.first_prompt != second.first_prompt


def comparisons(results: Compared) -> list[dict[str, Any]]:
    """Every other model against the first one, task by task and length by length, on the same samples."""
    found: list[dict[str, Any]] = []
    first, *others = results
    for task in tasks_in(results):
        base = results[first].of_task(task)
        for other in others:
            cells = results[other].of_task(task)
            for length in sorted({cell.length for cell in cells}):
                test = compare_cells(same_places(base, cells, length))
                if test:
                    where = {"task": task, "length": length, "model": other, "against": first}
                    found.append(where | test | {"noise": test["p_value"] >= SIGNIFICANT})
    return found


def effective_lengths(results: Compared, threshold: float) -> list[dict[str, Any]]:
    """Up to which length (tokens) each model stays at `threshold`, beside the length it was extended to."""
    found = []
    for task in tasks_in(results):
        for label, result in results.items():
            cells, settings = result.of_task(task), result.settings
            if cells and cells[0].metric == "accuracy":
                claimed = settings.target_length
                if not settings.rope_scaling_type and not settings.adapter_sha256:
                    # A base as it is claims its window.
                    claimed = settings.pretrained_window or claimed
                reached = effective_length(mean_by(cells, "length"), threshold)
                where = {"task": task, "model": label, "threshold": threshold}
                found.append(where | {"effective_length": reached, "target_length": claimed})
    return found


def paired_comparison(first: Sequence[int] | str, second: Sequence[int] | str) -> dict[str, float]:
    """Two models on the same samples, each 0 or 1 (or a text of these): McNemar's exact test, two-sided.

    Returns:
        questions, how many samples; only_first and only_second, those that one model alone has right; difference, the
        second's accuracy less the first's; p_value, how often two equally good models would differ at least so much.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same samples twice, not {len(first)} and {len(second)}")
    pairs = [(int(one), int(other)) for one, other in zip(first, second, strict=True)]
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    return {
        "questions": len(pairs),
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(pairs),
        "p_value": float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0,
    }


def paired_means(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Two models' losses on the same documents, a number a document: Student's paired t-test, two-sided.

    Returns:
        difference, the mean of the second's less the first's; interval, its bounds at 95 %; p_value; documents, how
        many. One document has no interval and no p_value: None.
    """
    from scipy.stats import ttest_rel

    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same documents twice, not {len(first)} and {len(second)}")
    difference = sum(second) / len(second) - sum(first) / len(first)
    found = {"difference": difference, "documents": len(first), "interval": None, "p_value": None}
    if len(first) > 1 and list(first) != list(second):
        with warnings.catch_warnings():
            # Of differences that are nearly the same, which is no fault.
            warnings.simplefilter("ignore", RuntimeWarning)
            test = ttest_rel(second, first)
        bounds = tuple(map(float, test.confidence_interval(0.95)))
        found |= {"interval": bounds, "p_value": float(test.pvalue)}
    return found


def effective_length(accuracy: Mapping[int, float], threshold: float) -> int:
    """The longest length (tokens) up to which no measured accuracy falls below `threshold`; 0 if the first one does.

    What a model claims and what it keeps are told apart so by RULER (arXiv 2404.06654), at 0.856.
    """
    effective = 0
    for length in sorted(accuracy):
        if accuracy[length] < threshold:
            break
        effective = length
    return effective
