"""What the pages say can be found: files, targets, commands, keys, and figures in the JSON that they link to."""

import dataclasses
import json
import re
from collections import defaultdict

import numpy as np
import pytest
import yaml
from conftest import ROOT, load_script

from cream_peft import cli
from cream_peft.cli import COMMANDS
from cream_peft.evals.results import Results, comparisons, mean_by
from cream_peft.model.base import embedded_config
from cream_peft.plan.advice import training_flops
from cream_peft.plan.memory import Training
from cream_peft.rope import pretrained_window
from cream_peft.train.machine import plan_recipe
from cream_peft.train.recipe import DATACLASSES, EMBEDDED_RECIPE, parse_recipe

SEEDS = ("", " seed 1", " seed 2", " seed 3")
TINY, SMOLLM2 = ROOT / "recipes/cream-peft-tiny", ROOT / "recipes/smollm2-135m-instruct"
PAGES = {
    str(path.parent.relative_to(ROOT)): path
    for folder in ("", "recipes", "cream_peft", "tests")
    for path in sorted((ROOT / folder).rglob("README.md") if folder else ROOT.glob("README.md"))
}
"""Folder -> page."""
README = PAGES["."].read_text(encoding="utf-8")


def page(folder):
    return PAGES[folder].read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """What a heading is called in a link: lower case, hyphens for spaces, nothing else."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_all_there_and_readme_is_a_front_page():
    wanted = {"recipes", "recipes/cream-peft-tiny", "recipes/smollm2-135m-instruct", "recipes/llama-2-7b"}
    assert {".", "cream_peft/evals", "cream_peft/publish", "tests"} | wanted <= set(PAGES)
    assert len(README.splitlines()) <= 170
    linked = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", README)}
    assert {f"{folder}/README.md" for folder in PAGES} - {"./README.md"} <= linked, "README leads to every page"


@pytest.mark.parametrize("folder", PAGES)
def test_every_local_link_of_a_page_exists(folder):
    text = page(folder)
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert linked
    for target in linked:
        name, _, anchor = target.partition("#")
        found = (ROOT / folder / name).resolve() if name else PAGES[folder]
        assert found.exists() and found.is_relative_to(ROOT), f"{folder}: {target}"
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), f"{folder}: {target}"
    # In commands paths are those from a clone's root.
    for path in re.findall(r"(?:recipes|tests)/[\w./-]+\.(?:yaml|py|json)", re.sub(r"\]\([^)]+\)", "", text)):
        assert (ROOT / path).exists(), f"{folder}: {path}"


@pytest.mark.parametrize("folder", PAGES)
def test_every_make_target_and_every_command_of_a_page_exists(folder):
    text = page(folder)
    targets = set(re.findall(r"(?:`|^|&& )make ([a-z0-9-]+)", text, re.MULTILINE))
    defined = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined
    commands = set(re.findall(r"(?:`|^)cream-peft ([a-z-]+)", text, re.MULTILINE))
    assert commands <= set(COMMANDS)
    if folder == ".":
        assert {"demo", "test", "base", "chat"} <= targets and commands == set(COMMANDS)


def recipe_rows(text):
    """Path below recipes/ and cells of each row of a table of recipes."""
    return re.findall(r"^\| \[[\w.-]+\]\((?:recipes/)?(\S+\.yaml)\) \| (.*) \|$", text, re.MULTILINE)


def test_the_recipes_table_says_what_the_recipes_say():
    rows, folder = recipe_rows(page("recipes")), ROOT / "recipes"
    every = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml") if path.parent.name != "accelerate"}
    assert {path for path, _ in rows} == every and len(rows) == 15
    shown = recipe_rows(README)
    assert set(shown) < set(rows) and len(shown) == len(set(shown)) == 8
    for path, cells in rows:
        text = (folder / path).read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        base, job, *lengths, scaling, peak, reading, hours = (cell.strip() for cell in f"{cells} ".split(" |"))
        assert recipe["model_name_or_path"].endswith(base) and scaling == recipe["rope_scaling_type"]
        config = embedded_config(recipe["model_name_or_path"])
        window = pretrained_window(config)
        assert lengths == [f"{length:,}" for length in (window, recipe["context_length"], recipe["target_length"])]
        if job == "skill":
            assert scaling == "none" and "a skill over the window" in text and recipe["target_length"] <= window
        else:
            words = " ".join(text.replace("#", " ").split())
            assert f"from {window:,} to {recipe['target_length']:,} tokens" in words and job in ("window", "both")
        assert f"{peak} planned by cream-peft plan" in text
        plan = plan_recipe(parse_recipe(["--config", str(folder / path)]), config)
        assert reading == f"{min(terms['total'] for terms in plan.evaluation.terms.values()):.1f} GiB"
        assert (f" {hours} planned on an RTX 4090" in text) if hours else " planned on an RTX 4090" not in text


def test_the_yaml_of_readme_is_a_recipe_of_ten_lines():
    fields = {field.name for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)}
    lines = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(lines) <= 10 and set(yaml.safe_load("\n".join(lines))) <= fields


def test_the_recipe_of_a_skill_of_ones_own_trains(make_model, byte_tokenizer, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(re.search(r"`mine.yaml`.*?```yaml\n(.*?)```", page("recipes"), re.DOTALL)[1])
    byte_tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</s>{% endfor %}"
    for saved in (make_model(max_position_embeddings=512), byte_tokenizer):
        saved.save_pretrained(tmp_path / "base")
    for name, count in (("mine", 2), ("long", 50)):
        turns = [{"role": "user", "content": "One? " * count}, {"role": "assistant", "content": "1"}]
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    smaller = {
        "model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "mine.jsonl", "context_length": 256,
        "dataset_test_split": tmp_path / "long.jsonl", "target_length": 512, "eval_length": 512, "max_steps": 20,
        "output_dir": tmp_path / "run", "load_in_4bit": "false",
    }  # fmt: skip
    words = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml"), *words]) == 0
    assert "held out: 4 documents of 1," in (said := capsys.readouterr().err) and "read in part" not in said
    assert json.loads((tmp_path / "run/cream.json").read_text())["best"]["step"] in (10, 20)


def test_every_key_in_the_table_is_a_field_with_the_default_it_says():
    fields = {field.name: field for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)}
    text = page("recipes")
    rows = re.findall(r"^\| (`[a-z0-9_`, ]+`) \| [^|]+ \| ([^|]+) \|$", text[: text.index("## Data")], re.MULTILINE)
    told = {name for names, _ in rows for name in re.findall(r"`([a-z0-9_]+)`", names)}
    ours = {name for dataclass in DATACLASSES for name in vars(dataclass).get("__annotations__", {})}
    assert told >= ours - {"max_length", "logging_nan_inf_filter"} and len(rows) >= 20
    assert all(f"`{name}" in text for name in ours)
    for names, default in rows:
        for name in re.findall(r"`([a-z0-9_]+)`", names):
            found = fields[name].default
            if default == "`context_length`":
                assert found is None
            elif default.startswith("`"):
                found = ", ".join(fields[name].default_factory()) if found is dataclasses.MISSING else found
                assert (str(found).lower() if isinstance(found, bool) else str(found)) == default.strip("`"), name
            else:
                assert found is None or name == "dataset_revision", name


@pytest.mark.parametrize(
    "path",
    [EMBEDDED_RECIPE, ROOT / "Makefile", *PAGES.values(), *sorted((ROOT / "recipes").rglob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_no_file_names_a_path_of_a_machine(path):
    assert not re.search(r"(^|[^A-Za-z0-9_.])/(home|root|work|tmp)/", path.read_text(encoding="utf-8"))


def test_the_tables_of_smollm2_are_what_its_script_makes_of_the_committed_pieces():
    compare = load_script(SMOLLM2 / "compare.py")
    pieces = compare.read_lines(SMOLLM2 / "results/skill/pieces.jsonl")
    summary = json.loads((SMOLLM2 / "results/skill/skill.json").read_text())
    assert json.loads(json.dumps(compare.summarise(pieces))) == summary
    text = page("recipes/smollm2-135m-instruct")
    for make in (
        compare.short_table,
        compare.seeds_table,
        compare.table,
        compare.differences_table,
        compare.price_table,
    ):
        assert "\n".join(make(summary)) in text
    # Rows that were not run are named.
    planned = {row.name for row, _, _ in compare.planned(compare.BUDGETS["cpu"], False, None)}
    missing = planned - {row["name"] for row in summary["rows"]}
    assert all(f"`{name}`" in text for name in missing)


def test_what_the_pages_say_of_smollm2_is_in_its_json():
    summary = json.loads((SMOLLM2 / "results/skill/skill.json").read_text())
    text_as_is = page("recipes/smollm2-135m-instruct")
    text, front = (" ".join(one.split()) for one in (text_as_is, README))
    rows = {row["name"]: row for row in summary["rows"]}
    found = {
        (one["scaling"], one["against"], one["length"]): one
        for one in summary["cream minus"]
        if one["depths"] == "all depths"
    }

    def right(name, length):
        return f"{rows[name][str(length)]['accuracy']:.2f}"

    def surely_lower(*where):
        return found[where]["alone_loss"]["interval"][1] < 0

    longer = [f"{{}} {name}+128 steps" for name in ("contiguous", "cream")]
    seeds = {
        name: [right(f"yarn {name}+128 steps{seed}", 8192) for seed in ("", " seed 1", " seed 2")]
        for name in ("contiguous", "cream", "pose")
    }
    spans = [f"{min(seeds[name])} to {max(seeds[name])}" for name in ("cream", "pose", "contiguous")]
    assert "three of CREAM have {} right, of PoSE {}, of plain {}.".format(*spans) in front
    assert "three seeds of CREAM have {} right, of PoSE {}, of plain fine-tuning {}.".format(*spans) in text
    lengths = (1024, 4096, 8192, 16_384, 32_768)
    # The seeds together, as the short table and the pictures have them.
    cells = {
        name: re.search(rf"\| YaRN: {name}, 256 steps \|(.*) \|\n", text_as_is)[1].split(" | ")[: len(lengths)]
        for name in ("plain fine-tune", "CREAM", "PoSE")
    }
    plain, cream, pose = ([float(cell.split()[0]) for cell in row] for row in cells.values())
    assert all(one > max(others) for one, *others in zip(cream[1:], plain[1:], pose[1:], strict=True))
    assert "at 1,024 tokens and has more right from 4,096 on" in text and abs(cream[0] - max(plain[0], pose[0])) < 0.02
    settled = {"contiguous": [False, True, True, False, True], "pose": [False, True, True, True, True]}
    for name, expected in settled.items():
        of_256 = [found["yarn", f"{name}+256 steps", length] for length in lengths]
        assert [one["p_value"] < 0.05 for one in of_256] == expected
        assert [one["alone_loss"]["interval"][1] < 0 for one in of_256] == [False, True, True, True, True]
        assert [one["alone_loss"]["documents"] for one in of_256] == [8, 8, 8, 12, 6]
        asked = {"contiguous": [[0, 1, 2, 3]] * 3 + [[0, 2, 3], [2, 3]], "pose": [[0, 1, 2]] * 3 + [[0, 2], [2]]}
        assert [one["seeds"] for one in of_256] == asked[name]
    of_seed = {
        (name, length): [rows[f"yarn {name}+256 steps{seed}"].get(length, {}).get("accuracy") for seed in SEEDS]
        for name in ("cream", "contiguous")
        for length in ("1024", "8192", "16384", "32768")
    }
    ours, theirs = (of_seed[name, "8192"] for name in ("cream", "contiguous"))
    assert [one > other + 0.05 for one, other in zip(ours, theirs, strict=True)] == [True, True, False, True]
    assert "At 8,192 tokens CREAM is ahead of plain fine-tuning in three of them; in the third seed" in text
    assert "8,192 tokens CREAM is ahead of plain fine-tuning in three of four, at the target" in front
    for length in ("8192", "16384"):
        assert of_seed["contiguous", length][2] > of_seed["cream", length][2]
    assert "In the last one CREAM loses much of the length too" in text
    assert of_seed["cream", "1024"][3] - of_seed["cream", "32768"][3] > 0.3
    assert "at 4,096, 8,192 and 32,768, than PoSE from 4,096 on." in text
    assert "lower than that of both from 4,096 on, beyond chance." in text
    told = [f"{one:.2f}" for name in ("cream", "contiguous") for one in of_seed[name, "32768"] if one is not None]
    assert "in both seeds that were asked: {} and {} right, plain {} and {}.".format(*told) in text
    assert "in both that were asked ({} and {} right, plain {} and {}).".format(*told) in front
    assert "the best that was measured from 4,096 tokens on" in text
    for length in ("4096", "8192", "16384", "32768"):
        every = defaultdict(list)
        for row in summary["rows"]:
            every[row["scaling"], row["strategy"]] += [row[length]] if length in row else []
        shares = {
            where: np.average([one["accuracy"] for one in asked], weights=[one["questions"] for one in asked])
            for where, asked in every.items()
            if asked
        }
        assert max(shares, key=shares.__getitem__) == ("yarn", "cream+256 steps")
    again = Results.read(SMOLLM2 / "results/skill/float32.json")
    pieces = load_script(SMOLLM2 / "compare.py").read_lines(SMOLLM2 / "results/skill/pieces.jsonl")
    (was,) = (piece for piece in pieces if piece.get("adapter") == again.settings.adapter_sha256
              and (piece["what"], piece["block"]) == (8192, 0))  # fmt: skip
    assert (was["asked in"], again.settings.dtype) == ("bfloat16", "float32")
    answers = [
        "".join(cells) for cells in ([cell["correct"] for cell in was["cells"]], [cell.correct for cell in again.cells])
    ]
    assert "of the third plain fine-tune's 32 answers at 8,192 tokens one" in text and len(answers[0]) == 32
    assert sum(one != other for one, other in zip(*answers, strict=True)) == 1
    ntk = [right(f"ntk {name}", length) for name in ("cream", "contiguous", "pose") for length in (8192, 1024)]
    assert "{} right at 8,192 tokens and {} at 1,024 (plain fine-tuning {} and {}, PoSE {} and {})".format(*ntk) in text
    losses = [f"{rows[f'ntk {name}']['8192']['answer loss']:.2f}" for name in ("cream", "contiguous", "pose")]
    assert "the lowest, {} against {} and {}.".format(*losses) in text and min(losses) == losses[0]
    told = "SmolLM2 had {} right at 8,192 tokens after 256 examples, {} to {} after 1,024 (four seeds, under YaRN)"
    after = sorted(right(f"yarn cream+256 steps{seed}", 8192) for seed in SEEDS)
    assert told.format(right("yarn cream", 8192), after[0], after[-1]) in " ".join(page("recipes").split())
    own = [right(f"yarn cream+128 steps+default sigma{seed}", 8192) for seed in ("", " seed 1")]
    assert "two seeds have fewer right than the clamped one" in text
    assert all(one < other for one, other in zip(own, seeds["cream"], strict=False))
    assert found["yarn", "cream+128 steps+default sigma", 8192]["p_value"] > 0.05
    over_seeds = {(one["against"], one["length"]): one for one in summary["cream minus, over seeds"]}
    for one, count in ((over_seeds[f"contiguous+{steps} steps", 8192], count) for steps, count in ((256, 4), (128, 3))):
        assert one["seeds"] == [*range(count)]
        assert all(one[key]["p_value"] > 0.05 for key in ("accuracy", "loss of the number alone"))
    one = over_seeds["contiguous+256 steps", 8192]["accuracy"]
    assert (
        "CREAM minus plain at 8,192 is {:+.2f} ({:+.2f} to {:+.2f})".format(one["difference"], *one["interval"]) in text
    )
    assert found["yarn", "contiguous+128 steps", 8192]["seeds"] == [0, 1, 2]
    assert found["yarn", "pose+128 steps", 8192]["seeds"] == [0, 1, 2]
    at = [rows[name.format("none")]["8192"] for name in longer]
    at = [f"{one[key]:.2f}" for key in ("accuracy", "loss of the number alone") for one in at]
    assert "unscaled, after 128 steps: plain {}, CREAM {} (perhaps chance), losses {} and {}".format(*at) in front
    for length in (8192, 16_384):
        assert surely_lower("yarn", "contiguous+128 steps", length)
        assert found["yarn", "contiguous+128 steps", length]["p_value"] < 0.01
    for where in (("yarn", "contiguous", 8192), ("yarn", "contiguous", 16_384), ("none", "contiguous", 8192),
                  ("none", "contiguous+128 steps", 8192)):  # fmt: skip
        assert surely_lower(*where)
    assert found["yarn", "contiguous", 8192]["p_value"] < 0.01 < 0.05 < found["yarn", "contiguous", 16_384]["p_value"]
    assert found["yarn", "contiguous", 8192]["seeds"] == found["none", "contiguous", 8192]["seeds"] == [0, 1]
    assert found["yarn", "contiguous", 16_384]["alone_loss"]["documents"] == 12
    assert (
        found["yarn", "contiguous+128 steps", 1024]["p_value"]
        < 0.05
        < found["none", "contiguous+128 steps", 1024]["p_value"]
    )
    pose = {where: one for where, one in found.items() if where[1] == "pose"}
    for (scaling, *_), one in pose.items():
        low, high = one["alone_loss"]["interval"]
        if scaling != "ntk":
            assert one["p_value"] > 0.05 and low < 0 < high
        else:
            assert "CREAM has not learned to answer" in text and one["p_value"] < 0.05 and one["difference"] < 0
    assert len(pose) == 9
    sooner, *later = (found["yarn", "pose+128 steps", length] for length in (1024, 4096, 8192, 16_384))
    assert "**PoSE** learns sooner" in text and sooner["p_value"] < 0.01 and sooner["difference"] < 0
    assert sooner["alone_loss"]["interval"][0] > 0
    assert all(one["p_value"] > 0.05 and abs(one["difference"]) < 0.1 for one in later)
    assert all(one["alone_loss"]["interval"][0] < 0 < one["alone_loss"]["interval"][1] for one in later)
    by_depth = list(rows["none contiguous+128 steps"]["8192"]["loss by depth"].values())
    assert "loses there after 128 is the first quarter" in text and min(by_depth[:2]) > 3 * max(by_depth[2:])
    assert "exact answers may be chance" in text and found["none", "contiguous+128 steps", 8192]["p_value"] > 0.05
    at = [right(f"none {name}", 1024) for name in ("cream", "contiguous", "cream+128 steps", "contiguous+128 steps")]
    assert "64 bring it to {} (plain fine-tuning {}), 128 to {} ({}, which may be chance)".format(*at) in text
    for length in ("1024", "4096", "8192"):
        alone, mixed = (rows[f"none {name}"][length] for name in ("cream", "cream+contiguous"))
        assert mixed["accuracy"] <= alone["accuracy"]
        assert mixed["loss of the number alone"] > alone["loss of the number alone"]
    grown, alone = (rows[f"none {name}"]["8192"] for name in ("cream+growth", "cream"))
    assert grown["accuracy"] < alone["accuracy"]
    assert grown["loss of the number alone"] > alone["loss of the number alone"]
    untuned, kept, lost = (rows[f"yarn {name}"]["chats"]["1024"] for name in ("untuned", "cream+distillation", "cream"))
    plain, pose, *longer = (
        rows[f"yarn {name}"]["chats"]["1024"]
        for name in ("contiguous", "pose", "contiguous+128 steps", "cream+128 steps")
    )
    assert untuned < lost < min(plain, pose) and abs(longer[0] - longer[1]) < 0.05
    assert 0.2 < (lost - kept) / (lost - untuned) < 0.3 and "takes a quarter" in text
    after = {
        name: [rows[f"yarn {name}{more}"]["chats"]["1024"] for more in ("", "+128 steps", "+256 steps seed 2")]
        for name in ("cream", "contiguous")
    }
    told = "goes from {:.2f} to {:.2f} after 64 steps of CREAM, to {:.2f} after 128 and to {:.2f} after 256;"
    assert told.format(untuned, *after["cream"]) in text
    assert "after plain fine-tuning to {:.2f}, {:.2f} and {:.2f}.".format(*after["contiguous"]) in text
    least = rows["yarn pose+256 steps seed 2"]["chats"]["1024"]
    assert f"After 256 of PoSE it is {least:.2f}, the least." in text and least < min(one[-1] for one in after.values())
    told = "chats from {:.2f} to {:.2f} (plain {:.2f}, PoSE {:.2f})."
    assert told.format(untuned, *(one[-1] for one in after.values()), least) in front
    asked = [row["passkey"]["accuracy"] for row in summary["rows"] if "passkey" in row]
    assert len(asked) >= 3 and asked[0] == min(asked) and "Passkeys are found as before, or more often." in text
    costs = {length: one["alone_loss"] for (_, other, length), one in found.items() if other == "cream+distillation"}
    assert "costs 0.08 of loss at 1,024 tokens" in text and round(costs[1024]["difference"], 2) == -0.08
    likelier = found["yarn", "cream+distillation", 4096]["answer_loss"]
    assert f"has {costs[4096]['difference']:.2f} less, the likelier form {-likelier['difference']:.2f} more" in text
    settled = {length: cost["interval"][0] > 0 or cost["interval"][1] < 0 for length, cost in costs.items()}
    assert settled == {1024: True, 4096: True, 8192: False, 16_384: False}


def plan_of(name):
    return ROOT / f"recipes/llama-2-7b/results/plan-{name}.json"


def test_the_planned_figures_equal_what_plan_wrote():
    def without_context(name, *where):
        terms = json.loads(plan_of(name).read_text())
        for key in where:
            terms = terms[key]
        return terms["total"] - terms["cuda_context"]

    rows = {
        "| 7B, default | 8 GB": "7b-default",
        "| 7B, `memory: low` | 8 GB": "7b-low",
        "| 13B, default | 16 GB": "13b-default",
        "| 13B, `memory: low` | 12 GB": "13b-low",
    }
    text = page("recipes/llama-2-7b")
    for row, name in rows.items():
        assert f"{row} | {without_context(name, 'terms'):.2f} GiB |" in text
    held_out = [without_context(f"{size}-low", "validation") for size in ("7b", "13b")]
    told = "the held-out loss takes more than the step: {:.2f} GiB (7B) and {:.2f} GiB (13B)"
    assert told.format(*held_out) in " ".join(text.split())
    cards = {card["card"]: card["hours"] for card in json.loads(plan_of("7b-default").read_text())["cards"]}
    hours = [f"{least:.0f} to {most:.0f}" for least, most in (cards["RTX 4090 24GB"], cards["H100 80GB"])]
    told = "takes {} hours on an RTX 4090, {:.0f} on an A100 and {} on an H100"
    assert told.format(hours[0], cards["A100 80GB"][0], hours[1]) in text
    for cache, row in (("default", "16-bit cache | 24 GB"), ("quantized", "4-bit cache | 12 GB")):
        assert f"{row} | {without_context('7b-default', 'evaluation', 'terms', cache):.1f} GiB |" in text


def test_what_the_front_page_says_of_feeding_the_whole_target_equals_its_json():
    plans = [json.loads(plan_of(name).read_text()) for name in ("7b-default", "7b-32k-fed")]
    found = [fit["hours"] for plan in plans for fit in plan["cards"] if fit["card"] == "RTX 4090 24GB"]
    peaks = [f"{plan['terms']['total']:.1f} GiB and {hours[0]:.0f} to {hours[1]:.0f} hours"
             for plan, hours in zip(plans, found, strict=True)]  # fmt: skip
    text = " ".join(README.split())
    told = "take {} on an RTX 4090; with as many documents of 32,768 tokens fed whole they take {}"
    assert told.format(*peaks) in text
    reading = plans[0]["evaluation"]
    caches = [f"{reading['terms'][cache]['total']:.1f}" for cache in ("quantized", "default")]
    assert (
        "Reading 32,768 tokens back takes {} GiB with a 4-bit cache (`pip install hqq`), {} without".format(*caches)
        in text
    )
    assert reading["length"] == 32_768
    assert [plan["work"]["max_steps"] for plan in plans] == [1000, 1000]
    assert [plan["work"]["tokens_at_once"] for plan in plans] == [4096, 32_768]


def test_the_planned_peak_of_training_every_weight_equals_its_json():
    planned = json.loads(plan_of("7b-full").read_text())
    assert f"needs {planned['terms']['total']:.1f} GiB (planned" in " ".join(page("recipes").split())


def test_the_figures_of_the_demo_equal_their_json():
    demo = json.loads((TINY / "results/demo.json").read_text())
    assert len(demo["results"]) == 4
    for label, result in demo["results"].items():
        shares = " | ".join(
            f"{share:.2f}" for share in mean_by(Results.parse(result).of_task("new_skill"), "length").values()
        )
        assert f"| {label} | {shares} |\n" in README
    clone = json.loads((TINY / "results/fresh-clone.json").read_text())
    seconds = [round(clone[name]) for name in ("setup_seconds", "demo_seconds", "test_seconds")]
    told = "set-up took {} s, the demo {} s and `make test` {} s".format(*seconds)
    assert told in " ".join(README.split())


def test_when_not_to_train_quotes_the_results_that_it_links_to():
    text = page("recipes").split("## When not to train")[1].split("\n## ")[0]
    cpu = json.loads((SMOLLM2 / "results/cpu.json").read_text())["rows"]
    losses = {(row["scaling"], row["strategy"], row["seed"]): found["answer loss, middle"] for row in cpu
              if (found := row.get("multikey_needle at 16384"))}  # fmt: skip
    trained = [loss for (_, strategy, _), loss in losses.items() if strategy != "untuned"]
    assert (
        losses["yarn", "untuned", 0] < min(trained) and "YaRN alone had a lower loss than every trained model" in text
    )
    rows = json.loads((TINY / "results/reproduce.json").read_text())["rows"]
    for strategy, told in (("untuned", "answers {}"), ("contiguous", "window {}"), ("cream sigma=3", "after CREAM {}")):
        (row,) = (row for row in rows if (row["task"], row["scaling"], row["strategy"]) == ("recall", "yarn", strategy)
                  and row["documents"] == "window")  # fmt: skip
        assert told.format(f"{row['2048']['mean']:.3f}"[1:]) in " ".join(text.split())
    demo = json.loads((TINY / "results/demo.json").read_text())["results"]
    alone, taught = (mean_by(Results.parse(demo[label]).of_task("new_skill"), "length")[2048]
                     for label in ("RoPE scaling alone", "CREAM"))  # fmt: skip
    assert f"{alone:.2f}"[1:] + " right with scaling alone, " + f"{taught:.2f}"[1:] in text


@pytest.mark.parametrize("name", ["demo", "demo-seeds", "distillation"])
def test_the_comparisons_of_published_results_are_those_of_their_cells(name):
    content = json.loads((TINY / f"results/{name}.json").read_text())
    results = {label: Results.parse(one) for label, one in content["results"].items()}
    assert json.loads(json.dumps(comparisons(results))) == content["comparisons"] != []


def test_the_figures_of_ten_seeds_equal_their_json():
    found = json.loads((TINY / "results/demo-seeds.json").read_text())["results"]
    assert len(found) == 20
    for name, row in (("contiguous", "plain fine-tune"), ("cream", "CREAM")):
        means = [
            mean_by(Results.parse(result).of_task("new_skill"), "length")
            for label, result in found.items()
            if label.startswith(f"{name}-")
        ]
        shares = [[at[length] for at in means] for length in (256, 2048)]
        told = [f"{min(share):.2f} to {max(share):.2f}" for share in shares]
        assert len(means) == 10 and f"| {row} | {' | '.join(told)} |\n" in page("recipes/cream-peft-tiny")
        assert told[1] in README


def test_the_figures_of_distillation_equal_their_json_and_its_cost_the_plan():
    found = json.loads((TINY / "results/distillation.json").read_text())["results"]
    assert len(found) == 5
    text = page("recipes")
    for name, row in (("base", "base"), ("weight-0-", "no distillation"), ("weight-1-", "`distillation_weight: 1`")):
        results = [Results.parse(result) for label, result in found.items() if label.startswith(name)]
        shares = [
            [f"{mean_by(result.of_task(task), 'length')[length]:.2f}" for result in results]
            for task in ("recall", "new_skill")
            for length in (256, 2048)
        ]
        told = " | ".join(" to ".join(dict.fromkeys([min(share), max(share)])) for share in shares)
        assert f"| {row} | {told} |\n" in text
    config = embedded_config("meta-llama/Llama-2-7b-hf")
    for length, told in ((1024, "1.31 times the operations"), (4096, "2.32 times at all of it")):
        flops = training_flops(config, Training(context_length=4096, distillation_length=length, lora_dropout=0.0))
        whole = sum(flops.values())
        assert told.startswith(f"{whole / (whole - flops['distillation']):.2f} times") and told in text


def test_the_figures_of_speed_equal_their_json():
    text, bench = page("recipes/cream-peft-tiny"), json.loads((TINY / "results/bench-cpu.json").read_text())
    ratio, times = bench["trainer"]["ratio_of_medians"], bench["answers"]["one document"]["median_times_faster"]
    assert f"takes {ratio:.2f} times as long" in text
    first = [bench["trainer"][f"ratio_when_{name}_trainer_goes_first"] for name in ("cream", "sft")]
    assert "({:.2f} and {:.2f}, ".format(*first) in text and f"median of {bench['trainer']['steps']} steps" in text
    assert f"{bench['sampler']['median_times_faster']:.0f} times faster than the authors'" in text
    assert f"2,048 tokens {times:.1f} times as fast" in text


def test_the_figures_of_merging_and_of_llama_cpp_equal_their_json():
    text = page("cream_peft/publish")
    plain, small = json.loads((ROOT / "tests/measured/merge.json").read_text())["runs"]
    rows = {"`cream-peft merge`": plain["merge_adapter"], "PEFT's `merge_and_unload`": plain["merge_and_unload"]}
    rows["`cream-peft merge --max_shard_size 250MB`"] = small["merge_adapter"]
    for label, run in rows.items():
        told = re.search(rf"^\| {re.escape(label)} \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE).groups()
        assert [float(value) for value in told] == pytest.approx(
            [run["peak_gib"], run["peak_anonymous_gib"]], abs=0.0051
        )
    assert f"a model of {plain['model_gib']:.2f} GiB" in text
    assert f"anonymous memory {plain['merge_adapter']['start_anonymous_gib']:.2f} GiB are the imports" in text
    gguf = json.loads((ROOT / "tests/measured/gguf.json").read_text())
    # Those with a note are files of fewer bits, and controls.
    runs = [run for run in gguf["runs"].values() if "note" not in run]
    assert len(runs) >= 6
    pairs = [(run["llama_cpp_beyond_window"]["mean"], run["control_beyond_window"]["mean"]) for run in runs]
    largest = max(ours for ours, _ in pairs)
    assert largest <= float(re.search(r"within ([\d.]+) nats", text)[1]) <= largest + 1e-5
    assert min(control / ours for ours, control in pairs) > 4000 and "over 4,000 times nearer" in text
    assert gguf["versions"]["llama.cpp"].split()[0] in text
    lora = json.loads((ROOT / "tests/measured/gguf-lora.json").read_text())
    assert len(lora["runs"]) == 7 and all(run["agrees"] for run in lora["runs"].values())
    assert all(run["n_ctx_train"] == run["target"] for run in lora["runs"].values())
    real, runs = lora["runs"].pop("smollm2-yarn"), lora["runs"].values()
    largest = max(run["beyond_window"]["mean"] for run in runs)
    least = min(one["mean"] for run in runs for one in run["controls_beyond_window"].values())
    told, control = map(
        float, re.search(r"at most ([\d.]+) nats from.*?, and ([\d.]+) or more", text, re.DOTALL).groups()
    )
    assert largest <= told <= largest + 1e-5 and control <= least <= control + 0.01
    found = (real["within_window"]["mean"], min(one["mean"] for one in real["controls_within_window"].values()))
    assert f"within its window: {found[0]:.5f}, and {found[1] - 0.005:.2f} or more" in text
    assert lora["versions"]["llama.cpp"].split()[0] in text


def test_every_test_that_tests_readme_names_is_there():
    text, tests = (ROOT / "tests/README.md").read_text(encoding="utf-8"), ROOT / "tests"
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) >= 80
    for file, name in named:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), f"{file}::{name}"
