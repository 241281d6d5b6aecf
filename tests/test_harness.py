"""lm-eval itself, on tasks made here: documents of the embedded model's recall, whose answers it knows."""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml

from cream_peft import CREAMTrainer, cli, load_adapter, rope
from cream_peft.errors import explain
from cream_peft.evals import harness
from cream_peft.evals.harness import HarnessError, run_harness, table_of_harness
from cream_peft.model.base import load_base
from cream_peft.tiny import TINY_ID, base_folder
from cream_peft.tiny.documents import FIRST_VALUE, VOCABULARY_SIZE, evaluation_document

tasks = pytest.importorskip("lm_eval.tasks")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
make_table = pytest.importorskip("lm_eval.utils").make_table

WINDOW, TARGET, DOCUMENTS = 256, 2048, 12
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{choices.index(answer)}}",
}
ANSWER = {"output_type": "generate_until", "doc_to_target": "{{answer}}"}
ANSWER["generation_kwargs"] = {"max_gen_toks": 1, "until": [], "do_sample": False}


def recall_rows(tokenizer, num_tokens):
    """Documents that end with the key they ask for, its value, and eight values to choose from."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(DOCUMENTS):
        ids, positions, answers, _ = evaluation_document(rng, num_tokens)
        choices = set(rng.permutation(np.arange(FIRST_VALUE, VOCABULARY_SIZE))[:8]) | {answers[-1]}
        words = [tokenizer.decode([token]) for token in sorted(choices)]
        text, answer = tokenizer.decode(ids[: positions[-1] + 1]), tokenizer.decode([answers[-1]])
        rows.append({"text": text, "answer": answer, "choices": words})
    return rows


@pytest.fixture
def ask(tmp_path, monkeypatch, tiny_tokenizer):
    """run_harness with the tasks choice_<tokens> and answer_<tokens>, and the HFLM objects that lm-eval ran."""
    # lm-eval's own 14,000 tasks take ten seconds to list.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for length in (WINDOW, TARGET):
        data = tmp_path / f"{length}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in recall_rows(tiny_tokenizer, length)))
        shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
        shared["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        for name, settings, metric in [("choice", CHOICE, "acc"), ("answer", ANSWER, "exact_match")]:
            task = {"task": f"{name}_{length}", **shared, **settings, "metric_list": [{"metric": metric}]}
            (folder / f"{name}_{length}.yaml").write_text(yaml.safe_dump(task))
    used = []

    class Kept(huggingface.HFLM):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.fed = []
            used.append(self)

        def _model_call(self, inps, *arguments):
            self.fed += inps.tolist()
            return super()._model_call(inps, *arguments)

        def _model_generate(self, context, *arguments, **options):
            self.fed += context.tolist()
            return super()._model_generate(context, *arguments, **options)

    monkeypatch.setattr(huggingface, "HFLM", Kept)

    def run(model, *names, tokenizer=tiny_tokenizer, **options):
        return run_harness(model, tokenizer, list(names), include_path=folder, **options)

    run.used, run.folder = used, folder
    return run


@pytest.fixture
def adapter(tmp_path, make_documents, make_config, lora, tiny_tokenizer):
    """An adapter that one small step left, on the 4-bit base that YaRN scales to the target."""
    lengths = {"context_length": WINDOW, "target_length": TARGET}
    trainer = CREAMTrainer(
        model=load_base(TINY_ID),
        args=make_config(**lengths, rope_scaling_type="yarn", learning_rate=1e-5, max_steps=1),
        train_dataset=make_documents(4, tokens=WINDOW),
        processing_class=tiny_tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def tiny(**options):
    return load_base(TINY_ID, load_in_4bit=False, **options)


def value(results, task):
    return results["results"][task]["acc,none" if task.startswith("choice") else "exact_match,none"]


def test_a_model_that_knows_the_answers_gets_one_and_one_that_does_not_gets_chance(ask, make_model, tiny_tokenizer):
    names = [f"choice_{WINDOW}", f"answer_{WINDOW}"]
    knows = ask(tiny(), *names, batch_size=5)
    assert [value(knows, name) for name in names] == [1.0, 1.0]
    assert knows["n-samples"][names[0]] == {"original": DOCUMENTS, "effective": DOCUMENTS}
    guesses = ask(make_model(max_position_embeddings=WINDOW), *names, batch_size=5)
    assert value(guesses, names[0]) < 0.6 and value(guesses, names[1]) < 0.2
    assert tiny_tokenizer.eos_token is None  # only lm-eval's copy got one


def test_an_adapter_is_asked_on_its_scaled_base_with_whole_prompts(ask, adapter):
    names = [f"choice_{TARGET}", f"answer_{TARGET}"]
    model, tokenizer = load_adapter(adapter)
    results = ask(model, *names, tokenizer=tokenizer)
    (lm,) = ask.used
    trained = rope.load_base_config(adapter)
    assert lm.model is model and not model.training and lm.max_length == trained.max_position_embeddings == TARGET
    rope.check_scaling(lm.model, trained)
    assert min(map(len, lm.fed)) > TARGET - 8 and min(value(results, name) for name in names) > 0.7
    # Control: what `peft=` makes of the same adapter.
    plain = huggingface.HFLM(pretrained=str(base_folder()), peft=str(adapter), device="cpu")
    with pytest.raises(rope.RopeError, match="inv_freq is not the one of the config"):
        rope.check_scaling(plain.model, trained)
    assert plain.max_length == WINDOW


def test_scaled_and_unscaled_bases_stand_side_by_side_in_one_table(ask):
    name = f"answer_{TARGET}"
    results = {
        "unscaled": ask(tiny(target_length=TARGET), name),
        "yarn": ask(tiny(target_length=TARGET, rope_scaling_type="yarn"), name),
    }
    assert value(results["unscaled"], name) < 0.4 < 0.7 < value(results["yarn"], name)
    assert results["unscaled"]["cream_peft"]["rope_parameters"]["rope_type"] == "default"
    head, _, row = table_of_harness(results).splitlines()
    assert head.split() == ["task", "samples", "shots", "metric", "unscaled", "yarn"]
    cells = [f"{value(result, name):.4f}" for result in results.values()]
    assert row.split()[:5] == [name, str(DOCUMENTS), "0", "exact_match", "↑"]
    assert row.split()[5::3] == cells and row.count(" ± 0.") == 2


def test_a_length_that_the_model_is_not_scaled_to_is_refused(ask):
    with pytest.raises(HarnessError, match=f"max_length {TARGET} is beyond the {WINDOW} tokens"):
        ask(tiny(), f"choice_{TARGET}", max_length=TARGET)
    rounded = tiny(target_length=TARGET, rope_scaling_type="yarn").to(torch.bfloat16)
    with pytest.raises(rope.RopeError, match=r"inv_freq is torch\.bfloat16"):
        ask(rounded, f"choice_{TARGET}")
    assert not ask.used
    ask(tiny(), f"choice_{WINDOW}", max_length=100)
    assert max(map(len, ask.used[0].fed)) == 100


def test_results_are_lm_evals_with_our_header_and_without_local_paths(ask, tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), load_in_4bit=False, target_length=512, rope_scaling_type="ntk")
    header = {"model": "base", "adapter_sha256": "0" * 64, "rope_scaling_type": "ntk"}
    results = ask(model, f"choice_{WINDOW}", header=header)
    text = json.dumps(results)
    assert json.loads(text) == results and str(tmp_path) not in text and str(base_folder()) not in text
    ours = results["cream_peft"]
    assert header.items() <= ours.items() and {"versions", "machine", "chat_template"} <= ours.keys()
    assert ours["rope_parameters"] == model.config.rope_parameters and ours["max_position_embeddings"] == 512
    assert results["lm_eval_version"] and "pretty_env_info" not in results
    assert results["config"]["model"] == "base" and f"choice_{WINDOW}" in make_table(results)
    assert results["configs"][f"choice_{WINDOW}"]["dataset_kwargs"]["data_files"] == {"test": f"{WINDOW}.jsonl"}
    monkeypatch.setattr(harness, "without_secrets", lambda content: content)
    assert str(tmp_path) in json.dumps(ask(model, f"choice_{WINDOW}"))  # control


def test_outside_a_repository_git_does_not_complain(ask, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    ask(tiny(), f"choice_{WINDOW}")
    assert "fatal" not in capfd.readouterr().err


def test_text_that_only_looks_like_a_path_is_kept(tmp_path):
    kept = ["Rowan/hellaswag", "/no_think", "and/or", "a\n/b", ["/"], 3, None]
    assert harness.without_secrets(kept) == kept
    gone = {"files": [f"{tmp_path}/*.jsonl", str(tmp_path / "gone" / "a.txt")]}
    assert harness.without_secrets(gone) == {"files": ["*.jsonl", "a.txt"]}
    assert harness.without_secrets("/of/another-machine/x") == "x"


def test_lm_evals_options_reach_it(ask):
    name = f"choice_{WINDOW}"
    results = ask(tiny(target_length=TARGET), name, limit=3, num_fewshot=1, seed=7)
    assert results["n-samples"][name]["effective"] == 3 and results["n-shot"][name] == 1
    assert {results["config"][key] for key in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")} == {7}
    assert min(map(len, ask.used[0].fed)) > 1.5 * WINDOW
    usual = ask(tiny(), name, limit=3)
    assert usual["config"]["random_seed"] == 0 and usual["config"]["fewshot_seed"] == 1234
    assert len(table_of_harness({"one example": results, "none": usual}).splitlines()) == 4  # not compared in one row
    with pytest.raises(HarnessError, match="must be at least 1"):
        ask(tiny(), name, limit=0)


def test_a_chat_model_is_asked_in_its_template_if_asked_to(ask, tiny_tokenizer):
    name = f"answer_{WINDOW}"
    with pytest.raises(HarnessError, match="no chat template"):
        ask(tiny(), name, chat_template=True)
    tiny_tokenizer.chat_template = "<s> .63 {% for message in messages %}{{ message.content }}{% endfor %}"
    results = ask(tiny(target_length=TARGET), name, chat_template=True)
    begin = tiny_tokenizer("<s> .63 <s>", add_special_tokens=False)["input_ids"]
    assert all(ids[:3] == begin for ids in ask.used[0].fed) and results["cream_peft"]["chat_template"]
    ask(tiny(), name)
    assert not any(ids[:3] == begin for ids in ask.used[1].fed)


def test_tasks_that_make_their_data_get_the_models_tokenizer(ask, tiny_tokenizer, monkeypatch):
    (ask.folder / "made.py").write_text(
        "from datasets import Dataset\n"
        "def make(tokenizer, max_seq_lengths, **others):\n"
        "    rows = [{'text': f'k001 v{length // 64:02d}', 'answer': tokenizer} for length in max_seq_lengths]\n"
        "    return {'test': Dataset.from_list(rows)}\n"
    )
    settings = {"task": "made", "test_split": "test", "doc_to_text": "{{text}}", **ANSWER}
    settings["metric_list"] = [{"metric": "exact_match"}]
    (ask.folder / "made.yaml").write_text(yaml.safe_dump(settings) + "custom_dataset: !function made.make\n")
    results = ask(tiny(), "made", metadata={"max_seq_lengths": [640, 1280]})
    words = [tiny_tokenizer.decode(ids) for ids in ask.used[0].fed]
    assert sorted(words) == ["k001 v10", "k001 v20"]
    assert results["configs"]["made"]["metadata"]["tokenizer"] == base_folder().name
    # RULER's own default is 4,096 tokens, whatever the model reaches.
    ask(tiny(target_length=4 * 256), "made", header={"pretrained_window": 256})
    assert {tiny_tokenizer.decode(ids) for ids in ask.used[1].fed} == {"k001 v04", "k001 v08", "k001 v16"}
    ask(tiny(target_length=4 * 256), "made", header={"pretrained_window": 256}, limit=1)
    assert [tiny_tokenizer.decode(ids) for ids in ask.used[2].fed] == ["k001 v16"]
    # A skill within a long window is asked at short lengths too.
    monkeypatch.setattr(harness, "RULER_FIRST", 256)
    ask(tiny(target_length=4 * 256), "made", header={"pretrained_window": 4 * 256})
    assert {tiny_tokenizer.decode(ids) for ids in ask.used[3].fed} == {"k001 v04", "k001 v08", "k001 v16"}


def test_what_lm_eval_cannot_do_is_one_line(ask, monkeypatch):
    def line(*names):
        with pytest.raises(Exception) as error:
            ask(tiny(), *names)
        return explain(error.value)

    assert line("choise_256").startswith("lm-eval has no task 'choise_256': did you mean choice_2")
    assert line(f"choice_{WINDOW}", "zzz") == (
        "lm-eval has no task 'zzz': `lm-eval ls tasks` lists them, or give the folder of its YAML as include_path"
    )
    settings = {"task": "far", "test_split": "test", "dataset_path": "owner/far", "doc_to_text": "{{text}}", **ANSWER}
    (ask.folder / "far.yaml").write_text(yaml.safe_dump(settings))
    assert line("far").startswith("the data set of task far (of the Hub, unless --data_dir has it) is not in")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = line(f"choice_{WINDOW}")
    assert found.startswith("lm-eval is missing") and found.endswith("pip install 'lm-eval[longbench,ruler]<0.5'")


def test_patterns_and_groups_stand_for_their_tasks(ask):
    (ask.folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": [f"choice_{WINDOW}"]}))
    assert set(ask(tiny(), "choice_25*", limit=1)["results"]) == {f"choice_{WINDOW}"}
    (ask.folder / "chosen.yaml").write_text(yaml.safe_dump({"group": "choice_25", "task": [f"choice_{WINDOW}"]}))
    assert set(ask(tiny(), "choice_25*", limit=1)["results"]) == {f"choice_{WINDOW}"}
    grouped = ask(tiny(), "both", limit=1)
    assert grouped["group_subtasks"] == {"both": [f"choice_{WINDOW}"]}
    head, _, row = table_of_harness({"one": grouped}).splitlines()
    assert (head.split()[0], row.split()[0]) == ("task", f"choice_{WINDOW}")


def test_the_table_tells_filters_directions_and_missing_errors_apart():
    def result(**metrics):
        return {
            "results": {"gsm": {"name": "gsm", "alias": "gsm", "sample_len": 4, **metrics}},
            "n-samples": {"gsm": {"original": 9, "effective": 4}},
            "n-shot": {"gsm": 5},
            "higher_is_better": {"gsm": {"ppl": False, "match": True}},
        }

    first = result(**{"match,strict": 0.5, "match_stderr,strict": 0.25, "ppl,none": 12.0, "ppl_stderr,none": "N/A"})
    second = result(**{"match,strict": 1.0, "match_stderr,strict": float("nan"), "4096,none": -1, "8192,none": 0.5})
    head, _, *rows = table_of_harness({"a": first, "longer": second}).splitlines()
    assert head.split() == ["task", "samples", "shots", "metric", "a", "longer"]
    assert [re.split("  +", row) for row in rows] == [
        ["gsm", "4", "5", "match (strict) ↑", "0.5000 ± 0.2500", "1.0000"],
        ["gsm", "4", "5", "ppl ↓", "12.0000", "-"],
        ["gsm", "4", "5", "8192", "-", "0.5000"],
    ]


def test_the_command_loads_an_adapter_scaled_and_compares_it_with_its_base(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--max_steps", "2", "--output_dir", "run", "--save_strategy", "no"]) == 0
    command = ["lm-eval", "--tasks", f"choice_{WINDOW}", "--include_path", str(ask.folder), "--limit", "2"]
    assert cli.main([*command, "--compare", "base=cream-peft-tiny", "tuned=run", "--output_dir", "out"]) == 0
    base, tuned = ask.used
    assert base.max_length == 256 and tuned.max_length == 2048
    found = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert found["cream_peft"]["adapter"] == "run" and found["cream_peft"]["target_length"] == 2048
    said = capsys.readouterr().out
    assert "base" in said and "tuned" in said and f"choice_{WINDOW}" in said
