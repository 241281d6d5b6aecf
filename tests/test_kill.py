"""SIGKILL at random moments: what was saved is whole, and the same command ends as an uninterrupted one does."""

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from cream_peft import cli
from cream_peft.evals.results import Results
from cream_peft.model.adapter import open_adapter
from cream_peft.model.check import check_adapter
from cream_peft.model.record import AdapterError, Record, adapter_sha256
from cream_peft.train import run
from cream_peft.train.recipe import parse_recipe

# Processes that start with everything imported: each of them is killed within a second or two.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["cream_peft.train.run", "cream_peft.evals.run", "cream_peft.evals.table"])

TRAIN = ["train", "--max_steps", "8", "--save_steps", "2", "--save_total_limit", "2", "--lora_dropout", "0.1",
         "--per_device_train_batch_size", "2", "--context_length", "64", "--target_length", "512", "--load_in_4bit",
         "false", "--resume_from_checkpoint", "true", "--output_dir"]  # fmt: skip
EVALUATE = ["evaluate", "--tasks", "kv_retrieval", "needle", "--lengths", "256", "512", "--depths", "0.1", "0.9",
            "--samples", "4", "--no_4bit", "--compare", "a=cream-peft-tiny", "b=cream-peft-tiny+ntk",
            "--output_dir"]  # fmt: skip


def call(log, function, *arguments):
    """In another process: `function`, what it prints going to the file `log`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def started(log, began, function, *arguments):
    """A process that has made the file `began`, and when it had."""
    began.unlink(missing_ok=True)
    process = processes.Process(target=call, args=(log, function, *arguments))
    process.start()
    end = time.monotonic() + 120
    while not began.exists() and process.is_alive():
        assert time.monotonic() < end, Path(log).read_text()
        time.sleep(0.002)
    return process, time.monotonic()


def finish(process, log):
    process.join(300)
    assert process.exitcode == 0, Path(log).read_text()


def killed_at_random(kills, seed, seconds, start, check):
    """Kill what `start()` starts, so many times, within `seconds`, and `check()` what is left each time."""
    moments = random.Random(seed)
    while kills:
        process, began = start()
        time.sleep(max(0.0, began + moments.uniform(0, seconds) - time.monotonic()))
        process.kill()
        process.join(60)
        kills -= process.exitcode != 0
        check()


def whole_or_incomplete(folder):
    """Whether an adapter is there; one that is wrong fails."""
    try:
        open_adapter(folder)
    except AdapterError as error:
        assert "has no" in str(error) and not (folder / "cream.json").exists()
        return False
    assert "wrong" not in {finding.verdict for finding in check_adapter(folder)}
    return True


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_training_ends_with_the_weights_of_an_uninterrupted_run(kills, tmp_path):
    log, whole, folder = tmp_path / "log", tmp_path / "whole", tmp_path / "run"
    process, began = started(log, whole / ".lock", cli.main, [*TRAIN, str(whole)])
    finish(process, log)
    seconds, adapters = time.monotonic() - began, []

    def start():
        return started(log, folder / ".lock", cli.main, [*TRAIN, str(folder)])

    def check():
        if whole_or_incomplete(folder):
            assert adapter_sha256(folder) == adapter_sha256(whole)
            adapters.append(folder.rename(tmp_path / f"run-{len(adapters)}"))

    killed_at_random(kills, 1, seconds, start, check)
    finish(start()[0], log)
    assert whole_or_incomplete(folder) and adapter_sha256(folder) == adapter_sha256(whole)


@pytest.mark.parametrize("kills", [pytest.param(8, marks=pytest.mark.slow)])
def test_killed_final_saves_leave_a_whole_adapter_or_an_incomplete_one(kills, tmp_path):
    log, folder, found = tmp_path / "log", tmp_path / "run", []
    began = folder / "cream.json"

    def check():
        found.append(whole_or_incomplete(folder))

    killed_at_random(kills, 2, 1.2, lambda: started(log, began, save_again_and_again, str(folder)), check)
    assert any(found)


def slowly(function, seconds):
    def wait_first(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return wait_first


def save_again_and_again(folder):
    """On a slow disk: half of the time goes into what may become a mixture."""

    def save(trainer, checkpoint):
        for _ in itertools.count():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data += 1
            trainer.save_model()

    Record.write, os.replace = slowly(Record.write, 0.1), slowly(os.replace, 0.05)
    run._train_and_save = save
    run.run_recipe(parse_recipe([*TRAIN[1:], folder]))


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_evaluation_ends_with_the_cells_of_an_uninterrupted_one(kills, tmp_path):
    log, whole, folder = tmp_path / "log", tmp_path / "whole", tmp_path / "results"
    process, began = started(log, whole / ".a.json.lock", cli.main, [*EVALUATE, str(whole)])
    finish(process, log)
    seconds = time.monotonic() - began

    def cells(path):
        return [(c.task, c.length, c.depth, c.value, c.samples, c.correct) for c in Results.read(path).cells]

    def check():
        for path in folder.glob("*.json"):
            found, wanted = cells(path), cells(whole / path.name)
            assert found == wanted[: len(found)]
        if all(
            (folder / name).exists() and cells(folder / name) == cells(whole / name) for name in ("a.json", "b.json")
        ):
            # Nothing is left in which to be killed.
            shutil.rmtree(folder)

    def start():
        return started(log, folder / ".a.json.lock", cli.main, [*EVALUATE, str(folder)])

    killed_at_random(kills, 3, seconds, start, check)
    finish(start()[0], log)
    for name in ("a.json", "b.json"):
        assert cells(folder / name) == cells(whole / name) != []
