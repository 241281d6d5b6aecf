"""Results in lines for the terminal: accuracy with its interval, by length and depth, and what is noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from .runner import mean_by
from .statistics import effective_length, paired_comparison, paired_means, wilson_interval

SIGNIFICANT = 0.05
PAPER = Path(__file__).parent / "paper.json"

Results = dict[str, dict[str, Any]]


def of_task(results: Results, task: str) -> dict[str, list[dict[str, Any]]]:
    """Label -> its cells of one task."""
    return {label: [cell for cell in result["cells"] if cell["task"] == task] for label, result in results.items()}


def tasks_in(results: Results) -> list[str]:
    """The tasks that were measured, in alphabetical order."""
    return sorted({cell["task"] for result in results.values() for cell in result["cells"]})


def mean_loss(cells: list[dict[str, Any]]) -> float | None:
    """Of the right answers, in nats per token; None of cells that have none."""
    losses = [loss for cell in cells for loss in cell.get("answer_loss", ())]
    return mean(losses) if losses else None


def _interval(cells: list[dict[str, Any]]) -> tuple[float, float]:
    samples = sum(cell["samples"] for cell in cells)
    return wilson_interval(round(sum(cell["value"] * cell["samples"] for cell in cells)), samples)


def compare_cells(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any] | None:
    """The second model's cells against the first's, on the documents that all of them have; None if there are none.

    Returns:
        what `paired_comparison` says of the answers; as `answer_loss`, if all cells have it, what `paired_means` says
        of the loss of the right answers, a document's being the mean over its cells.
    """
    pairs = [pair for pair in pairs if all("correct" in cell for cell in pair)]
    if not pairs:
        return None
    # The first documents are the same however many there are.
    documents = min(len(cell["correct"]) for pair in pairs for cell in pair)
    sides = list(zip(*pairs, strict=True))
    found = paired_comparison(*("".join(cell["correct"][:documents] for cell in side) for side in sides))
    if all("answer_loss" in cell for side in sides for cell in side):
        losses = [[mean(cell["answer_loss"][n] for cell in side) for n in range(documents)] for side in sides]
        found["answer_loss"] = paired_means(*losses)
    return found


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every other model against the first one, task by task and length by length, on the same samples."""
    found: list[dict[str, Any]] = []
    first, *others = results
    for task in tasks_in(results):
        cells = of_task(results, task)
        for other in others:
            for length in sorted({cell["length"] for cell in cells[other]}):
                test = compare_cells([
                    (mine, theirs) for mine in cells[first] for theirs in cells[other]
                    if mine["length"] == theirs["length"] == length and mine["depth"] == theirs["depth"]
                ])  # fmt: skip
                if test:
                    where = {"task": task, "length": length, "model": other, "against": first}
                    found.append(where | test | {"noise": test["p_value"] >= SIGNIFICANT})
    return found


def difference_in_words(loss: dict[str, Any]) -> str:
    """What `paired_means` found: the difference and, of more than one document, its interval."""
    bounds = "" if loss["interval"] is None else " ({:+.2f} to {:+.2f})".format(*loss["interval"])
    return f"{loss['difference']:+.2f}{bounds}"


def effective_lengths(results: Results, threshold: float) -> list[dict[str, Any]]:
    """Up to which length (tokens) each model stays at `threshold`, beside the length it was extended to."""
    found = []
    for task in tasks_in(results):
        for label, cells in of_task(results, task).items():
            if cells and cells[0]["metric"] == "accuracy":
                length = effective_length(mean_by(cells, "length"), threshold)
                settings = results[label]["settings"]
                claimed = settings.get("target_length")
                if not settings.get("rope_scaling_type") and "adapter_sha256" not in settings:
                    # A base as it is claims its window.
                    claimed = settings.get("pretrained_window", claimed)
                found.append({"task": task, "model": label, "threshold": threshold, "effective_length": length,
                              "target_length": claimed})  # fmt: skip
    return found


def _accuracy_table(cells: Results, width: int) -> Iterator[str]:
    depths = sorted({cell["depth"] for found in cells.values() for cell in found})
    head = " ".join(f"{depth:>5.0%}" for depth in depths)
    loss = any("answer_loss" in cell for found in cells.values() for cell in found)
    yield f"{'model':<{width}}  {'length':>7}  {'all':>5}  {'95 %':>9}  {'loss  ' * loss}{head}"
    for label, found in cells.items():
        for length, value in mean_by(found, "length").items():
            at_length = [cell for cell in found if cell["length"] == length]
            here = mean_by(at_length, "depth")
            row = " ".join(f"{here[depth]:>5.2f}" if depth in here else "    -" for depth in depths)
            low, high = _interval(at_length)
            here_loss = mean_loss(at_length)
            shown = "   -  " * loss if here_loss is None else f"{here_loss:>4.2f}  "
            yield f"{label:<{width}}  {length:>7,}  {value:>5.2f}  {low:.2f}-{high:.2f}  {shown}{row}"
        yield ""


def _perplexity_table(cells: Results, width: int) -> Iterator[str]:
    lengths = sorted({cell["length"] for found in cells.values() for cell in found})
    yield f"{'model':<{width}}  " + " ".join(f"{length:>9,}" for length in lengths)
    for label, found in cells.items():
        values = mean_by(found, "length")
        yield f"{label:<{width}}  " + " ".join(
            f"{values[length]:>9.2f}" if length in values else f"{'-':>9}" for length in lengths
        )
    yield ""


def table_of(results: Results, threshold: float = 0.85) -> list[str]:
    """The lines: a block a task, a row a model and length; then differences to the first model and effective lengths.

    Accuracies stand with their 95 % interval (Wilson), over all depths and at each depth; differences are tested on the
    same samples (McNemar, exact), and those that may well be chance are called noise. The loss is that of the right
    answers, in nats per token.
    """
    lines: list[str] = []
    width = max(len(label) for label in results)
    compared, effective = comparisons(results), effective_lengths(results, threshold)
    for task in tasks_in(results):
        cells = of_task(results, task)
        metric = next(cell["metric"] for found in cells.values() for cell in found)
        if metric != "accuracy":
            lines += [f"{task}: {metric} per token by length (tokens)", *_perplexity_table(cells, width)]
            continue
        lines += [f"{task}: accuracy by length (tokens) and depth", *_accuracy_table(cells, width)]
        mine = [found for found in compared if found["task"] == task]
        for model in dict.fromkeys(found["model"] for found in mine):
            told = ", ".join(
                f"{found['length']:,} {found['difference']:+.2f}{' (noise)' if found['noise'] else ''}"
                for found in mine
                if found["model"] == model
            )
            lines.append(f"{model} minus {mine[0]['against']}: {told}")
            told = ", ".join(
                f"{found['length']:,} {difference_in_words(found['answer_loss'])}"
                for found in mine
                if found["model"] == model and "answer_loss" in found
            )
            if told:
                lines.append(f"  loss of the right answers (nats per token, 95 %): {told}")
        for found in effective:
            if found["task"] == task:
                reached, claimed = found["effective_length"], found["target_length"]
                kept = f"up to {reached:,}" if reached else "at no length measured"
                lines.append(f"{found['model']}: accuracy {threshold:g} and above {kept}, of {claimed:,} tokens")
        lines.append("")
    return lines


def paper_table() -> list[str]:
    """What the CREAM paper reports for the same tasks, with its source."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    lines = [f"The paper: {paper['source']}.", f"{paper['setting']}.", ""]
    keyed = paper["kv_retrieval"]
    lines.append(f"kv_retrieval, mean of five positions, {keyed['samples']} samples each:")
    lines.append(f"{'model':<16} {'75 keys':>9} {'140 keys':>9}")
    for model in keyed["75"]["mean"]:
        lines.append(f"{model:<16} {keyed['75']['mean'][model]:>9.3f} {keyed['140']['mean'][model]:>9.3f}")
    told = paper["longchat_lines"]
    lines += ["", f"longchat_lines, {told['scaling']}, {told['samples']} samples a length:"]
    lines.append(f"{'tokens':<16} " + " ".join(f"{length:>6}" for length in told["lengths"]))
    for model, values in told["accuracy"].items():
        lines.append(f"{model:<16} " + " ".join(f"{value:>6.2f}" for value in values))
    lines += ["", "LongBench, mean: " + ", ".join(f"{k} {v}" for k, v in paper["longbench"]["mean"].items()), ""]
    return lines
