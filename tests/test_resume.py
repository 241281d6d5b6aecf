"""Killed runs, several ranks, and results files: they resume from what is left, and nothing else changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cream_peft.evals.results import Results, Settings
from cream_peft.evals.run import evaluate
from cream_peft.tiny import base_folder
from cream_peft.train.checkpoints import CheckpointError, newest_checkpoint
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe

TRAIN = ["--max_steps", "9", "--save_steps", "3", "--lora_dropout", "0.1", "--per_device_train_batch_size", "4",
         "--held_out_documents", "8", "--eval_strategy", "steps", "--eval_steps", "2"]  # fmt: skip


def start(folder, *extra):
    command = [sys.executable, "-m", "cream_peft.cli", "train", *TRAIN, "--output_dir", str(folder), *extra]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after(process, path, seconds=120):
    """SIGKILL as soon as `path` exists; False if the process ended before."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            return False
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def test_a_run_killed_between_two_checkpoints_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed, "--logging_steps", "1")
    assert kill_after(process, killed / "checkpoint-3" / "trainer_state.json"), process.stderr.read().decode()
    assert not (killed / "adapter_model.safetensors").exists() and not (killed / "checkpoint-9").exists()
    (killed / "checkpoint-8").mkdir()  # what a kill in the middle of writing leaves
    (killed / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(killed).folder.name in ("checkpoint-3", "checkpoint-6")
    run_recipe(parse_recipe([*TRAIN, "--output_dir", str(killed), "--resume_from_checkpoint", "true"]))
    run_recipe(parse_recipe([*TRAIN, "--output_dir", str(whole)]))
    resumed, uninterrupted = (load_file(folder / "adapter_model.safetensors") for folder in (killed, whole))
    assert_equal(resumed, uninterrupted)
    early = load_file(whole / "checkpoint-3" / "adapter_model.safetensors")
    assert not all(torch.equal(early[name], uninterrupted[name]) for name in early)  # control: the rest of it counts
    one, other = (json.loads((folder / "cream.json").read_text()) for folder in (killed, whole))
    assert one["steps"] == other["steps"] == 9


SHORT = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2", "--context_length", "64",
         "--target_length", "512", "--load_in_4bit", "false", "--learning_rate", "0.01"]  # fmt: skip


def train(folder, *extra):
    return run_recipe(parse_recipe([*SHORT, "--output_dir", str(folder), *extra]))


def resume(folder, *extra):
    return train(folder, "--resume_from_checkpoint", "true", *extra)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps with checkpoints 2 and 4. Not to be changed: take `run`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished` of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


OTHER_SETTINGS = {
    "rope_scaling_type": (["--rope_scaling_type", "yarn"], "rope_scaling_type=ntk, now yarn"),
    "target_length": (["--target_length", "1024"], "target_length=512, now 1024"),
    "context_length": (["--context_length", "32"], "context_length=64, now 32"),
    "position_strategy": (["--position_strategy", "pose"], "position_strategy=cream, now pose"),
    "sigma": (["--sigma", "1.5"], "sigma=3.0, now 1.5"),
    "short_documents": (["--short_documents", "skip"], "short_documents=shrink, now skip"),
    "seed": (["--seed", "7"], "seed=0, now 7"),
    "data_seed": (["--data_seed", "7"], "data_seed=0, now 7"),
    "quantization": (["--load_in_4bit", "true"], "load_in_4bit=False, now True"),
    "rank": (["--lora_r", "8"], "lora_r=16, now 8"),
    "alpha": (["--lora_alpha", "64"], "lora_alpha=32, now 64"),
    "modules": (["--lora_target_modules", "q_proj"], "lora_target_modules=['k_proj', 'o_proj', 'q_proj', 'v_proj'], "),
    "rslora": (["--use_rslora", "true"], "use_rslora=False, now True"),
    "fewer documents": (["--max_documents", "100"], "dataset_name=2,500 rows, sha256 "),
    "as many other documents": (["--dataset_name", "other.jsonl"], "now 2,500 rows, sha256 "),
    "another base": (["--model_name_or_path", "./base"], "model_name_or_path (base_fingerprint "),
}
"""What differs from `finished` -> (options, what the line must say)."""


@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_a_checkpoint_of_other_settings_is_refused_before_training(setting, finished, monkeypatch, tmp_path):
    options, said = OTHER_SETTINGS[setting]
    monkeypatch.chdir(tmp_path)
    if "other.jsonl" in options:
        rows = [json.dumps({"input_ids": [1 + index % 300] * 70}) for index in range(2500)]
        Path("other.jsonl").write_text("\n".join(rows))
    if "./base" in options:
        shutil.copytree(base_folder(), "base")
        weights = load_file("base/model.safetensors")
        save_file({name: -tensor for name, tensor in weights.items()}, "base/model.safetensors", {"format": "pt"})
    before = contents(finished)
    with pytest.raises(CheckpointError) as refused:
        resume(finished, *options)
    line = str(refused.value)
    assert line.startswith(f"{finished}/checkpoint-4 was trained with ") and said in line
    assert "set it back, choose another output_dir" in line and contents(finished) == before


def test_more_steps_another_batch_and_learning_rate_are_fine_and_said_in_one_line(run, caplog):
    caplog.set_level("INFO", logger="cream_peft")
    changes = ["--max_steps", "5", "--save_steps", "1", "--logging_steps", "1", "--dataloader_num_workers", "1"]
    assert resume(run, *changes).trained == 1
    assert "was trained with" not in caplog.text
    changes = ["--max_steps", "6", "--per_device_train_batch_size", "1", "--learning_rate", "0.1"]
    assert resume(run, *changes).trained == 1
    (line,) = (message for message in caplog.messages if "was trained with" in message)
    assert "learning_rate=0.01, now 0.1; per_device_train_batch_size=2, now 1" in line
    # What that line says.
    groups = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.01}


def test_a_checkpoint_that_says_less_is_resumed(run):
    """As earlier versions wrote them."""
    shutil.rmtree(run / "checkpoint-4")
    path = run / "checkpoint-2" / "cream.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("run_id", "data", "adapter_sha256")}))
    before = load_file(run / "adapter_model.safetensors")
    assert resume(run).trained == 2
    assert_equal(load_file(run / "adapter_model.safetensors"), before)


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_two_ranks_draw_what_one_rank_with_twice_the_accumulation_draws(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "cream_peft.cli", "train"]
    plain = ["--max_steps", "4", "--save_strategy", "no", "--use_cpu", "--load_in_4bit", "false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*torchrun, *plain, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "two")],
        check=True, env=environment, timeout=300,
    )  # fmt: skip
    for name, seed in (("one", 0), ("other", 1)):
        run_recipe(parse_recipe([*plain, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / name),
                                 "--data_seed", str(seed)]))  # fmt: skip
    two, one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("two", "one", "other"))
    gap = max(float((two[name] - one[name]).abs().max()) for name in one)
    control = max(float((other[name] - one[name]).abs().max()) for name in one)
    assert gap < 0.02 * control


def unmeasured(**settings):
    return Results("m", None, {}, 1, Settings(**settings))


def test_an_evaluation_goes_on_where_it_stopped_and_is_not_replaced_by_another_models(tmp_path):
    calls = []

    def task(model, tokenizer, length, samples, seed, done=()):
        if 0.5 in done:
            return
        calls.append(length)
        if length == 30 and len(calls) == 3:
            raise KeyboardInterrupt
        yield {"depth": 0.5, "metric": "accuracy", "value": 1.0, "samples": samples}

    arguments = {"lengths": [10, 20, 30], "samples": 2, "path": tmp_path / "r.json"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, None, {"t": task}, unmeasured(samples=2), **arguments)
    assert [cell.length for cell in Results.read(tmp_path / "r.json").cells] == [10, 20]
    results = evaluate(None, None, {"t": task}, unmeasured(samples=2), **arguments)
    assert calls == [10, 20, 30, 30] and [cell.length for cell in results.cells] == [10, 20, 30]
    with pytest.raises(ValueError, match=r"other settings, adapter_sha256 .*choose another --output_dir"):
        evaluate(None, None, {"t": task}, unmeasured(adapter_sha256="another"), **arguments)
    assert Results.read(tmp_path / "r.json") == results and calls == [10, 20, 30, 30]
