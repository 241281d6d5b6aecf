"""Known answers for what is measured, and the way of the demo: train, evaluate, plot."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cream_peft
from cream_peft import cli
from cream_peft.evals import models, run
from cream_peft.evals.models import ModelSpec, OpenedModel, open_models
from cream_peft.evals.plots import plot_results
from cream_peft.evals.prompts import TaskError
from cream_peft.evals.results import Cell, Results, Settings, comparisons, effective_lengths, mean_by
from cream_peft.evals.run import evaluate
from cream_peft.evals.table import table_of
from cream_peft.evals.tasks import TASKS
from cream_peft.model import base
from cream_peft.model.adapter import load_adapter
from cream_peft.model.base import load_base
from cream_peft.model.kv_cache import PREFILL_CHUNK
from cream_peft.model.record import Record
from cream_peft.plan import fit
from cream_peft.plan.memory import Reading
from cream_peft.tiny import TINY_ID, documents

EVALS = Path(models.__file__).parent


class Oracle:
    """Stands in for the embedded model's answers: right where `knows` says so of the depth."""

    def __init__(self, monkeypatch, knows):
        depth = np.linspace(0, 0.999, 500)
        answers = {"depth": depth, "correct": np.array([knows(d) for d in depth])}
        monkeypatch.setattr(documents, "evaluate_recall", lambda *arguments, **options: answers)
        self.config = type("Config", (), {"vocab_size": 385})


@pytest.mark.parametrize(
    "knows, expected",
    [
        (lambda depth: True, [1.0] * 10),
        (lambda depth: False, [0.0] * 10),
        (lambda depth: depth < 0.1 or depth >= 0.9, [1.0] + [0.0] * 8 + [1.0]),
    ],
    ids=["always right", "always wrong", "only at the ends"],
)
def test_recall_by_depth_has_the_known_answer(monkeypatch, knows, expected):
    cells = list(TASKS["recall"](Oracle(monkeypatch, knows), None, 512, 8, 0))
    assert [cell["value"] for cell in cells] == expected
    assert [cell["depth"] for cell in cells] == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert sum(cell["samples"] for cell in cells) == 500


def test_recall_is_refused_for_a_model_of_another_vocabulary(monkeypatch):
    oracle = Oracle(monkeypatch, lambda depth: True)
    oracle.config.vocab_size = 32_000
    with pytest.raises(ValueError, match="embedded model's 385 tokens; this model has 32000"):
        list(TASKS["recall"](oracle, None, 512, 8, 0))


def test_means_weigh_cells_by_their_samples():
    cells = [Cell("t", 10, 0.5, "accuracy", value, samples) for value, samples in ((1.0, 1), (0.0, 3))]
    assert mean_by(cells, "length") == {10: 0.25}


def test_a_model_is_read_from_the_command_line(tmp_path, monkeypatch):
    assert ModelSpec.parse("a/b") == ModelSpec("b", "a/b", None)
    assert ModelSpec.parse("my label=a/b+yarn") == ModelSpec("my label", "a/b", "yarn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run+1").mkdir()
    assert ModelSpec.parse("run+1").name == "run+1"
    (tmp_path / "lr=1e-4" / "run").mkdir(parents=True)
    for text, label in (("lr=1e-4/run", "run"), ("m=lr=1e-4/run", "m"), ("a=b=lr=1e-4/run+ntk", "a=b")):
        scaling = "ntk" if "+" in text else None
        assert ModelSpec.parse(text) == ModelSpec(label, "lr=1e-4/run", scaling)
    with pytest.raises(ValueError, match="unknown RoPE scaling 'dynamic'"):
        ModelSpec.parse("a/b+dynamic")


def test_a_base_beside_adapters_is_scaled_as_far_as_they_are(monkeypatch, caplog):
    trained, read = {"short": 512, "alike": 512, "long": 1024}, []
    open_model = models.open_model

    def opened(spec, load_in_4bit, base_model, dtype):
        read.append(spec.name)
        found = open_model(ModelSpec(spec.label, TINY_ID, spec.rope_scaling_type), load_in_4bit)
        target = trained.get(spec.name)
        return dataclasses.replace(found, settings=dataclasses.replace(found.settings, target_length=target))

    monkeypatch.setattr(models, "open_model", opened)

    def target(*compared, **options):
        return open_models(["BASE+ntk", *compared], **options)[0].settings.target_length

    assert target("short", "alike") == 512
    assert read == ["BASE", "short", "alike"]  # each once
    assert not caplog.records
    assert target("short", "long") == target() == 8 * 256
    assert [one.getMessage() for one in caplog.records] == [
        "BASE+ntk is scaled for 2,048 tokens, the adapters for 512, 1,024: see --target_length"
    ]
    assert target("short", target_length=1024) == 1024
    (unscaled, _) = open_models(["BASE", "short"], within_window=True)
    assert unscaled.settings.target_length == 256


def test_the_demos_way_leaves_an_adapter_results_a_table_and_a_picture(tmp_path, capsys, monkeypatch):
    adapter, results = tmp_path / "adapter", tmp_path / "results"
    train = ["train", "--max_steps", "2", "--output_dir", str(adapter), "--json", str(tmp_path / "t.json")]
    assert cli.main(train) == 0
    assert json.loads((tmp_path / "t.json").read_text())["steps"] == 2
    evaluate = ["evaluate", "--adapter", "base=cream-peft-tiny", "scaled=cream-peft-tiny+ntk", f"tuned={adapter}",
                "--tasks", "recall", "kv_retrieval", "--lengths", "256", "512", "--samples", "4",
                "--output_dir", str(results)]  # fmt: skip
    assert cli.main([*evaluate, "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    for line in ("The adapter is in", "kv_retrieval: share of right answers by length in tokens", "The results are in"):
        assert line in printed
    (row,) = (line.split() for line in printed.split("recall: ")[1].splitlines() if line.split()[:1] == ["base"])
    assert float(row[1]) > 0.9 > float(row[2])
    assert (
        "At 512 tokens tuned answers " in printed
        and "At least 85% is right up to this many tokens: base 256, " in printed
    )
    assert "p by McNemar" not in printed
    found = Results.read(results / "tuned.json")
    assert found.model == "cream-peft-tiny" and found.adapter == "adapter" and found.seed == 1000
    content = json.loads((results / "tuned.json").read_text())
    assert str(tmp_path) not in (results / "tuned.json").read_text() and content["format"] == 2
    assert {cell.length for cell in found.cells} == {256, 512}
    assert {"task", "length", "depth", "metric", "value", "samples", "seconds"} <= set(content["cells"][0])
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["results"]["tuned"] == content
    assert {(row["model"], row["against"]) for row in table["comparisons"]} == {("scaled", "base"), ("tuned", "base")}
    inside = mean_by(Results.read(results / "base.json").of_task("recall"), "length")
    assert inside[256] > 0.9 > inside[512]

    picture = tmp_path / "picture.png"
    assert cli.main(["plot", str(results / "base.json"), str(results / "tuned.json"), "--output", str(picture)]) == 0
    picture = tmp_path / "picture-recall.png"
    assert (tmp_path / "picture-kv_retrieval.png").exists()
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 200_000
    (svg,) = plot_results({"tuned": found}, tmp_path / "picture.svg", task="recall")
    assert "<svg" in svg.read_text()
    written = (results / "tuned.json").stat().st_mtime_ns
    monkeypatch.setattr(documents, "evaluate_recall", None)
    assert cli.main([*evaluate, "--details"]) == 0  # nothing is measured twice
    assert "p by McNemar" in capsys.readouterr().out
    assert (results / "tuned.json").stat().st_mtime_ns == written


def results_of(label, correct, target=2048, **settings):
    """Results of one task at one length and two depths; `correct` is a text of 0 and 1 for each depth."""
    cells = [
        Cell("needle", 1024, depth, "accuracy", one.count("1") / len(one), len(one), correct=one)
        for depth, one in zip((0.0, 1.0), correct, strict=True)
    ]
    return Results("m", None, {}, 0, Settings(label=label, target_length=target, **settings), cells)


def rows_of(text, first):
    """The cells of the table whose first column is headed `first`, by their rows' names."""
    lines = text[text.index(f"  {first} ") :].split("\n\n")[0].splitlines()
    return [re.split("  +", line.strip()) for line in (lines[0], *lines[2:])]


def test_the_table_says_which_differences_are_chance_and_how_far_a_model_is_of_use():
    results = {
        "base": results_of("base", ("0" * 20, "1" * 10 + "0" * 10)),
        "better": results_of("better", ("1" * 20, "1" * 20)),
        "same": results_of("same", ("0" * 20, "1" * 12 + "0" * 8)),
    }
    text = table_of(results, threshold=0.8)
    assert rows_of(text, "model") == [["model", "1,024"], ["base", "0.25"], ["better", "1.00"], ["same", "0.30"]]
    # Beside the best of the others, not the first: that one is beaten by scaling alone.
    assert "At 1,024 tokens same answers 30% right, the best of the others, better, 100%; " in text
    assert "better, 100%; over 40 questions the difference is not chance (p < 0.001)." in text
    pair = table_of({label: results[label] for label in ("base", "same")})
    assert (
        "At 1,024 tokens same answers 30% right, base 25%; over 40 questions the difference may be chance (p = 0.500)."
        in pair
    )
    reached = "At least 80% is right up to this many tokens: base none, better 1,024 (the longest asked), same none."
    assert reached in text and "loss" not in text and "p by McNemar" not in text
    two = table_of({label: results[label] for label in ("base", "better")})
    assert "better answers 100% right, base 25%; over 40 questions the difference is not chance (p < 0.001)." in two
    # Of what is asked beyond the length that the last model was trained for the sentence says nothing.
    for label, right in (("base", "0" * 20), ("same", "1" * 20)):
        results[label].cells += [
            dataclasses.replace(cell, length=4096, correct=right, value=float(right[0]))
            for cell in results[label].cells
        ]
    beyond = table_of({label: results[label] for label in ("base", "same")})
    assert "4,096" in beyond and "At 1,024 tokens same answers 30% right, base 25%" in beyond
    # A base as it is claims its window, a scaled one the length that it is scaled to.
    for scaling, claimed in ((None, 512), ("ntk", 2048)):
        changes = {"pretrained_window": 512, "rope_scaling_type": scaling}
        results["base"].settings = dataclasses.replace(results["base"].settings, **changes)
        assert effective_lengths(results, 0.8)[0]["target_length"] == claimed


def test_the_details_have_intervals_depths_and_the_loss_of_the_right_answers():
    results = {
        "base": results_of("base", ("0" * 20, "1" * 10 + "0" * 10)),
        "same": results_of("same", ("0" * 20, "1" * 12 + "0" * 8)),
        "better": results_of("better", ("1" * 20, "1" * 20)),
    }
    assert [found["noise"] for found in comparisons(results)] == [True, False]
    for label, losses in (("base", [1.0, 2.0] * 10), ("same", [0.5, 1.4] * 10)):
        cells = [dataclasses.replace(cell, answer_loss=losses) for cell in results[label].cells]
        results[label] = dataclasses.replace(results[label], cells=cells)
    head, *rows = rows_of(table_of(results, details=True).split("\n\n", 3)[3], "model")
    assert head == ["model", "length", "all", "95 %", "loss", "difference", "p", "of the loss (95 %)", "0%", "100%"]
    assert rows == [
        # 10 of 40 right: Wilson's interval. The third model has no loss.
        ["base", "1,024", "0.25", "0.14-0.40", "1.50", "-", "-", "-", "0.00", "0.50"],
        ["same", "1,024", "0.30", "0.18-0.45", "0.95", "+0.05", "= 0.500", "-0.55 (-0.57 to -0.53)", "0.00", "0.60"],
        ["better", "1,024", "1.00", "0.91-1.00", "-", "+0.75", "< 0.001", "-", "1.00", "1.00"],
    ]


def test_perplexities_are_compared_in_words():
    cells = [Cell("perplexity", 512, 1.0, "perplexity", value, 100) for value in (120.0, 7.5)]
    both = {name: Results("m", None, {}, 0, Settings(), [cell]) for name, cell in zip("ab", cells, strict=True)}
    text = table_of(both)
    assert "perplexity: perplexity per token (lower is better) by length in tokens" in text
    assert "At 512 tokens b has a perplexity of 7.50, a of 120.00." in text and "is right" not in text


def test_a_run_that_stops_anywhere_loses_one_cell_at_most(tmp_path):
    asked = []

    def task(model, tokenizer, length, samples, seed, done=()):
        for depth in (0.0, 0.5, 1.0):
            if depth not in done:
                asked.append((length, depth))
                if len(asked) == 5:
                    raise KeyboardInterrupt
                yield {"depth": depth, "metric": "accuracy", "value": 1.0, "samples": samples}

    def run():
        results = Results("m", None, {}, 0, Settings(label="m"))
        return evaluate(None, None, {"task": task}, results, tmp_path / "m.json", lengths=[10, 20], samples=1)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(Results.read(tmp_path / "m.json").cells) == 4
    assert [(cell.length, cell.depth) for cell in run().cells] == [
        (length, depth) for length in (10, 20) for depth in (0.0, 0.5, 1.0)
    ]
    assert len(asked) == 7  # the one that was cut off is the only one measured again


@pytest.mark.parametrize("disabled", [True, False])
def test_without_a_progress_bar_a_line_says_how_far_an_evaluation_is(monkeypatch, caplog, disabled):
    monkeypatch.setattr(run, "tqdm", partial(run.tqdm, disable=disabled))
    tasks = {name: lambda *place, done: () for name in ("needle", "passkey")}
    with caplog.at_level("INFO", "cream_peft"):
        evaluate(None, None, tasks, Results("m", None, {}, 0, Settings()), None, lengths=[10, 2000], samples=1)
    lines = [f"m: {task} at {length} tokens took 0 s" for task in tasks for length in ("10", "2,000")]
    assert caplog.messages == lines * disabled


def test_other_tasks_are_added_and_other_settings_are_refused(tmp_path, capsys):
    def evaluate(*arguments):
        common = ["--compare", "m=cream-peft-tiny", "--lengths", "256", "--output_dir", str(tmp_path)]
        return cli.main(["evaluate", *common, *arguments])

    assert evaluate("--tasks", "kv_retrieval", "--samples", "2") == 0
    first = Results.read(tmp_path / "m.json")
    assert evaluate("--tasks", "needle", "--samples", "2", "--depths", "0.5") == 0
    both = Results.read(tmp_path / "m.json")
    assert both.cells[: len(first.cells)] == first.cells and both.cells[-1].task == "needle"
    assert set(both.settings.options) == {"kv_retrieval", "needle"}
    for arguments, said in (
        (["--tasks", "needle", "--samples", "3", "--depths", "0.5"], "other settings, samples (2, now 3)"),
        (["--tasks", "needle", "--samples", "2"], "other settings, depths of needle"),
        (["--tasks", "needle", "--samples", "2", "--seed", "7"], "other settings, seed (1000, now 7)"),
    ):
        assert evaluate(*arguments) == 2
        assert said in capsys.readouterr().err
        assert Results.read(tmp_path / "m.json") == both


def test_overwriting_a_task_keeps_the_others_or_says_that_they_go(tmp_path, caplog):
    def evaluated(*arguments):
        common = ["--compare", "m=cream-peft-tiny", "--lengths", "256", "--output_dir", str(tmp_path)]
        assert cli.main(["evaluate", *common, *arguments, "--samples", "1"]) == 0
        return Results.read(tmp_path / "m.json").cells

    recall = evaluated("--tasks", "recall")
    evaluated("--tasks", "needle", "--depths", "0.5")
    cells = evaluated("--tasks", "needle", "--depths", "0", "--overwrite")
    assert cells[:-1] == recall and cells[-1].depth == 0 and not caplog.records
    cells = evaluated("--tasks", "needle", "--depths", "0", "--seed", "7", "--overwrite")
    assert {cell.task for cell in cells} == {"needle"}
    assert caplog.messages == [
        f"{tmp_path / 'm.json'}: recall is deleted too, it was measured with other settings, seed (1000, now 7)"
    ]


def test_what_is_too_short_for_a_task_is_refused_before_longer_prompts_are_asked(tmp_path, capsys):
    common = ["--compare", "m=cream-peft-tiny", "--samples", "1", "--output_dir", str(tmp_path)]
    assert cli.main(["evaluate", *common, "--tasks", "needle", "--lengths", "512", "2"]) == 2
    assert "error: m, needle: length 2 is too short" in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_what_is_too_short_for_a_task_is_refused_before_other_tasks_and_models_are_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readable("model")
    (tmp_path / "short.txt").write_text("too short")
    loaded = []
    monkeypatch.setattr(OpenedModel, "load", loaded.append)
    common = ["evaluate", "--compare", "m=./model", "n=./model", "--no_4bit", "--output_dir", str(tmp_path / "results")]
    for tasks, lengths, said in (
        (["passkey", "common_words"], ["900"], "m, common_words: length 900 is too short for 1 word: they take"),
        (["passkey", "kv_retrieval", "--keys", "75"], ["9999", "900"], "kv_retrieval: length 900 is too short for 75"),
        (["passkey", "perplexity", "--text", "short.txt"], ["900"], "perplexity: length 900 is more than the text"),
    ):
        assert cli.main([*common, "--lengths", *lengths, "--tasks", *tasks]) == 2
        assert said in capsys.readouterr().err and not loaded
    model, tokenizer = load_base("./model", load_in_4bit=False), AutoTokenizer.from_pretrained("./model")
    monkeypatch.setattr(model, "forward", loaded.append)
    with pytest.raises(TaskError, match="common_words: length 900 is too short"):
        cream_peft.evaluate(model, tokenizer, ["passkey", "common_words"], 900)
    assert not loaded


def test_a_model_that_was_trained_on_16_bits_is_said_to_be_measured_in_4(adapter, caplog):
    for in_4bit, said in ((True, 1), (False, 0)):
        dataclasses.replace(Record.read(adapter, ""), load_in_4bit=False).write(adapter)
        caplog.clear()
        open_models([f"m={adapter}"], load_in_4bit=in_4bit)
        assert len([one for one in caplog.messages if "m was trained on a base of 16 bits" in one]) == said
    dataclasses.replace(Record.read(adapter, ""), load_in_4bit=True).write(adapter)
    open_models([f"m={adapter}"])
    assert not caplog.messages


def test_prompts_are_written_out_byte_identical_and_nothing_is_measured(tmp_path, capsys):
    command = ["evaluate", "--tasks", "kv_retrieval", "needle", "--lengths", "256", "--samples", "2", "--dump_prompts"]
    for name in ("one", "two"):
        assert cli.main([*command, str(tmp_path / name), "--output_dir", str(tmp_path / "results")]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["cream-peft-tiny-kv_retrieval-256.jsonl", "cream-peft-tiny-needle-256.jsonl"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() != b""
    assert "nothing was measured" in capsys.readouterr().out and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "needle", "--keys", "75"], "--keys is for kv_retrieval, and --tasks has needle"),
        (["--tasks", "perplexity"], "task perplexity has no text"),
        (["--tasks", "passkey"], "cream-peft-tiny reads no text, which passkey is"),
        (
            ["--tasks", "kv_retrieval", "--query_aware"],
            "in the embedded model's vocabulary this task has no query_aware",
        ),
        (["--tasks", "needle", "--query_aware"], "--query_aware is for kv_retrieval, and --tasks has needle"),
        (["--threshold", "85"], "--threshold 85 must lie above 0 and not above 1"),
        (["--threshold", "0"], "--threshold 0 must lie above 0"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--tasks", "perplexity", "--text", "absent.txt"], "--text absent.txt: no such file or folder"),
        (["--tasks", "kv_retrieval", "--lengths", "8"], "length 8 is too short"),
        (["--tasks", "longchat_lines", "--lengths", "512"], "reads no text"),
        (["--tasks", "needle", "--depths", "2"], "--depths 2 must lie between 0 (start) and 1 (end)"),
        (["--tasks", "needle", "--kv_cache", "offloaded"], "invalid choice: 'offloaded'"),
        (["--dump_prompts", "out", "--tasks", "recall"], "task recall has no prompts"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and said in line


def readable(folder):
    """A model of few letters, a token each, and a window of 64 tokens."""
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=64)
    ).save_pretrained(folder)  # fmt: skip
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def test_perplexity_takes_texts_of_a_data_set_as_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readable("model")
    text = "the quick brown fox jumps over the lazy dog " * 5
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": text}) + "\n")
    values = []
    for source in ("a.txt", "a.jsonl"):
        command = ["evaluate", "--compare", "./model", "--no_4bit", "--tasks", "perplexity", "--text", source]
        assert cli.main([*command, "--lengths", "32", "64", "--output_dir", source[2:]]) == 0
        found = Results.read(tmp_path / source[2:] / "model.json")
        values.append([cell.value for cell in found.cells])
        assert found.settings.options["perplexity"]["text"] == source
    assert values[0] == values[1] and len(values[0]) == 2
    command[-1] = "b.jsonl"
    assert cli.main([*command, "--lengths", "32", "--output_dir", "b"]) == 2
    assert "--text b.jsonl has no column text" in capsys.readouterr().err
    for name in ("c.txt", "c.jsonl"):
        (tmp_path / name).write_bytes('{"text": "café"}\n'.encode("latin-1"))
        command[-1] = name
        assert cli.main([*command, "--lengths", "32", "--output_dir", "c"]) == 2
        assert f"error: --text: {name} is no" in capsys.readouterr().err


def test_documents_of_perplexity_that_samples_leave_out_are_said(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    readable("model")
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    command = ["evaluate", "--compare", "./model", "--no_4bit", "--tasks", "perplexity", "--text", "texts"]
    said = ["perplexity reads 2 of 3 documents, drawn with the seed: --samples sets how many"]
    for samples, expected in (("3", []), ("2", said)):
        options = ["--samples", samples, "--lengths", "32", "64", "--output_dir", samples]
        assert cli.main([*command, *options]) == 0
        assert [one for one in caplog.messages if "documents" in one] == expected


@pytest.mark.parametrize("name", [TINY_ID, "adapter"])
def test_models_are_measured_in_the_precision_that_is_asked_for(name, request, tmp_path, monkeypatch, capsys):
    name = str(request.getfixturevalue("adapter")) if name == "adapter" else name
    loaded, load = [], OpenedModel.load

    def watched(opened):
        model, tokenizer = load(opened)
        loaded.append(model.get_input_embeddings().weight.dtype)
        return model, tokenizer

    monkeypatch.setattr(OpenedModel, "load", watched)
    command = ["evaluate", "--compare", f"m={name}", "--no_4bit", "--tasks", "kv_retrieval", "--samples", "1"]
    command += ["--lengths", "256", "--output_dir", str(tmp_path)]
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    assert Results.read(tmp_path / "m.json").settings.dtype == "bfloat16"
    # What was answered in another one is not mixed in.
    assert cli.main(command) == 2 and "dtype" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert loaded == [torch.bfloat16, torch.float32]


def test_python_gets_the_commands_measurement_as_rows(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks, asked = ["kv_retrieval", "recall"], {"samples": 2, "seed": 5}
    model = load_base(TINY_ID).train()
    rows = cream_peft.evaluate(model, tiny_tokenizer, tasks, [256, 512], depths=[0.0, 1.0], **asked)
    assert model.training and not list(tmp_path.iterdir())  # as it was, and nothing is written
    command = ["evaluate", "--tasks", *tasks, "--lengths", "256", "512", "--depths", "0", "1", "--samples", "2"]
    assert cli.main([*command, "--seed", "5", "--output_dir", "out"]) == 0
    cells = Results.read(tmp_path / "out" / "cream-peft-tiny.json").cells
    assert len(rows) == len(cells) > 20
    for row, cell in zip(rows, cells, strict=True):
        kept = {key: value for key, value in row.items() if key not in ("answer_loss", "seconds")}
        assert kept.items() <= dataclasses.asdict(cell).items()
        assert ("answer_loss" in row) == (row["task"] == "kv_retrieval")
        assert row.get("answer_loss", 0.0) == pytest.approx(np.mean(cell.answer_loss or [0.0]))
    table = pandas.DataFrame(rows).pivot_table("value", "task", "length")
    assert table.loc["recall", 256] > 0.9 and set(table.columns) == {256, 512}
    with pytest.raises(ValueError, match=r"unknown option keyss: use one of chunk_length, depths, .*keys, .*samples"):
        cream_peft.evaluate(model, tiny_tokenizer, "needle", [256], keyss=3)
    (row,) = cream_peft.evaluate(model, tiny_tokenizer, "kv_retrieval", 256, samples=1, depths=[0.0])
    assert row["length"] == 256
    with pytest.raises(ValueError, match="reads no text, which passkey is"):
        cream_peft.evaluate(model, tiny_tokenizer, ["passkey"], [256])


def test_an_adapter_that_is_asked_beyond_its_length_is_said_to_be(adapter, caplog):
    model, tokenizer = load_adapter(adapter)
    for length, is_beyond in ((2048, False), (2304, True)):
        caplog.clear()
        cream_peft.evaluate(model, tokenizer, "kv_retrieval", length, samples=1, depths=[0.5])
        assert ("the adapter is asked at 2,304 tokens, and was trained for 2,048" in caplog.text) == is_beyond


def test_the_pages_python_runs(adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    adapter.rename(tmp_path / "runs/mine")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", (EVALS / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(program.replace("samples=32", "samples=1"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["length", "1024", "2048"]
    assert [line.split()[0] for line in lines[-2:]] == ["kv_retrieval", "needle"]


def test_the_kv_cache_is_chosen_by_what_the_gpu_has_free(monkeypatch):
    llama = base.embedded_config("meta-llama/Llama-2-7b-hf")
    assert fit.fitting_kv_cache(llama, Reading(length=32_768)) == "default"  # a CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(fit, "is_hqq_available", lambda: True)
    for free, kind in ((24, "default"), (12, "quantized"), (1, "quantized")):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: (free * 2**30, 80 * 2**30))
        assert fit.fitting_kv_cache(llama, Reading(length=32_768)) == kind
    # What is read at once counts too.
    for chunk, kind in ((512, "default"), (65_536, "quantized")):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (17 * 2**30, 80 * 2**30))
        assert fit.fitting_kv_cache(llama, Reading(length=32_768, chunk_length=chunk)) == kind
    # What an earlier model left to torch's allocator is free.
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 22 * 2**30)
    for allocated, kind in ((4, "default"), (22, "quantized")):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**30, 24 * 2**30))
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda allocated=allocated: allocated * 2**30)
        assert fit.fitting_kv_cache(llama, Reading(length=32_768)) == kind
    monkeypatch.setattr(fit, "is_hqq_available", lambda: False)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (12 * 2**30, 80 * 2**30))
    assert fit.fitting_kv_cache(llama, Reading(length=32_768)) == "default"  # nothing else can be had


def test_the_kv_cache_is_chosen_for_the_chunks_that_are_read(tiny_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("cream_peft.evals.run.fitting_kv_cache", lambda _, reading: seen.append(reading) or "default")
    for options in ({"chunk_length": 64}, {}):
        cream_peft.evaluate(load_base(TINY_ID), tiny_tokenizer, "kv_retrieval", 256, samples=1, depths=[0.0], **options)
    assert [(one.length, one.chunk_length) for one in seen] == [(256, 64), (256, PREFILL_CHUNK)]


def test_models_that_were_read_into_different_caches_are_told_apart(tmp_path, monkeypatch, caplog):
    pytest.importorskip("hqq")
    words = ["evaluate", "--tasks", "kv_retrieval", "--lengths", "256", "--samples", "1", "--depths", "0", "--no_4bit"]
    words += ["--compare", "a=cream-peft-tiny", "b=cream-peft-tiny+ntk", "--output_dir"]
    for number, kinds in enumerate((("default", "default"), ("default", "quantized"))):
        chosen = iter(kinds)
        monkeypatch.setattr("cream_peft.evals.run.fitting_kv_cache", lambda *_, chosen=chosen: next(chosen))
        caplog.clear()
        assert cli.main([*words, str(tmp_path / str(number))]) == 0
        said = [line for line in caplog.messages if "KV caches" in line]
        assert len(said) == number
    assert "(a: default, b: quantized)" in said[0]


def test_the_papers_table_has_its_source_and_its_means(capsys):
    assert cli.main(["evaluate", "--paper"]) == 0
    said = capsys.readouterr().out
    assert "arXiv 2406.07138" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("cream-yarn"))
    assert row == ["cream-yarn", "0.734", "0.452"]
    assert cli.main(["evaluate", "--paper", "--compare=no/such/folder"]) == 2  # it goes on


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "lora_B is zero"), (float("nan"), "not finite"), (2.0, "other weights")]
)
def test_an_adapter_that_is_damaged_or_never_trained_is_not_measured(adapter, value, said):
    file = adapter / "adapter_model.safetensors"
    weights = {name: torch.full_like(t, value) if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"is not measured: .*{said}"):
        open_models([str(adapter)])
