"""Killed runs, several ranks, and results files: they resume from what is left, and nothing else changes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from cream_peft.evals.results import Results, Settings
from cream_peft.evals.run import evaluate
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import newest_checkpoint, run_recipe

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
    assert newest_checkpoint(killed).name in ("checkpoint-3", "checkpoint-6")
    run_recipe(parse_recipe([*TRAIN, "--output_dir", str(killed), "--resume_from_checkpoint", "true"]))
    run_recipe(parse_recipe([*TRAIN, "--output_dir", str(whole)]))
    resumed, uninterrupted = (load_file(folder / "adapter_model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    early = load_file(whole / "checkpoint-3" / "adapter_model.safetensors")
    assert not all(torch.equal(early[name], uninterrupted[name]) for name in early)  # control: the rest of it counts
    one, other = (json.loads((folder / "cream.json").read_text()) for folder in (killed, whole))
    assert one["steps"] == other["steps"] == 9


def test_the_newest_checkpoint_is_of_the_last_run_not_of_the_one_it_overwrote(tmp_path):
    for age, name in enumerate(["checkpoint-24", "checkpoint-9", "checkpoint-12"]):  # 24 is of an earlier run
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        os.utime(folder, ns=(age, age))
    assert newest_checkpoint(tmp_path).name == "checkpoint-12"


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
