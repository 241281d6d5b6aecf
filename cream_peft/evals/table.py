"""Results for the terminal: a small table a task and what it means; if asked, all that was measured."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..terminal import table
from .results import (
    SIGNIFICANT,
    Cell,
    Compared,
    compare_cells,
    comparisons,
    effective_lengths,
    interval,
    mean_by,
    mean_loss,
    places,
    read_otherwise,
    same_places,
    tasks_in,
)

PAPER = Path(__file__).parent / "paper.json"
LEGEND = """all: over all depths; 95 %: Wilson's interval; loss: of the right answers, in nats per token; difference: to
the first model on the same samples, p by McNemar's exact test, 0.05 and above may be chance; 0% to 100%: depth of the
answer, 0% being the start."""
Tests = dict[tuple[str, int], dict[str, Any]]
"""(model, length) -> what `comparisons` found."""


def difference_in_words(loss: dict[str, Any]) -> str:
    """What `paired_means` found: the difference and, of more than one document, its interval."""
    bounds = "" if loss["interval"] is None else " ({:+.2f} to {:+.2f})".format(*loss["interval"])
    return f"{loss['difference']:+.2f}{bounds}"


def _row(label: str, values: dict[Any, float], columns: Collection[Any]) -> list[str]:
    return [label, *(f"{values[column]:.2f}" if column in values else "-" for column in columns)]


def _p_value(test: dict[str, Any]) -> str:
    return "< 0.001" if test["p_value"] < 0.001 else f"= {test['p_value']:.3f}"


def _last_against_best(cells: dict[str, list[Cell]], target: int | None) -> str:
    """One sentence: the last model beside the best of the others, at the longest length that they share with it, up to
    the `target` (tokens) that it was trained for.

    Not beside the first: a base that is not scaled is beaten by scaling alone, which says nothing of the training.
    """
    *others, last = cells
    means = {label: mean_by(found, "length") for label, found in cells.items()}
    shared = {at for label in others for at in means[label]} & means[last].keys()
    length = max((at for at in shared if at <= (target or at)), default=max(shared, default=0))
    is_share = cells[last][0].metric == "accuracy"
    asked = [label for label in others if length in means[label]]
    if not is_share:
        # Per token of another tokenizer it says nothing.
        asked = [label for label in asked if same_places(cells[label], cells[last], length)]
    if not asked:
        return ""
    mine = means[last][length]
    best = (max if is_share else min)(asked, key=lambda label: means[label][length])
    other, which = means[best][length], f"the best of the others, {best}," if len(asked) > 1 else best
    if not is_share:
        return f"At {length:,} tokens {last} has a perplexity of {mine:.2f}, {which} of {other:.2f}."
    test, chance = compare_cells(same_places(cells[best], cells[last], length)), ""
    if test and mine != other:
        noise = "may be" if test["p_value"] >= SIGNIFICANT else "is not"
        chance = f"; over {test['questions']:,} questions the difference {noise} chance (p {_p_value(test)})"
    return f"At {length:,} tokens {last} answers {mine:.0%} right, {which} {other:.0%}{chance}."


def _other_prompts(cells: dict[str, list[Cell]]) -> str:
    """One sentence: the models that read something else than the first one."""
    first, *others = cells
    pairs = {label: places(cells[first], cells[label]) for label in others}
    apart = [label for label in others if any(read_otherwise(*pair) for pair in pairs[label])]
    if not apart:
        return ""
    return (
        f"Not compared one by one with {first}: {', '.join(apart)}, which read other prompts (another tokenizer or "
        "--style), and whose losses are of other tokens."
    )


def _reach(effective: list[dict[str, Any]], cells: dict[str, list[Cell]], threshold: float) -> str:
    """One sentence: up to which length each model is of use."""
    told = []
    for found in effective:
        label, reached = found["model"], found["effective_length"]
        is_longest = reached == max(cell.length for cell in cells[label])
        told.append(f"{label} {f'{reached:,}' if reached else 'none'}{' (the longest asked)' if is_longest else ''}")
    return f"At least {100 * threshold:g}% is right up to this many tokens: {', '.join(told)}." if told else ""


def _details(cells: dict[str, list[Cell]], compared: Tests) -> str:
    """A row a model and length: accuracy, its interval and loss, the difference to the first model, each depth."""
    depths = sorted({cell.depth for found in cells.values() for cell in found})
    rows = []
    for label, found in cells.items():
        for length, value in mean_by(found, "length").items():
            here = [cell for cell in found if cell.length == length]
            (low, high), loss, test = interval(here), mean_loss(here), compared.get((label, length))
            row = [f"{length:,}", f"{value:.2f}", f"{low:.2f}-{high:.2f}", "-" if loss is None else f"{loss:.2f}"]
            row += [f"{test['difference']:+.2f}", _p_value(test)] if test else ["-", "-"]
            row.append(difference_in_words(test["answer_loss"]) if test and "answer_loss" in test else "-")
            rows.append([label, *row, *_row("", mean_by(here, "depth"), depths)[1:]])
    by_depth = [f"{depth:.0%}" for depth in depths]
    columns = ["model", "length", "all", "95 %", "loss", "difference", "p", "of the loss (95 %)", *by_depth]
    shown = [index for index in range(len(columns)) if any(row[index] != "-" for row in rows)]
    told = table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows], indent=2)
    return f"{told}\n\n{LEGEND}"


def table_of(
    results: Compared, threshold: float = 0.85, tasks: Collection[str] | None = None, details: bool = False
) -> str:
    """Text: a table a task (of `tasks`), a row a model and a column a length, and in a sentence or two what it says;
    with `details` another table, of all that was measured."""
    lines: list[str] = []
    compared, effective = comparisons(results), effective_lengths(results, threshold)
    for task in tasks_in(results) if tasks is None else sorted(set(tasks) & set(tasks_in(results))):
        cells = {label: found for label, result in results.items() if (found := result.of_task(task))}
        lengths = sorted({cell.length for found in cells.values() for cell in found})
        is_share = next(iter(cells.values()))[0].metric == "accuracy"
        what = "share of right answers" if is_share else "perplexity per token (lower is better)"
        lines += [f"{task}: {what} by length in tokens", ""]
        rows = [_row(label, mean_by(found, "length"), lengths) for label, found in cells.items()]
        lines += [table(["model", *(f"{length:,}" for length in lengths)], rows, indent=2), ""]
        tests = {(found["model"], found["length"]): found for found in compared if found["task"] == task}
        of_task = [one for one in effective if one["task"] == task]
        target = results[list(cells)[-1]].settings.target_length
        said = [_last_against_best(cells, target), _other_prompts(cells), _reach(of_task, cells, threshold)]
        lines += [sentence for sentence in said if sentence]
        lines += ["", _details(cells, tests), ""] if details and is_share else [""]
    return "\n".join(lines)


def paper_table() -> str:
    """What the CREAM paper reports for the same tasks, with its source."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    keyed, told, score = paper["kv_retrieval"], paper["longchat_lines"], paper["longbench"]["mean"]
    means = [[model, *(f"{keyed[keys]['mean'][model]:.3f}" for keys in ("75", "140"))] for model in keyed["75"]["mean"]]
    lines = [_row(model, dict(enumerate(values)), range(len(values))) for model, values in told["accuracy"].items()]
    return "\n".join(
        [
            f"The paper: {paper['source']}.\n{paper['setting']}.\n",
            f"kv_retrieval, mean of five positions, {keyed['samples']} samples each:",
            table(["model", "75 keys", "140 keys"], means),
            f"\nlongchat_lines, {told['scaling']}, {told['samples']} samples a length (tokens):",
            table(["model", *map(str, told["lengths"])], lines),
            f"\nLongBench, mean: {', '.join(f'{model} {value}' for model, value in score.items())}\n",
        ]
    )
