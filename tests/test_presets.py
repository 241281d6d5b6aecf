"""The presets of `cream-peft lm-eval`, with lm-eval's own tasks over tiny data made here, and no network."""

import json
import random
import shutil
import string
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_eval_tasks import CHAT, bytes_tokenizer

from cream_peft import cli
from cream_peft.evals import presets
from cream_peft.evals.presets import (
    LONGBENCH,
    PRESETS,
    WITHOUT_CHAT,
    HarnessError,
    check_needs,
    cut_in_the_middle,
    local_data,
    longbench_cut,
)

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
manager = pytest.importorskip("lm_eval.tasks")
LM_EVAL = Path(manager.__file__).parent


@pytest.fixture
def base(tmp_path, make_model):
    """A folder with a random model of 4,096 tokens that reads bytes, and a chat template."""
    tokenizer = bytes_tokenizer(CHAT)
    make_model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """A folder of data sets; write(name, rows, configuration, split)."""
    folder = tmp_path / "data"

    def write(name, rows, config="", split="test"):
        file = folder / name / config / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write.folder = folder
    folder.mkdir()
    return write


@pytest.fixture
def extras(tmp_path, monkeypatch):
    """The packages that LongBench and RULER import, and that the tasks asked here make no use of."""
    contents = {
        "jieba": "",
        "fuzzywuzzy": "fuzz = None",
        "rouge": "Rouge = None",
        "wonderwords": "class RandomWord:\n    _categories = {name: [f'{name}{letter}' for letter in 'abcdefghij'] for "
        "name in ('noun', 'adjective', 'verb', 'nouns', 'adjectives', 'verbs')}",
    }
    for name, content in contents.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.split(".")[0] in contents or ".tasks.ruler" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "packages")


@pytest.fixture
def prompts(monkeypatch):
    """What lm-eval sends to the models, in order, as text; all of the models answer at once."""
    sent = []

    def generate_until(self, requests, disable_tqdm=False):
        sent.extend(request.args[0] for request in requests)
        return ["7"] * len(requests)

    def loglikelihood(self, requests, disable_tqdm=False):
        sent.extend(request.args[0] for request in requests)
        return [(-1.0 - len(request.args[1]), False) for request in requests]

    monkeypatch.setattr(huggingface.HFLM, "generate_until", generate_until)
    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", loglikelihood)
    return sent


def only(monkeypatch, *tasks):
    """Lets lm-eval list the folders of these tasks alone; all of them take ten seconds."""
    real, paths = manager.TaskManager, [LM_EVAL / task for task in tasks]

    def make(include_path=None, metadata=None):
        return real(include_defaults=False, include_path=paths, metadata=metadata)

    monkeypatch.setattr(manager, "TaskManager", make)


def lm_eval_command(base, data, *options):
    command = ["lm-eval", "--compare", f"m={base}", "--no_4bit", "--data_dir", str(data.folder)]
    return cli.main([*command, "--output_dir", str(base.parent / "out"), *options])


def short_data(data):
    """Some rows of each data set of the preset short; the right answer is the shorter one."""
    choices = {"text": ["b", "aa"], "label": ["A", "B"]}
    targets = {"choices": ["a", "bb"], "labels": [1, 0]}
    for split in ("train", "validation", "test"):
        numbered = [f"{split} {number}" for number in range(30)]
        rows = [{"id": n, "question": f"{n}?", "choices": choices, "answerKey": "A"} for n in numbered]
        data("allenai/ai2_arc", rows, "ARC-Challenge", split)
        rows = [
            {"activity_label": "x", "ctx_a": n, "ctx_b": "it", "endings": ["a", "bb"], "label": "0"} for n in numbered
        ]
        data("Rowan/hellaswag", rows, "", split)
        rows = [{"sentence": f"{n} _ it.", "option1": "a", "option2": "bb", "answer": "1"} for n in numbered[:3]]
        data("allenai/winogrande", rows, "winogrande_xl", split)
        rows = [{"goal": n, "sol1": "a", "sol2": "bb", "label": 0} for n in numbered[:3]]
        data("baber/piqa", rows, "", split)
        rows = [{"passage": n, "question": "so", "label": 0, "idx": 0} for n in numbered[:3]]
        data("aps/super_glue", rows, "boolq", split)
        rows = [{"question": f"{n}?", "mc1_targets": targets, "mc2_targets": targets} for n in numbered[:3]]
        data("truthfulqa/truthful_qa", rows, "multiple_choice", split)


def test_short_is_the_authors_tasks_with_their_shots(base, data, prompts, monkeypatch, tmp_path, capsys):
    short_data(data)
    only(monkeypatch, "super_glue", "piqa", "winogrande", "truthfulqa", "hellaswag", "arc")
    assert lm_eval_command(base, data, "--preset", "short", "--limit", "2") == 0
    found = json.loads((tmp_path / "out" / "m-short.json").read_text())
    assert found["cream_peft"]["tasks"] == list(PRESETS["short"].tasks) == list(found["results"])
    shots = {"boolq": 0, "piqa": 0, "winogrande": 0, "truthfulqa_mc2": 0, "hellaswag": 10, "arc_challenge": 25}
    assert found["n-shot"] == shots
    assert prompts[-1].count("Question: train") == 25 and prompts[-1].count("Answer:") == 26
    assert prompts[0] == "validation 0\nQuestion: so?\nAnswer:"
    assert found["results"]["winogrande"]["acc,none"] == found["results"]["hellaswag"]["acc,none"] == 1.0
    assert str(tmp_path) not in json.dumps(found)
    kept = [found["results"][task][metric] for task, (_, metric) in PRESETS["short"].tasks.items()]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean of short"))
    assert line.split()[-2:] == ["score", f"{sum(kept) / 6:.4f}"] and 0 < sum(kept) < 6


def longbench_rows(name, words):
    random.seed(name)
    context = " ".join("".join(random.choices(string.ascii_lowercase, k=5)) for _ in range(words))
    row = {
        "input": "q",
        "question": "which?",
        "context": context,
        "answers": ["7", "Paragraph 7"],
        "all_classes": ["7"],
    }
    return [row | {"length": words, "dataset": name, "language": "en", "_id": name}]


def test_longbench_is_cut_in_the_middle_and_asked_in_its_chat_form(base, data, prompts, extras, monkeypatch, tmp_path):
    only(monkeypatch, "longbench")
    for name in LONGBENCH:
        data("Xnhyacinth/LongBench", longbench_rows(name, 1000), name)
    few = {f"longbench_{name}": PRESETS["longbench"].tasks[f"longbench_{name}"] for name in ("hotpotqa", "trec")}
    monkeypatch.setitem(PRESETS, "longbench", replace(PRESETS["longbench"], tasks=few))
    assert lm_eval_command(base, data, "--preset", "longbench") == 0
    hotpot, trec = prompts
    assert hotpot.startswith("<s>[user] Answer the question") and hotpot.endswith("Answer:\n[assistant]")
    assert trec.startswith("Please determine the type") and trec.endswith("which?")
    tokenizer = bytes_tokenizer()
    assert len(tokenizer(trec)["input_ids"]) in (3499, 3500)  # <s> is written anew
    whole = longbench_rows("trec", 1000)[0]["context"]
    assert whole[:1500] in trec and whole[-1500:] in trec and whole not in trec
    found = json.loads((tmp_path / "out" / "m-longbench.json").read_text())
    assert found["results"]["longbench_hotpotqa"]["score,none"] == 1.0
    prompts.clear()
    assert lm_eval_command(base, data, "--preset", "longbench", "--no-chat_template", "--overwrite") == 0
    assert prompts[0].startswith("Answer the question") and prompts[1] == trec


def test_the_cut_keeps_both_ends_and_the_papers_lengths():
    assert [longbench_cut(reach) for reach in (4096, 32_768, 8192)] == [3500, 31_500, 7596]
    with pytest.raises(HarnessError, match="too few of 1,000"):
        longbench_cut(1000)
    tokenizer = bytes_tokenizer()
    text = "".join(chr(97 + n % 26) for n in range(101))
    cut = cut_in_the_middle(lambda doc: doc, tokenizer, 20)
    # Ten tokens of each end, the first of them being <s>.
    assert cut(text) == text[:9] + text[-10:] and cut("short") == "short"


def test_ruler_is_asked_from_a_short_length_to_the_reach_with_the_same_data_for_all(
    base, data, prompts, extras, monkeypatch, tmp_path, capsys
):
    only(monkeypatch, "ruler")
    nltk = pytest.importorskip("nltk")
    few = {"niah_single_1": (None, "")}
    monkeypatch.setitem(PRESETS, "ruler", replace(PRESETS["ruler"], tasks=few, data=("a/b",)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda name: None)
    assert lm_eval_command(base, data, "--preset", "ruler") == 2
    assert "lacks a/b, which --preset ruler reads" in capsys.readouterr().err
    data("a/b", [{"text": "x"}], split="train")
    assert lm_eval_command(base, data, "--preset", "ruler") == 2
    assert "needs nltk's table punkt_tab: `python -m nltk.downloader punkt_tab`" in capsys.readouterr().err
    (data.folder / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    # Of its 500 samples a few.
    monkeypatch.setattr("lm_eval.tasks.ruler.prepare_niah.tqdm", lambda samples, **others: samples[:3])
    options = ["--preset", "ruler", "--max_length", "2048", "--metadata", '{"max_seq_lengths": [1024, 2048]}']
    assert lm_eval_command(base, data, *options) == 0
    first = list(prompts)
    found = json.loads((tmp_path / "out" / "m-ruler.json").read_text())
    assert {key.split(",")[0] for key in found["results"]["niah_single_1"]} >= {"1024", "2048"}
    lengths = [len(prompt) for prompt in first]
    assert len(lengths) == 6 and max(lengths[:3]) < 1024 < 1600 < min(lengths[3:]) <= max(lengths) < 2048
    mean = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith("mean of ruler")]
    assert mean == [["1024", "0.0000"], ["2048", "0.0000"]]
    prompts.clear()
    assert lm_eval_command(base, data, *options, "--overwrite") == 0
    assert prompts == first


def test_a_killed_run_resumes_at_the_first_task_without_a_result(base, data, prompts, monkeypatch, tmp_path, capsys):
    only(monkeypatch, "arc", "hellaswag", "winogrande")
    short_data(data)
    tasks = ["--tasks", "winogrande,hellaswag,arc_challenge", "--limit", "2"]
    broken = data.folder / "Rowan/hellaswag/validation.jsonl"
    kept = broken.read_text()
    broken.write_text("{")
    assert lm_eval_command(base, data, *tasks) == 2
    file = tmp_path / "out" / "m.json"
    assert json.loads(file.read_text())["cream_peft"]["tasks"] == ["winogrande"]
    broken.write_text(kept)
    prompts.clear()
    assert lm_eval_command(base, data, *tasks) == 0
    found = json.loads(file.read_text())
    assert found["cream_peft"]["tasks"] == ["winogrande", "hellaswag", "arc_challenge"] == list(found["results"])
    assert prompts and not any(" it." in prompt for prompt in prompts)  # winogrande is not asked again
    capsys.readouterr()
    assert lm_eval_command(base, data, *tasks[:2], "--limit", "3") == 2
    assert (
        "m.json was written with another limit: choose" in capsys.readouterr().err
        and json.loads(file.read_text()) == found
    )
    other = shutil.copytree(data.folder, tmp_path / "other")
    for folder in ("--data_dir", "--include_path"):
        assert lm_eval_command(base, data, *tasks, folder, str(other)) == 2
        assert f"m.json was written with another {folder.strip('-')}: choose" in capsys.readouterr().err
    file.write_text("{}")
    assert lm_eval_command(base, data, *tasks) == 2
    assert "was written with another form: choose" in capsys.readouterr().err


def test_a_clone_of_a_hub_repository_is_read_by_its_own_configurations(data):
    import datasets

    data("a/b", [{"x": 1}], "one", "anything")
    (data.folder / "a/b/README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: dev\n    path: one/anything.jsonl\n---\n"
    )
    data("a/c", [{"x": 2}], "first", "dev")
    with local_data(str(data.folder)):
        assert datasets.load_dataset("a/b", "first")["dev"]["x"] == [1]
        assert datasets.load_dataset(path="a/c", name="first")["dev"]["x"] == [2]
        with pytest.raises(HarnessError, match="second holds no data"):
            datasets.load_dataset("a/c", "second")


def test_needs_are_named_before_anything_is_loaded(base, data, monkeypatch, capsys):
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    with pytest.raises(HarnessError, match=r"longbench needs jieba, fuzzywuzzy, rouge: pip install 'lm-eval"):
        check_needs("longbench", None)
    assert lm_eval_command(base, data, "--preset", "longbench") == 2
    assert "needs jieba" in capsys.readouterr().err
    with pytest.raises(HarnessError, match="no such folder"):
        check_needs("short", "absent")
    for options in ([], ["--preset", "short", "--tasks", "arc"]):
        assert lm_eval_command(base, data, *options) == 2
        assert "give either --tasks or --preset" in capsys.readouterr().err


def test_the_presets_name_what_lm_eval_has():
    """Tasks, data sets and what is asked without the chat form, against the YAML files of the lm-eval that is here."""
    folders = ("super_glue", "piqa", "winogrande", "truthfulqa", "hellaswag", "arc", "longbench")
    text = "".join(file.read_text() for folder in folders for file in (LM_EVAL / folder).rglob("*.yaml"))
    paths = [LM_EVAL / folder for folder in (*folders, "ruler")]
    tasks = manager.TaskManager(include_defaults=False, include_path=paths).all_tasks
    assert all(set(preset.tasks) <= set(tasks) for preset in PRESETS.values())
    named = [name for preset in ("short", "longbench") for name in PRESETS[preset].data]
    assert all(f"dataset_path: {name}" in text for name in named)
    ruler = "".join(file.read_text() for file in (LM_EVAL / "ruler").glob("*.py"))
    assert all(name in ruler for name in PRESETS["ruler"].data) and set(WITHOUT_CHAT) < set(LONGBENCH)
