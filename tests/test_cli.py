"""What a user sees: one line for every mistake, through the command itself."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repository
from huggingface_hub.utils import _http
from transformers import GPT2Config, LlamaConfig
from trl import ModelConfig, get_peft_config

from cream_peft import cli, errors, terminal
from cream_peft.plan import fit
from cream_peft.tiny import base_folder
from cream_peft.train import run as train
from cream_peft.train.recipe import parse_recipe

COMMAND = [sys.executable, "-m", "cream_peft.cli"]
LLAMA_2 = "model_name_or_path: meta-llama/Llama-2-7b-hf\ndataset_name: o/documents\ncontext_length: 4096\n"
LLAMA_2 += "target_length: 32768\noutput_dir: run\nper_device_train_batch_size: 1\ngradient_checkpointing: true\n"
TINY = "model_name_or_path: cream-peft-tiny\ndataset_name: cream-peft-tiny\noutput_dir: run\n"
RESULTS = {"model": "m", "adapter": None, "versions": {}, "seed": 0, "settings": {"label": "a"}, "cells": []}
TALK = {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]}

FILES = {
    "misspelt.yaml": TINY + "learning_rat: 1.0e-4\n",
    "words.yaml": TINY + "lora_r: abc\n",
    "half.yaml": TINY + "lora_r: 1.5\n",
    "listed.yaml": TINY + "lora_r: [16]\n",
    "sigma.yaml": TINY + "sigma: high\n",
    "twice.yaml": TINY + "max_steps: 1\nseed: 0\nmax_steps: 2\n",
    "twins.yaml": TINY + "lr_scheduler_kwargs: {min_lr_rate: 0.1, min_lr_rate: 0.2}\nmax_steps: 1\n",
    "no.yaml": TINY + "save_strategy: no\n",
    "flat.yaml": TINY + "lora_alpha: -1\n",
    "packing.yaml": TINY + "packing: true\n",
    "unprepared.yaml": TINY + "dataset_kwargs: {skip_prepare_dataset: true}\n",
    "broken.yaml": "lora_r: [16\nseed: 0\n",
    "list.yaml": "- lora_r\n- seed\n",
    "empty.yaml": "",
    "nothing.yaml": "seed: 0\n",
    "llama-2.yaml": LLAMA_2,
    "empty.jsonl": "",
    "table.csv": "text\nhello\n",
    "broken.jsonl": '{"text": \n',
    "numbers.jsonl": '{"text": 1}\n',
    "columns.jsonl": '{"body": "hello", "meta": 1}\n',
    "text.jsonl": '{"text": "k001 v01"}\n',
    "talk.jsonl": json.dumps(TALK) + "\n",
    "short.jsonl": '{"input_ids": [1, 2, 3, 4]}\n' * 3,
    "outside.jsonl": '{"input_ids": [1, 2, 3]}\n' + '{"input_ids": [1, 385]}\n' * 2,
    "nothing/README.md": "",
    "plain-adapter/adapter_config.json": "{}",
    "broken.json": "{",
    "other.json": "[]",
    "unmeasured.json": json.dumps(RESULTS),
    "cells.json": json.dumps(RESULTS | {"cells": [{"task": "recall"}]}),
}
DATA = ["train", "--max_steps", "1", "--dataset_name"]
MODEL = ["train", "--max_steps", "1", "--dataset_name", "cream-peft-tiny", "--model_name_or_path"]

MISTAKES = {
    "an unknown command": (["trian"], ["unknown command 'trian'", "train, evaluate, lm-eval, plan, plot, bench, push"]),
    "a misspelt key": (
        ["train", "--config", "misspelt.yaml"],
        ["misspelt.yaml", "'learning_rat'", "did you mean 'learning_rate'?"],
    ),
    "a misspelt option": (["train", "--learning_rat", "1"], ["'--learning_rat'", "did you mean '--learning_rate'?"]),
    "a misspelt option of evaluate": (["evaluate", "--task", "recall"], ["--task", "cream-peft evaluate --help"]),
    "an option without its value": (["train", "--learning_rate"], ["--learning_rate needs a value"]),
    "an option of plan without its value": (["plan", "--gpu"], ["--gpu", "expected one argument"]),
    "--config without a file": (["train", "--config", "--seed", "1"], ["--config needs a file"]),
    "a recipe without --config": (["train", "words.yaml"], ["'words.yaml'", "did you mean --config words.yaml?"]),
    "words for a number": (["train", "--config", "words.yaml"], ["words.yaml: lora_r='abc'", "a whole number"]),
    "a key twice": (
        ["train", "--config", "twice.yaml"],
        ["twice.yaml", "line 6", "max_steps is in line 4 already", "leave one of them out"],
    ),
    "a key twice in one line": (
        ["train", "--config", "twins.yaml"],
        ["twins.yaml", "line 4, column", "min_lr_rate is in line 4 already"],
    ),
    "half a number": (["train", "--config", "half.yaml"], ["half.yaml: lora_r=1.5", "a whole number"]),
    "a list for a number": (["train", "--config", "listed.yaml"], ["lora_r=[16]", "a whole number"]),
    "a word for sigma": (["train", "--config", "sigma.yaml"], ["sigma.yaml: sigma='high' must be a number"]),
    "a word for sigma as an option": (["train", "--sigma", "high"], ["error: sigma='high' must be a number"]),
    "a negative sigma": (["train", "--sigma", "-1"], ["sigma=-1.0", "above 0"]),
    "an option of another strategy": (
        ["train", "--chunks", "3"],
        ["chunks=3 goes with position_strategy=pose", "cream"],
    ),
    "one chunk": (["train", "--position_strategy", "pose", "--chunks", "1"], ["chunks=1 must be at least 2"]),
    "a share above 1": (["train", "--contiguous_share", "1.5"], ["contiguous_share=1.5 must be from 0 to 1"]),
    "a growing target with workers": (
        ["train", "--target_growth", "0.5", "--dataloader_num_workers", "2"],
        ["target_growth=0.5 cannot go with dataloader_num_workers=2", "set one of them to 0"],
    ),
    "YAML's no": (["train", "--config", "no.yaml"], ["save_strategy=False", "put it in quotes"]),
    "half a JSON": (["train", "--lr_scheduler_kwargs", "{3"], ["{3 is not valid JSON"]),
    "an unknown strategy": (["train", "--position_strategy", "craem"], ["'craem'", "cream, pose, randpos, segments"]),
    "an unknown scaling": (["train", "--rope_scaling_type", "yarnn"], ["'yarnn'", "linear, ntk, yarn"]),
    "an unknown way with short documents": (["train", "--short_documents", "cut"], ["'cut'", "shrink, skip, join"]),
    "an unknown optimizer": (["train", "--optim", "adam"], ["optim='adam'", "did you mean adamw_torch"]),
    "an unknown dtype": (["train", "--dtype", "float17"], ["dtype='float17'", "bfloat16"]),
    "no batch": (["plan", "--per_device_train_batch_size", "0"], ["per_device_train_batch_size=0", "at least 1"]),
    "no batch for evaluation": (["plan", "--per_device_eval_batch_size", "0"], ["eval_batch_size=0", "at least 1"]),
    "a negative accumulation": (
        ["bench", "--gradient_accumulation_steps", "-1"],
        ["gradient_accumulation_steps=-1", "at least 1"],
    ),
    "no rank": (["train", "--lora_r", "0"], ["lora_r=0 must be at least 1"]),
    "no alpha": (["train", "--config", "flat.yaml"], ["flat.yaml: lora_alpha=-1 must be at least 1"]),
    "no tokens": (["plan", "--context_length", "0"], ["context_length=0 must be at least 2 tokens"]),
    "no documents": (["train", "--max_documents", "0"], ["max_documents=0 must be at least 1"]),
    "one setting under two names": (
        ["train", "--activation_checkpointing", "true", "--gradient_checkpointing", "false"],
        ["activation_checkpointing and gradient_checkpointing are one setting"],
    ),
    "fewer than no documents held out": (["train", "--held_out_documents", "-1"], ["held_out_documents=-1", "least 0"]),
    "packing": (["train", "--config", "packing.yaml"], ["packing=true", "short_documents=join"]),
    "padding_free": (["train", "--padding_free", "true"], ["padding_free=true", "short_documents=join"]),
    "max_length": (["train", "--max_length", "1024"], ["max_length=1024", "context_length", "target_length"]),
    "skip_prepare_dataset": (["train", "--config", "unprepared.yaml"], ["skip_prepare_dataset", "input_ids"]),
    "skip_prepare_dataset as an option": (
        ["train", "--dataset_kwargs", '{"skip_prepare_dataset": true}'],
        ["skip_prepare_dataset", "input_ids"],
    ),
    "8 bits": (["train", "--load_in_8bit", "true"], ["load_in_8bit=true", "load_in_4bit=true"]),
    "full fine-tuning in 4 bits": (
        ["train", "--use_peft", "false", "--load_in_4bit", "true"],
        ["use_peft=false", "load_in_4bit=true"],
    ),
    "an infinite rate": (["train", "--learning_rate", "inf"], ["learning_rate=inf", "above 0 and at most 1"]),
    "a rate that is no number": (["train", "--learning_rate", "nan"], ["learning_rate=nan", "above 0"]),
    "a rate of billions": (["train", "--learning_rate", "1e10"], ["learning_rate=1e+10", "at most 1"]),
    "no rate": (["train", "--learning_rate", "0"], ["learning_rate=0", "above 0"]),
    "a negative rate": (["plan", "--learning_rate=-1e-4"], ["learning_rate=-0.0001", "above 0"]),
    "a negative number of steps": (["train", "--max_steps", "-3"], ["max_steps=-3", "at least 1"]),
    "no steps": (["plan", "--max_steps", "0"], ["max_steps=0", "at least 1"]),
    "no epochs": (["train", "--num_train_epochs", "0"], ["num_train_epochs=0", "above 0"]),
    "negative epochs": (["train", "--num_train_epochs", "-1"], ["num_train_epochs=-1", "above 0"]),
    "one token fed": (["train", "--context_length", "1"], ["context_length=1", "at least 2 tokens"]),
    "a dropout of everything": (["train", "--lora_dropout", "1"], ["lora_dropout=1", "below 1"]),
    "a negative dropout": (["train", "--lora_dropout", "-0.1"], ["lora_dropout=-0.1", "at least 0"]),
    "an infinite weight decay": (["train", "--weight_decay", "inf"], ["weight_decay=inf", "finite"]),
    "a negative warm-up": (["train", "--warmup_steps", "-1"], ["warmup_steps=-1", "at least 0"]),
    "options of another schedule": (
        ["train", "--lr_scheduler_type", "linear", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'],
        ["lr_scheduler_kwargs={'min_lr_rate': 0.1}", "lr_scheduler_type=linear", "min_lr_rate"],
    ),
    **{
        f"{name} without its package": (["train", "--report_to", name], [f"report_to={name}", f"pip install {name}"])
        for name in ("tensorboard", "trackio", "wandb")
    },
    "an unknown reporter": (["train", "--report_to", "wandbb"], ["report_to='wandbb'", "did you mean 'wandb'?"]),
    "an evaluation of nothing": (
        ["train", "--eval_strategy", "steps", "--eval_steps", "1"],
        ["eval_strategy=steps has nothing to evaluate on", "held_out_documents", "dataset_test_split"],
    ),
    "an evaluation of nothing before the first step": (
        ["train", "--eval_on_start", "true"],
        ["eval_on_start=true has nothing to evaluate on", "held_out_documents", "dataset_test_split"],
    ),
    "a split that does not exist": (
        [*DATA, "short.jsonl", "--dataset_test_split", "test"],
        ["dataset_test_split: short.jsonl", "no split 'test'", "held_out_documents"],
    ),
    "a validation file that is not there": (
        [*DATA, "short.jsonl", "--dataset_test_split", "held.jsonl"],
        ["dataset_test_split: no such file or folder: held.jsonl"],
    ),
    "a model without data": (["train", "--model_name_or_path", "./llama"], ["dataset_name is missing"]),
    "rows that cannot be used": (
        [*DATA, "outside.jsonl"],
        ["dataset_name: outside.jsonl: 2 of 3 rows cannot be used", "outside the vocabulary of 385", "row 2"],
    ),
    "an adapter to train further, and every weight": (
        ["train", "--use_peft", "false", "--adapter_name_or_path", "x"],
        ["use_peft=false", "adapter_name_or_path=x"],
    ),
    "more tokens fed than reached": (
        ["train", "--context_length", "4096"],
        ["context_length=4096", "target_length=2048", "raise"],
    ),
    "a target below the window": (
        ["train", "--target_length", "128", "--context_length", "128"],
        ["target_length 128", "window of 256", "raise it"],
    ),
    "a recipe that is not there": (["train", "--config", "none.yaml"], ["no such recipe: none.yaml"]),
    "a folder for a recipe": (["train", "--config", "nothing"], ["cannot read the recipe nothing", "directory"]),
    "broken YAML": (["train", "--config", "broken.yaml"], ["broken.yaml is not valid YAML, line 2"]),
    "a list for a recipe": (["train", "--config", "list.yaml"], ["list.yaml", "`key: value` lines", "a list"]),
    "an empty recipe": (["train", "--config", "empty.yaml"], ["empty.yaml", "`key: value` lines", "nothing"]),
    "a recipe without a model": (["train", "--config", "nothing.yaml"], ["model_name_or_path is missing"]),
    "a file of data that is not there": ([*DATA, "none.jsonl"], ["no such file or folder: none.jsonl"]),
    "an empty file of data": ([*DATA, "empty.jsonl"], ["empty.jsonl is empty"]),
    "an unknown type of file": ([*DATA, "table.csv"], ["'.csv'", ".jsonl, .json, .parquet, .txt"]),
    "broken JSON lines": ([*DATA, "broken.jsonl"], ["broken.jsonl cannot be read as json"]),
    "a folder without data": ([*DATA, "./nothing"], ["nothing holds no data files", ".jsonl"]),
    "numbers for text": ([*DATA, "numbers.jsonl"], ["numbers.jsonl", "column text", "int64"]),
    "no usable column": (
        [*DATA, "columns.jsonl"],
        ["columns.jsonl has the columns body, meta", "input_ids, messages, conversations", "dataset_text_field"],
    ),
    "conversations without a chat template": ([*DATA, "talk.jsonl"], ["talk.jsonl", "chat_template_path"]),
    "a chat template that is not there": (
        [*DATA, "talk.jsonl", "--chat_template_path", "none.jinja"],
        ["chat_template_path=none.jinja", "no such .jinja file"],
    ),
    "text for a tokenizer without an end token": ([*DATA, "text.jsonl"], ["text.jsonl", "eos_token", "input_ids"]),
    "more held out than there is": (
        [*DATA, "short.jsonl", "--held_out_documents", "3"],
        ["held_out_documents=3", "of 3 documents"],
    ),
    "a data set of the Hub while offline": ([*DATA, "o/none"], ["data set o/none", "HF_HUB_OFFLINE", "unset it"]),
    "a model folder that is not there": ([*MODEL, "./none"], ["model_name_or_path=./none: no such folder"]),
    "a model folder without a config": ([*MODEL, "./nothing"], ["./nothing holds no config.json"]),
    "a model folder without weights": ([*MODEL, "./llama"], ["./llama holds no weights", "model.safetensors"]),
    "a model of the Hub while offline": ([*MODEL, "o/none"], ["o/none is not in the cache", "HF_HUB_OFFLINE"]),
    "a model without RoPE": ([*MODEL, "./gpt2"], ["'gpt2'", "no rope_parameters", "recipes/families.md"]),
    "yarn on a base that is scaled already": (
        [*MODEL, "./llama-3.1", "--target_length", "4096", "--rope_scaling_type", "yarn"],
        ["'yarn'", "'llama3'", "use 'ntk'"],
    ),
    "a folder that cannot be written": (["train", "--output_dir", "/proc/run"], ["output_dir=/proc/run", "choose"]),
    "a checkpoint that is not there": (
        ["train", "--resume_from_checkpoint", "checkpoint-7"],
        ["resume_from_checkpoint=checkpoint-7: no such folder"],
    ),
    "7B on a machine without a GPU": (
        ["train", "--config", "llama-2.yaml"],
        ["meta-llama/Llama-2-7b-hf", "6.7 billion", "no CUDA GPU", "`make demo`", "`cream-peft plan`"],
    ),
    "--json that is a folder": (
        ["train", "--max_steps", "1", "--json", "nothing"],
        ["--json", "nothing cannot be written", "give a file"],
    ),
    "--json below a file": (
        ["check", "--adapter", "./none", "--json", "empty.jsonl/a.json"],
        ["--json", "empty.jsonl/a.json cannot be written"],
    ),
    "--json where no folder can be made": (["plan", "--json=/proc/zz/a.json"], ["--json", "/proc/zz/a.json"]),
    "an option of merging for llama.cpp": (
        ["merge", "--adapter", "./none", "--gguf_lora", "a.gguf", "--max_shard_size", "1X"],
        ["--max_shard_size is for --output", "--gguf_lora", "leave it out"],
    ),
    "a precision for llama.cpp": (
        ["merge", "--adapter", "./none", "--gguf_lora", "a.gguf", "--dtype", "float16"],
        ["--dtype is for --output"],
    ),
    "an unknown card": (["plan", "--gpu", "RTX"], ["'RTX'", "8GB", "RTX 4090 24GB"]),
    "an unknown task": (["evaluate", "--tasks", "recal"], ["unknown task 'recal'", "recall"]),
    "an unknown scaling to evaluate": (["evaluate", "--compare", "m+foo"], ["'foo'", "linear, ntk, yarn"]),
    "one label twice": (["evaluate", "--compare", "a=x", "a=y"], ["same label (a, a)", "LABEL=MODEL"]),
    "a label without a model": (["evaluate", "--compare", "a="], ["'a='", "LABEL=MODEL"]),
    "words for lengths": (["evaluate", "--lengths", "long"], ["--lengths", "'long'"]),
    "a model to evaluate that is not there": (["evaluate", "--compare", "./none"], ["./none: no such folder"]),
    "a folder that holds no model": (["evaluate", "--compare", "./nothing"], ["neither an adapter", "config.json"]),
    "a plain PEFT adapter": (
        ["evaluate", "--compare", "./plain-adapter"],
        ["./plain-adapter has no", "not a complete adapter of cream-peft"],
    ),
    "an adapter with a scaling": (["evaluate", "--compare", "./plain-adapter+ntk"], ["leave out +ntk"]),
    "no results to draw": (["plot"], ["RESULTS.json", "cream-peft plot --help"]),
    "results that are not there": (["plot", "none.json"], ["no such results file: none.json", "cream-peft evaluate"]),
    "results that are no JSON": (["plot", "broken.json"], ["broken.json is not a results file"]),
    "a JSON of something else": (["plot", "other.json"], ["other.json is not a results file", "cells missing"]),
    "results without cells": (["plot", "unmeasured.json"], ["unmeasured.json", "nothing was measured"]),
    "cells that lack what is drawn": (["plot", "cells.json"], ["cells.json", "cells without depth, length"]),
    "a picture of unknown type": (["plot", "cells.json", "--output", "a.gif"], ["a.gif", ".png or .svg"]),
}
"""What is wrong -> (arguments, what the line must say)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    GPT2Config(n_layer=1, n_embd=32, n_head=2).save_pretrained(folder / "gpt2")
    shutil.copytree(base_folder(), folder / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 256
    LlamaConfig(max_position_embeddings=2048, rope_parameters=scaled).save_pretrained(folder / "llama-3.1")
    return folder


@pytest.fixture
def line_of(folder, monkeypatch, capsys):
    """Runs a command that must fail, and returns its one line."""
    monkeypatch.chdir(folder)

    def run(arguments: list[str], after_progress: bool = False) -> str:
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        *before, line = re.split(r"[\r\n]+", captured.err.removesuffix("\n"))
        assert line.startswith("error: ")
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert not any("%|" not in other and other for other in before) if after_progress else not before
        return line

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_line_that_names_it_and_the_remedy(mistake, line_of):
    arguments, said = MISTAKES[mistake]
    line = line_of(arguments)
    assert [words for words in said if words not in line] == [], line


def test_no_command_prints_how_to_use_it(capsys):
    assert cli.main([]) == 2
    assert "usage: cream-peft COMMAND" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0


def test_skipping_short_documents_until_none_is_left_names_both_ways_out(line_of):
    line = line_of([*DATA, "short.jsonl", "--short_documents", "skip"], after_progress=True)
    assert "short_documents=skip leaves none of 3 documents" in line
    assert "join or shrink, or lower context_length" in line


def test_the_recall_task_refuses_a_model_of_another_vocabulary(line_of, folder, make_model):
    make_model(vocab_size=400, max_position_embeddings=256).save_pretrained(folder / "other")
    for file in base_folder().glob("tokenizer*"):
        shutil.copy(file, folder / "other")
    line = line_of(["evaluate", "--compare", "./other", "--tasks", "recall", "--no_4bit"], after_progress=True)
    assert "task recall is for the embedded model's vocabulary, ./other has another" in line


def test_a_length_that_the_recall_task_cannot_make_is_refused(line_of):
    line = line_of(["evaluate", "--tasks", "recall", "--lengths", "100"], after_progress=True)
    assert "multiple of 4 and at least 228 tokens, got 100" in line


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_ctrl_c_says_how_to_resume_and_exits_with_130(command, monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupt)
    assert cli.main([command]) == 130
    assert re.fullmatch(r"interrupted, .* resumes.*\n", capsys.readouterr().err)


def test_too_little_gpu_memory_is_said_before_anything_is_loaded(line_of, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        there.setattr(torch.cuda, "mem_get_info", lambda *_: (5 * 2**30, 8 * 2**30))
        there.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: 1.0, raising=False)
        allowed = fit.allowed_gib()
    monkeypatch.setattr(fit, "allowed_gib", lambda: allowed)
    line = line_of(["train", "--config", "llama-2.yaml"])
    assert re.search(r"the plan is [5-9]\.\d GiB, most for weights .* has 5\.0 GiB for it: set \w+: \w+", line)
    assert "`cream-peft plan`" in line


def test_memory_that_runs_out_while_training_is_said_with_its_remedies(line_of, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()):

        def run_out(recipe, error=error):
            raise RuntimeError("in a wrapper") from error

        monkeypatch.setattr(train, "run_recipe", run_out)
        line = line_of(["train"])
        assert all(remedy in line for remedy in ("out of memory", "memory=low", "context_length", "--lengths"))


def test_an_error_that_nobody_foresaw_names_its_type_and_points_to_debug():
    assert errors.explain(KeyError("x")) == "KeyError: 'x' (--debug shows where)"


def test_one_projection_alone_can_be_the_target_of_lora(folder, monkeypatch):
    """TRL unwraps a list of one name, and PEFT reads a bare name as a pattern of whole paths."""
    from cream_peft.train.recipe import parse_recipe

    arguments = parse_recipe(["--lora_target_modules", "q_proj"]).model
    assert ModelConfig(lora_target_modules=["q_proj"]).lora_target_modules == "q_proj"  # control
    assert get_peft_config(arguments).target_modules == {"q_proj"}
    assert get_peft_config(parse_recipe(["--lora_target_modules", "all-linear"]).model).target_modules == "all-linear"


# Real processes, real client, a Hub of our own


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        tiny = Repository.of_folder(base_folder())
        hub.repositories["models/o/tiny"] = tiny
        hub.repositories["models/meta-llama/Llama-2-7b-hf"] = Repository(
            refusal=(401, "GatedRepo", "Access to model meta-llama/Llama-2-7b-hf is restricted. Please log in.")
        )
        answers = {
            "not-logged-in": (401, "GatedRepo", "Access is restricted. Please log in."),
            "not-accepted": (403, "GatedRepo", "Access is restricted and you are not in the authorized list."),
            "bad-token": (401, None, "Invalid credentials in Authorization header"),
            "forbidden": (403, None, "Forbidden"),
            "busy": (429, None, "Too many requests"),
            "failing": (500, None, "Internal error"),
            "down": (503, None, "Service unavailable"),
        }
        for kind in ("models", "datasets"):
            for name, refusal in answers.items():
                hub.repositories[f"{kind}/o/{name}"] = Repository(refusal=refusal)
            hub.repositories[f"{kind}/o/empty"] = Repository({"README.md": b"Nothing here.\n"})
        hub.repositories["datasets/o/columns"] = Repository({"train.jsonl": b'{"body": "hello"}\n'})
        card = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
        rows = {f"{name}.jsonl": b'{"body": "hello"}\n' for name in "ab"}
        hub.repositories["datasets/o/two"] = Repository({"README.md": card.encode(), **rows})
        yield hub


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """That of a user who is online, has no token and an empty cache."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TQDM_"))}
    return mine | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")}


def run_command(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


DRIVER = """
import io, json, os, sys, threading, time, urllib.request

waits, sys.stderr = [], io.StringIO()
time.sleep = waits.append
from cream_peft import cli

for arguments in json.loads(sys.argv[1]):
    if arguments == ["stop"]:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
        threading.Event().wait(0.5)
        continue
    waits.clear()
    before = len(sys.stderr.getvalue())
    code = cli.main(arguments)
    print(json.dumps({"code": code, "lines": sys.stderr.getvalue()[before:].splitlines(), "waited": sum(waits)}))
"""
MODEL_ANSWERS = {
    "o/not-logged-in": ["o/not-logged-in is gated", "not logged in", "{hub}/o/not-logged-in", "`hf auth login`"],
    "o/not-accepted": ["o/not-accepted is gated", "may not read it", "{hub}/o/not-accepted"],
    "o/absent": ["o/absent is neither on this disk nor on the Hub", "spelling", "`hf auth login`"],
    "absent": ["absent is neither on this disk nor on the Hub"],
    "o/bad-token": ["refuses access to o/bad-token (401)", "`hf auth login`"],
    "o/forbidden": ["refuses access to o/forbidden (403)", "token"],
    "o/empty": ["o/empty holds no config.json"],
    "o/busy": ["o/busy, 429", "wait"],
    "o/failing": ["500 for o/failing", "later"],
    "o/down": ["503 for o/down", "later"],
}
DATA_ANSWERS = {
    "o/not-logged-in": ["data set o/not-logged-in is gated", "{hub}/datasets/o/not-logged-in", "`hf auth login`"],
    "o/not-accepted": ["data set o/not-accepted is gated", "may not read it", "{hub}/datasets/o/not-accepted"],
    "o/absent": ["data set o/absent is neither on this disk nor on the Hub", "spelling"],
    "o/forbidden": ["refuses access to data set o/forbidden (403)"],
    "o/empty": ["data set o/empty holds no data files"],
    "o/busy": ["data set o/busy, 429", "wait"],
    "o/down": ["503 for data set o/down"],
    "o/two": ["data set o/two has several configurations", "dataset_config", "'a', 'b'"],
    "o/columns": ["o/columns has the columns body"],
}
OTHER_ANSWERS = [
    (
        ["train", "--config", "llama-2.yaml", "--use_cpu", "true"],
        ["meta-llama/Llama-2-7b-hf is gated", "accept its terms"],
    ),
    ([*MODEL, "o/tiny", "--model_revision", "v9"], ["o/tiny has no such revision", "branch, tag or commit"]),
    ([*DATA, "o/columns", "--dataset_revision", "v9"], ["data set o/columns has no such revision", "dataset_revision"]),
    ([*DATA, "o/columns", "--dataset_train_split", "valid"], ["o/columns", '"valid"', "train"]),
    ([*DATA, "o/two", "--dataset_config", "c"], ["data set o/two has no configuration 'c'", "'a', 'b'"]),
    (["evaluate", "--compare", "o/absent"], ["o/absent is neither"]),
    (["evaluate", "--compare", "o/not-logged-in"], ["o/not-logged-in is gated", "`hf auth login`"]),
    (["evaluate", "--compare", "o/down"], ["503 for o/down"]),
]
"""What the Hub would not give -> what the line must say."""
UNREACHABLE = [
    ([*MODEL, "o/never-seen"], ["o/never-seen is not in the cache", "{hub} cannot be reached", "network"]),
    ([*DATA, "o/never-seen"], ["data set o/never-seen is not in the cache", "cannot be reached"]),
    (["evaluate", "--compare", "o/never-seen"], ["o/never-seen is not in the cache", "cannot be reached"]),
]


def test_what_the_hub_refuses_is_said_in_one_line_and_within_half_a_minute(hub, environment, folder):
    cases = [([*MODEL, name], said) for name, said in MODEL_ANSWERS.items()]
    cases += [([*DATA, name], said) for name, said in DATA_ANSWERS.items()] + OTHER_ANSWERS
    arguments = [arguments for arguments, _ in cases] + [["stop"]] + [arguments for arguments, _ in UNREACHABLE]
    with Hub() as closing:
        closing.repositories = hub.repositories
        mine = environment | {"HF_ENDPOINT": closing.endpoint}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(arguments)],
            cwd=folder, env=mine, capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = []
    for (given, said), answer in zip([*cases, *UNREACHABLE], answers, strict=True):
        *before, line = answer["lines"]
        said = [words.format(hub=closing.endpoint) for words in said]
        missing = [words for words in ["error: ", *said] if words not in line]
        # Of the client's eleven lines about its five retries one is left.
        waiting = ["the Hub does not deliver: trying again, for about half a minute"] if answer["waited"] else []
        if answer["code"] != 2 or missing or before != waiting or answer["waited"] > 30:
            wrong.append((given, missing, answer))
    assert wrong == []
    assert sum(answer["waited"] > 0 for answer in answers) >= 5


def test_a_model_on_the_hub_is_downloaded_and_trained_and_only_news_is_printed(hub, environment, folder, tmp_path):
    run = tmp_path / "run"
    arguments = [
        "--model_name_or_path",
        "o/tiny",
        "--dataset_name",
        "cream-peft-tiny",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
    ]
    arguments += ["--logging_steps", "1", "--output_dir", str(run), "--json", str(tmp_path / "summary.json")]
    done = run_command(["train", *arguments], environment, folder)
    assert done.returncode == 0, done.stderr
    blank, what, *rest = done.stdout.splitlines()
    assert blank == "" and re.fullmatch(r"2 steps in \d+ s, mean loss \d\.\d{3}(, peak memory \d+\.\d\d GiB)?", what)
    assert rest == [
        f"The same as JSON: {tmp_path / 'summary.json'}",
        f"The adapter is in {run}",
        f"Measure it: cream-peft evaluate --compare o/tiny+yarn {run}",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = [
        "output_dir",
        "steps",
        "loss",
        "seconds",
        "peak_gib",
        "redrawn",
        "unlabelled",
        "kind",
        "resumed_step",
        "base",
    ]
    assert list(summary) == parts
    assert (summary["steps"], summary["redrawn"], summary["unlabelled"]) == (2, 0, 0)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "o/tiny"
    assert json.loads((run / "cream.json").read_text())["base_model"] == "o/tiny"
    assert any("/o/tiny/resolve/" in request and request.endswith("/model.safetensors") for request in hub.requests)
    # In a file a line each logging step, no bar.
    *said, first, last = done.stderr.splitlines()
    for step, line in enumerate((first, last), 1):
        assert re.fullmatch(rf"step {step} of 2: loss \d\.\d{{3}}, learning_rate \d\.\d\de[+-]\d\d", line)
    assert said == [
        "training o/tiny for 2 steps: cream positions, 256 tokens per example for a context of 2,048, "
        "RoPE scaling yarn, learning rate 0.003",
        "on 2,500 documents of 640,000 tokens (median 256, 0% shorter than 256): 16,384 tokens will be fed, "
        "0.0256 epochs",
    ]


@pytest.mark.parametrize("target, base", [(512, "cream-peft-tiny+ntk"), (256, "cream-peft-tiny")])
def test_the_command_that_train_names_measures_beside_the_base_with_the_same_rope(
    tmp_path, monkeypatch, capsys, target, base
):
    monkeypatch.chdir(tmp_path)
    lengths = ["--context_length", "128", "--target_length", str(target)]
    assert cli.main(["train", *lengths, "--max_steps", "2", "--output_dir", "my run"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == f"Measure it: cream-peft evaluate --compare {base} 'my run'"
    # Within the window a scaling of the base would be refused.
    command = shlex.split(line)[3:]
    assert cli.main([*command, "--tasks", "needle", "--samples", "1", "--depths", "0.5"]) == 0


def test_the_help_of_train_has_the_keys_of_a_recipe_and_what_the_command_itself_takes(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out.split()
    assert all(option in shown for option in ("--config", "--context_length", "--json"))


def test_train_says_at_its_start_which_settings_of_the_positions_and_against_forgetting_are_set(tmp_path, capsys):
    settings = ["--sigma", "3", "--contiguous_share", "0.5", "--distillation_weight", "1", "--max_steps", "1"]
    assert cli.main(["train", *settings, "--logging_steps", "1", "--output_dir", str(tmp_path)]) == 0
    told = ": cream positions (sigma 3.0, contiguous_share 0.5, distillation_weight 1.0), 256 tokens per example for"
    said = capsys.readouterr().err
    assert told in said and re.search(r"loss[ =]\d\.\d{3}, distillation_loss[ =]\d\.\d{3}", said)


def test_a_path_in_the_home_folder_is_found_and_written_there(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(base_folder(), home / "base")
    (home / "recipe.yaml").write_text(TINY.replace("cream-peft-tiny", "~/base", 1) + "resume_from_checkpoint: ~/run\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert cli.main(["plan", "--config", "~/recipe.yaml", "--json=~/plan.json"]) == 0
    assert cli.main(["plot", "--positions", "--output", "~/positions.png"]) == 0
    asked = ["--tasks", "needle", "--samples", "1", "--lengths", "256"]
    assert cli.main(["evaluate", "--compare", "LABEL=~/base", *asked, "--dump-prompts", "~/prompts"]) == 0
    assert (home / "plan.json").is_file() and (home / "positions.png").is_file()
    assert (home / "prompts" / "LABEL-needle-256.jsonl").is_file()
    recipe = parse_recipe(
        ["--config", "~/recipe.yaml", "--dataset_name", "~/data.jsonl", "--dataset_test_split=~/test"]
    )
    assert recipe.model.model_name_or_path == f"{home}/base" and recipe.run.resume_from_checkpoint == f"{home}/run"
    assert recipe.data.dataset_name == f"{home}/data.jsonl" and recipe.data.dataset_test_split == f"{home}/test"
    assert not list(here.iterdir())
    # Text is no path.
    assert cli.main(["plot", "--positions", "--output", "~/positions.png", "--strategies", "~/pose"]) == 2
    assert "~/pose" in capsys.readouterr().err


def test_trying_the_file_of_json_leaves_what_is_there_as_it_is(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    for name in ("new/below/a.json", "a.json", "old.json"):
        assert terminal.file_to_write(str(tmp_path / name)) == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and (tmp_path / "old.json").read_text() == "{}"


def test_a_text_longer_than_the_window_brings_no_warning_of_its_tokenizer(tiny_tokenizer, monkeypatch, caplog):
    library = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(library, "handlers", [caplog.handler])
    monkeypatch.setattr(library, "filters", [])
    text = " ".join(["k001"] * 257)
    tiny_tokenizer(text)
    assert "257 > 256" in caplog.text  # control
    caplog.clear()
    # It says so once.
    tiny_tokenizer.deprecation_warnings.clear()
    terminal.quiet_libraries()
    tiny_tokenizer(text)
    assert not caplog.records


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_drawn_at_a_terminal_alone(monkeypatch, is_terminal):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    terminal.quiet_libraries()
    assert ("TQDM_DISABLE" in os.environ) == (not is_terminal)


@pytest.mark.parametrize("redrawn, unlabelled, lines", [(0, 0, 0), (3, 0, 1), (16, 1, 2)])
def test_draws_without_labels_are_told_with_their_remedy_where_there_are_any(
    monkeypatch, capsys, redrawn, unlabelled, lines
):
    summary = train.RunSummary("run", 2, 1.0, 3.0, None, redrawn, unlabelled)
    monkeypatch.setattr(train, "run_recipe", lambda recipe: summary)
    assert cli.main(["train"]) == 0
    said = capsys.readouterr().out
    assert ("3 draws held no label" in said) == (redrawn == 3)
    assert ("1 examples held no label" in said) == (unlabelled == 1)
    assert len(re.findall("held no label", said)) == lines == said.count("raise context") + said.count("leave out")


def test_seven_billion_parameters_without_a_gpu_are_refused_before_the_network_is_asked(hub, environment, folder):
    if torch.cuda.is_available():
        environment = environment | {"CUDA_VISIBLE_DEVICES": ""}
    before = len(hub.requests)
    done = run_command(["train", "--config", "llama-2.yaml"], environment, folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: meta-llama/Llama-2-7b-hf has 6.7 billion parameters")
    assert len(hub.requests) == before


def test_refusing_seven_billion_parameters_takes_less_than_a_second(line_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start = time.process_time()
    line_of(["train", "--config", "llama-2.yaml"])
    assert time.process_time() - start < 1


def test_debug_shows_the_traceback(environment, folder):
    done = run_command(["train", "--config", "misspelt.yaml", "--debug"], environment, folder)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "RecipeError: misspelt.yaml: unknown key 'learning_rat'" in done.stderr


def test_ctrl_c_during_training_leaves_no_traceback(environment, folder, tmp_path):
    arguments = ["train", "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2"]
    arguments += ["--max_steps", "5000"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert any("cream positions" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("interrupted, --resume_from_checkpoint true")


CLIENT = vars(_http).get("httpx2") or vars(_http)["httpx"]
LOST = [kind for kind in vars(CLIENT).values() if isinstance(kind, type) and issubclass(kind, CLIENT.TransportError)]


@pytest.mark.parametrize("kind", [*LOST, ConnectionError])
def test_whatever_breaks_a_request_the_line_says_that_the_hub_is_not_reached(kind):
    said = errors.explain(kind("x"))
    assert said.endswith("or give a local folder")


def test_a_broken_pipe_is_none_of_the_hubs():
    assert len(LOST) > 10 and errors.explain(BrokenPipeError(32, "Broken pipe")) == "[Errno 32] Broken pipe"
