"""The figures of reproduce.py's runs: statistics with the base as the unit, tables for the page, pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from pieces import NOT_RUN, with_tables
from reproduce import (
    BASES,
    EVALUATION_SEED,
    EXTENSION,
    IN_WINDOW,
    PLACES,
    QUESTIONS,
    RUNS,
    SCALINGS,
    TRAINING,
    TRIED_RATES,
    Run,
    base_of,
    beside,
    documents_of,
    label,
    lengths,
    missing,
    place,
    planned,
    read_runs,
    sigma,
)
from scipy import stats

NAMES = {"contiguous": "plain", "pose": "PoSE", "randpos": "RandPos", "cream sigma=3": "CREAM"}
PARTS = ("target", "middle", "last tenth")
OPEN = "–"
"""In a table: not run yet. A row or a table of nothing else is left out."""


def ours(context_length: int, target_length: int) -> str:
    """The label of the published CREAM."""
    return label({"strategy": "cream", "options": {"sigma": sigma(context_length, target_length)}})


def over_bases(of_run: dict[tuple[int, Any], float]) -> dict[str, Any]:
    """(base, seed) -> value, as the mean of the bases' means, with half of its 95 % t interval over the bases.

    Seeds on one base share the base, so they are averaged first: three bases leave 2 degrees of freedom.
    """
    of_base = defaultdict(list)
    for (base, _), value in of_run.items():
        of_base[base].append(value)
    means = {str(base): fmean(values) for base, values in sorted(of_base.items())}
    count = len(means)
    half = stats.t.ppf(0.975, count - 1) * stats.sem(list(means.values())) if count > 1 else None
    return {"mean": fmean(means.values()), "half_width_95": half and float(half), "by_base": means}


def figures(run: Run) -> dict[str, float]:
    """What is compared: accuracy at each length; at the target also in the middle (depth .3 to .7) and at the ends."""
    depths = {float(depth): value for depth, value in run["by_depth"].items()}
    middle = fmean(value for depth, value in depths.items() if 0.3 < depth < 0.7)
    parts = {"first tenth": depths[0.05], "middle": middle, "last tenth": depths[0.95]}
    return run["by_length"] | {"target": run["by_length"][str(run["target_length"])]} | parts


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Rows (a strategy in one place), what CREAM has more than each other one, and what the demo's form came to."""
    kinds: dict[tuple, dict[tuple, dict[str, float]]] = {}
    for run in runs:
        if run["task"] != "filler_mark":
            kind = (run["task"], *place(run), run["documents"], label(run))
            kinds.setdefault(kind, {})[run["base"], run["seed"]] = figures(run)
    names = ("task", "scaling", "context_length", "target_length", "documents", "strategy")
    rows, gaps = [], []
    for kind, found in kinds.items():
        row = dict(zip(names, kind, strict=True)) | {"runs": len(found)}
        parts = next(iter(found.values()))
        rows.append(row | {part: over_bases({run: of[part] for run, of in found.items()}) for part in parts})
        mine = kinds.get((*kind[:-1], ours(*kind[2:4])), {})
        pairs = sorted(mine.keys() & found.keys(), key=str)
        if pairs and mine is not found:
            row |= {"pairs": len(pairs)}
            gaps.append(row | {p: over_bases({run: mine[run][p] - found[run][p] for run in pairs}) for p in PARTS})
    return {"rows": rows, "cream_minus": gaps, "filler_mark": with_filler(runs)}


def with_filler(runs: list[Run]) -> list[dict[str, Any]]:
    """For each strategy and rate, base -> accuracy at the window."""
    found: dict[tuple, dict[str, float]] = defaultdict(dict)
    for run in runs:
        if run["task"] == "filler_mark":
            found[run["strategy"], run["rate"]][str(run["base"])] = run["by_length"][str(EXTENSION[0])]
    return [{"strategy": name, "rate": rate, "window": of_base} for (name, rate), of_base in found.items()]


def attention_to_the_key(base: int, documents: int = 16) -> dict[str, float]:
    """Attention from a mark, a filler or a value, to the key before it: the best head of the base's first layer."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from cream_peft.tiny.documents import evaluation_document

    model, found = AutoModelForCausalLM.from_pretrained(base_of(base), attn_implementation="eager"), {}
    for name, task in (("filler", "filler_mark"), ("value", "new_skill")):
        rng, mark = np.random.default_rng(0), documents_of(task)["mark"]
        drawn = [evaluation_document(rng, EXTENSION[0], mark) for _ in range(documents)]
        ids, asked = (torch.from_numpy(np.stack(column)) for column in list(zip(*drawn, strict=True))[:2])
        with torch.inference_mode():
            first = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions[0]
        # [documents, questions, heads]: from each mark to the token before it.
        heads = first[torch.arange(documents)[:, None], :, asked, asked - 1].mean((0, 1))
        found[name] = float(heads.max())
    return found


def share(value: float) -> str:
    """Three decimals, without the zero before the point."""
    return f"{abs(value):.3f}".removeprefix("0")


def _spread(found: dict[str, Any] | None, signed: bool = False) -> str:
    if not found:
        return OPEN
    half = found["half_width_95"]
    text = share(found["mean"]) + (f" ± {share(half)}" if half is not None else "")
    if not signed:
        return text
    ahead = sum(value > 0 for value in found["by_base"].values())
    return f"{'+' if found['mean'] >= 0 else '−'}{text} ({ahead}/{len(found['by_base'])})"


def _gap(row: dict[str, Any] | None, part: str) -> str:
    return _spread((row or {}).get(part), signed=True)


def lowest(rows: dict[tuple, dict[str, Any]], where: tuple[str, int, int]) -> str:
    """The lowest accuracy of a base at the window, over plain positions, PoSE and CREAM in a place."""
    found = [
        min(row[str(EXTENSION[0])]["by_base"].values())
        for kind, row in rows.items()
        if kind[:4] == ("new_skill", *where) and kind[-1] in ("contiguous", "pose", ours(*where[1:]))
    ]
    return share(min(found)) if found else OPEN


def _lines(*rows: list[str]) -> list[str]:
    head, *body = rows
    run = [cells for cells in body if set(cells[1:]) != {OPEN}]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *run)] if run else [NOT_RUN]


def place_name(scaling: str, context_length: int, target_length: int) -> str:
    """What a place is called in tables and pictures."""
    return f"{context_length} to {target_length}, none" if (context_length, target_length) == IN_WINDOW else scaling


def beside_table(gaps: dict[tuple, dict[str, Any]], part: str) -> list[list[str]]:
    """What CREAM has more than each other strategy in a part of the documents, a column a place."""
    kinds = {where: {"PoSE": ("pose", {})} | beside(*where[1:]) for where in PLACES}
    rows = [["CREAM minus", *(place_name(*where) for where in PLACES)]]
    for name in kinds[PLACES[0]]:
        found = []
        for where in PLACES:
            strategy, options = kinds[where][name]
            kind = ("new_skill", *where, "window", label({"strategy": strategy, "options": options}))
            found.append(_gap(gaps.get(kind), part))
        rows.append([name, *found])
    return rows


def tables(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Name -> the lines of a Markdown table of the page."""
    names = ("task", "scaling", "context_length", "target_length", "documents", "strategy")
    rows = {tuple(row[name] for name in names): row for row in summary["rows"]}
    gaps = {tuple(row[name] for name in names): row for row in summary["cream_minus"]}

    def cell(part: str, *kind: Any) -> str:
        return _spread(rows.get(kind, {}).get(part))

    whole, cream = (EXTENSION[1], EXTENSION[1]), ours(*EXTENSION)
    recall = [
        ["RoPE scaling", "untuned", "plain", "RandPos", "PoSE", "CREAM", "full length", "PoSE, crops", "CREAM, crops"]
    ]
    for scaling in SCALINGS:
        cases = [(*EXTENSION, "window", name) for name in ("untuned", "contiguous", "randpos", "pose", cream)]
        cases += [(*whole, "target", "contiguous"), (*EXTENSION, "target", "pose"), (*EXTENSION, "target", cream)]
        recall.append([scaling, *(cell("target", "recall", scaling, *case) for case in cases)])
    places = [where for where in PLACES if where[1:] == EXTENSION]
    skill = [["", *(place_name(*where) for where in places)]]
    for name in ("untuned", "contiguous", "pose", cream):
        cases = [("new_skill", *where, "window", name) for where in places]
        skill.append([NAMES.get(name, name), *(cell("target", *case) for case in cases)])
    skill.append(["lowest at 256: plain, PoSE, CREAM", *(lowest(rows, where) for where in places)])
    parts = [str(length) for length in (64, 128, 256)] + ["first tenth", "middle", "last tenth"]
    inside = [["positions", *(f"{part} tokens" if part.isdigit() else part for part in parts)]]
    for name in ("untuned", "contiguous", "randpos", "pose", ours(*IN_WINDOW)):
        kind = ("new_skill", "none", *IN_WINDOW, "window", name)
        shown = "CREAM" if name == ours(*IN_WINDOW) else NAMES.get(name, name)
        inside.append([shown, *(cell(part, *kind) for part in parts)])
    others = ("pose", "contiguous")
    paired = [
        [
            "task, RoPE scaling",
            *(f"{NAMES[o]}, {'all depths' if p == 'target' else p}" for o, p in product(others, PARTS)),
        ]
    ]
    for task, where in [
        *(("recall", (s, *EXTENSION)) for s in SCALINGS),
        *(("new_skill", where) for where in PLACES),
    ]:
        found = [_gap(gaps.get((task, *where, "window", other)), part) for other, part in product(others, PARTS)]
        paired.append([f"{task}, {place_name(*where)}".replace("_", " "), *found])
    filler = [["positions, rate", *(f"base {base}" for base in BASES)]]
    tried = {(row["strategy"], row["rate"]): row["window"] for row in summary["filler_mark"]}
    for name, rate in [("untuned", None), *product(("contiguous", "cream"), TRIED_RATES)]:
        accuracy = [tried.get((name, rate), {}).get(str(base)) for base in BASES]
        shown = {"contiguous": "plain", "cream": "CREAM"}.get(name, name) + (f", {rate:g}" if rate else "")
        filler.append([shown, *(OPEN if value is None else share(value) for value in accuracy)])
    found = {"recall": recall, "new_skill": skill, "in-window": inside, "paired": paired, "filler_mark": filler}
    found |= {f"beside, {part}": beside_table(gaps, part) for part in PARTS}
    return {name: _lines(*lines) for name, lines in found.items()}


def draw(runs: list[Run], task: str, path: Path) -> None:
    """Accuracy by length (above) and by depth at the target (below), a column for each place with trained runs."""
    from matplotlib import pyplot as plt

    styles = {
        "untuned": ("#aaaaaa", "o", ":"), "contiguous": ("#e08214", "s", "--"), "randpos": ("#8073ac", "v", "--"),
        "pose": ("#2166ac", "^", "-."), "cream": ("#b2182b", "D", "-"), "full length": ("black", "", "-"),
    }  # fmt: skip
    done = {(run["task"], *place(run)) for run in runs if run["strategy"] != "untuned"}
    places = PLACES if task == "new_skill" else [(scaling, *EXTENSION) for scaling in SCALINGS]
    places = [where for where in places if (task, *where) in done]
    figure, axes = plt.subplots(
        2, len(places), figsize=(2.75 * len(places), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    for column, where in enumerate(places):
        lines = defaultdict(list)
        for run in runs:
            crops = run["documents"] == "target"
            full = crops and run["context_length"] == run["target_length"]
            here = (run["task"], run["scaling"], run["target_length"]) == (task, where[0], where[2])
            shown = label(run) in ("untuned", "contiguous", "randpos", "pose", ours(*where[1:]))
            if here and (full or (shown and not crops)):
                lines["full length" if full else label(run)].append(run)
        for name, found in lines.items():
            color, marker, dash = styles.get(name.split(" sigma")[0], (None, "x", "-"))
            style = {
                "color": color,
                "marker": marker,
                "linestyle": dash,
                "markersize": 4,
                "label": name.split(" sigma")[0],
            }
            for row, part in enumerate(("by_length", "by_depth")):
                means = {x: fmean(run[part][x] for run in found) for x in found[0][part]}
                axes[row, column].plot([float(x) for x in means], list(means.values()), **style)
        ticks = lengths({"context_length": where[1], "target_length": where[2]})
        axes[0, column].set_xscale("log", base=2)
        axes[0, column].set_xticks(ticks, [f"{length:,}" for length in ticks])
        axes[0, column].set(xlim=(ticks[0] * 0.9, ticks[-1] * 1.1), ylim=(-0.03, 1.03))
        axes[0, column].set(title=place_name(*where), xlabel="document length (tokens)")
        axes[1, column].set(xlabel=f"depth at {where[2]:,} tokens")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("accuracy")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(places), frameon=False
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(output: Path, page_folder: Path | None, again: bool = False) -> None:
    """Write the figures and pictures of all runs into `output`; or into results/, with the runs, and into the page."""
    from reproduce_distances import explain

    runs, environments = read_runs(output, again)
    if not runs:
        print(f"no run is finished yet of the {len(planned())}: the same command resumes")
        return
    target = page_folder / "results" if page_folder else output
    # A run lasts as long as the others of its task did on average.
    seconds = {
        task: fmean(run["train_seconds"] + run["evaluation_seconds"] for run in runs if run["task"] == task)
        for task in {run["task"] for run in runs}
    }
    left = missing(runs, [])
    content = {
        "command": "make reproduce",
        "settings": {
            "training": TRAINING,
            "lora_r": 16,
            "evaluation_seed": EVALUATION_SEED,
            "evaluation_questions": QUESTIONS,
        },
        "environments": list(environments.values()),
        "bases": {seed: json.loads((base_of(seed) / "origin.json").read_text()) for seed in BASES},
        "planned_runs": len(planned()),
        "finished_runs": len(planned()) - len(left),
        "hours": sum(run["train_seconds"] + run["evaluation_seconds"] for run in runs) / 3600,
        "seconds_per_run": seconds,
    }
    content |= {"attention_to_the_key_at_a_mark": {base: attention_to_the_key(base) for base in BASES}}
    content |= summarise(runs)
    (target / "reproduce.json").write_text(json.dumps(content, indent=1) + "\n")
    for task, name in (("new_skill", "reproduce.png"), ("recall", "reproduce-recall.png")):
        if any(run["task"] == task and run["strategy"] != "untuned" for run in runs):
            draw(runs, task, target / name)
    if not any(run["task"] == "recall" for run in left):
        explain(runs, target)
    if page_folder:
        # Only here: a run in progress appends to the output folder's own file.
        lines = [*environments.values(), *runs]
        (target / RUNS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = page_folder / "README.md"
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables(content)), encoding="utf-8")
    else:
        print("\n\n".join("\n".join(table) for table in tables(content).values()))
    hours = sum(seconds.get(run["task"], fmean(seconds.values())) for run in left) / 3600
    finished = f"{content['finished_runs']} of {content['planned_runs']} runs in {target}"
    print(f"{finished}; {hours:.1f} hours of one worker are left")
