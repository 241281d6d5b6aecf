"""What README says can be found: files, targets, keys, and figures in the JSON they link to."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from cream_peft.evals.results import Results, mean_by
from cream_peft.train.recipe import DATACLASSES, EMBEDDED_RECIPE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_local_link_and_recipe_in_readme_exists():
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    linked += re.findall(r"recipes/[\w./-]+\.yaml", README)
    assert linked and [target for target in linked if not (ROOT / target).exists()] == []


def test_every_make_target_in_readme_exists():
    targets = set(re.findall(r"`make ([a-z0-9-]+)", README)) | set(
        re.findall(r"^make ([a-z0-9-]+)", README, re.MULTILINE)
    )
    defined = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= defined


def test_every_key_in_the_table_is_a_field_with_the_default_it_says():
    fields = {field.name: field for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)}
    recipe = README[README.index("A recipe is YAML") : README.index("Any key is also a flag")]
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| [^|]+ \| ([^|]+) \|$", recipe, re.MULTILINE)
    assert len(rows) >= 9
    for names, default in rows:
        for name in re.findall(r"`([a-z_]+)`", names):
            assert name in fields
            if default.strip().startswith("`") and "max_position" not in default and "context_length" not in default:
                assert fields[name].default == default.strip(" `")


@pytest.mark.parametrize("path", [EMBEDDED_RECIPE, *sorted((ROOT / "recipes").rglob("*.yaml"))], ids=lambda p: p.stem)
def test_no_file_names_a_path_of_a_machine(path):
    assert not re.search(r"(^|[^A-Za-z0-9_.])/(home|root|work|tmp)/", path.read_text())


def printed(value):
    text = f"{abs(value):.3f}"
    return text[1:] if text.startswith("0") else "1.00"


def test_the_tables_of_the_reproduction_equal_its_json():
    content = json.loads((ROOT / "recipes/cream-peft-tiny/results/reproduce.json").read_text())
    assert content["finished_runs"] == content["planned_runs"] == len(content["runs"])
    seconds = sum(run["train_seconds"] + run["evaluation_seconds"] for run in content["runs"])
    assert f"add up to {seconds / 2 / 60:.0f} minutes on two workers" in " ".join(README.split())
    rows = {(row["scaling"], row["strategy"], row["documents"]): row for row in content["summary"]["rows"]}
    pairs = {(row["scaling"], row["documents"], row["against"]): row for row in content["summary"]["cream_minus"]}
    table, differences, crops = (README.split(head)[1].split("\n\n")[0] for head in (
        "| RoPE scaling | untuned |", "| CREAM minus |", "| RoPE scaling | PoSE | CREAM |"))  # fmt: skip
    kinds = [("untuned", None), *((name, "window") for name in ("contiguous", "randpos", "pose", "cream")),
             ("full", "target")]  # fmt: skip
    for scaling in ("none", "linear", "ntk", "yarn"):
        cells = [re.search(rf"\| {scaling} \|(.*)\|", part)[1].split("|") for part in (table, differences, crops)]
        means = [printed(rows[scaling, *kind]["2048"]["mean"]) for kind in kinds]
        assert [cell.split()[0] for cell in cells[0]] == means
        gaps = [pairs[scaling, "window", other][part] for other, part in (
            ("pose", "2048"), ("pose", "middle"), ("pose", "last tenth"), ("contiguous", "2048"),
            ("contiguous", "middle"))]  # fmt: skip
        for cell, gap in zip(cells[1], gaps, strict=True):
            sign = "+" if gap["mean"] >= 0 else "−"
            ahead = sum(value > 0 for value in gap["by_base"].values())
            assert cell.strip() == f"{sign}{printed(gap['mean'])} ± {printed(gap['half_width_95'])} ({ahead}/3)"
        order = [(part, name) for part in ("2048", "middle") for name in ("pose", "cream")]
        found = [rows[scaling, name, "target"][part]["mean"] for part, name in order]
        assert [cell.strip() for cell in cells[2]] == [printed(value) for value in found]


SMOLLM2 = ROOT / "recipes/smollm2-135m-instruct"


def test_the_figures_of_smollm2_equal_their_json():
    shown = {
        "`multikey_needle`, 5 cities": "ability/multikey_needle-5",
        "`multikey_needle`, 8 cities": "ability/multikey_needle-8",
        "`multikey_needle`, 16 cities": "ability/multikey_needle-16",
        "`kv_retrieval`, 4 digits": "ability/kv_retrieval-4-digits",
        "`kv_retrieval`, UUIDs": "ability/kv_retrieval-uuid",
        "`longchat_lines`": "ability/longchat_lines",
        "`passkey` ([JSON]": "inside-and-beyond",
        "`needle`": "ability/needle",
    }
    for start, name in shown.items():
        task = re.search(r"`(\w+)`", start)[1]
        means = mean_by(Results.read(SMOLLM2 / "results" / f"{name}.json").of_task(task), "length")
        section = README[README.index("## A real chat model") :]
        row = next(line for line in section.splitlines() if line.startswith(f"| {start}"))
        told = re.findall(r"(\d[\d,]*): ([\d.]+)", row)
        told = {int(length.replace(",", "")): float(value) for length, value in told}
        assert set(means) == set(told)
        assert all(abs(told[length] - value) <= 0.0051 for length, value in means.items()), row


@pytest.mark.parametrize("name", ["cpu", "settings", "search"])
def test_the_comparison_of_smollm2_is_what_its_script_makes_of_the_json(name):
    spec = importlib.util.spec_from_file_location("compare_in_readme", SMOLLM2 / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = compare
    spec.loader.exec_module(compare)
    lines = compare.table(json.loads((SMOLLM2 / f"results/{name}.json").read_text()))
    assert len(lines) > 4 and all(line in README for line in lines if line.startswith("|"))
    if name == "cpu":
        quoted = re.findall(r"^\w+, [\d,]+ tokens, .*: CREAM minus .*$", README, re.MULTILINE)
        assert quoted and set(quoted) <= set(lines)


def test_the_planned_figures_equal_what_plan_wrote():
    def without_context(name, *where):
        terms = json.loads((ROOT / f"recipes/llama-2-7b/results/plan-{name}.json").read_text())
        for key in where:
            terms = terms[key]
        return terms["total"] - terms["cuda_context"]

    rows = {
        "| default | 8 GB": "7b-default",
        "| `memory: low` | 8 GB": "7b-low",
        "| 13B, default | 16 GB": "13b-default",
        "| 13B, `memory: low` | 12 GB": "13b-low",
    }
    for row, name in rows.items():
        assert f"{row} | {without_context(name, 'terms'):.2f} GiB |" in README
    for cache, row in (("default", "16-bit cache | 24 GB"), ("quantized", "4-bit cache | 12 GB")):
        assert f"{row} | {without_context('7b-default', 'evaluation', 'terms', cache):.1f} GiB" in README


DEMO_TASKS = ("recall", "kv_retrieval", "needle")


def test_the_figures_of_demo_and_bench_equal_their_json():
    demo = json.loads((ROOT / "recipes/cream-peft-tiny/results/demo.json").read_text())
    for label, result in demo["results"].items():
        of_task = {task: mean_by(Results.parse(result).of_task(task), "length") for task in DEMO_TASKS}
        means = [*of_task["recall"].values(), *(of_task[task][2048] for task in DEMO_TASKS[1:])]
        assert f"| {label} | {' | '.join(f'{value:.2f}' for value in means)} |" in README
    clone = json.loads((ROOT / "recipes/cream-peft-tiny/results/fresh-clone.json").read_text())
    seconds = [round(clone[name]) for name in ("setup_seconds", "demo_seconds", "test_seconds")]
    assert "set-up took {} s, the demo {} s and the tests {} s".format(*seconds) in README
    bench = json.loads((ROOT / "recipes/cream-peft-tiny/results/bench-cpu.json").read_text())
    assert f"takes {bench['trainer']['ratio_of_medians']:.2f} times as long" in README
    assert f"{bench['sampler']['median_times_faster']:.0f} times faster than the authors'" in README
    one, batch = (bench["answers"][name]["median_times_faster"] for name in ("one document", "a batch"))
    assert f"2,048 tokens {one:.1f} times as fast" in README and f"eight documents is {batch:.1f} times" in README
