"""Killed runs, several ranks, and results files: they resume from what is left, and nothing else changes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from cream_peft import CREAMTrainer, cli, load_adapter
from cream_peft.evals.models import OpenedModel
from cream_peft.evals.results import Results, Settings
from cream_peft.evals.run import evaluate
from cream_peft.locks import LockedError
from cream_peft.model.check import check_adapter
from cream_peft.model.record import AdapterError, Record, adapter_sha256
from cream_peft.tiny import base_folder
from cream_peft.train.checkpoints import Checkpoint, CheckpointError, checkpoint_folders, newest_checkpoint
from cream_peft.train.collator import ROW_COLUMN, CREAMDataCollator
from cream_peft.train.output import saved_whole
from cream_peft.train.recipe import RecipeError, parse_recipe
from cream_peft.train.run import run_recipe
from cream_peft.train.tokenised import rows_identity

TRAIN = ["--max_steps", "9", "--save_steps", "3", "--lora_dropout", "0.1", "--per_device_train_batch_size", "4",
         "--held_out_documents", "8", "--eval_strategy", "steps", "--eval_steps", "2"]  # fmt: skip


def start(folder, *extra):
    command = [sys.executable, "-m", "cream_peft.cli", "train", *TRAIN, "--output_dir", str(folder), *extra]
    # As many threads as here: on some CPUs sums depend on their number.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


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
         "--target_length", "512", "--load_in_4bit", "false", "--learning_rate", "0.01",
         "--max_documents", "64"]  # fmt: skip


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
    "sigma": (["--sigma", "1.5"], "sigma=None, now 1.5"),
    "contiguous_share": (["--contiguous_share", "0.5"], "contiguous_share=0.0, now 0.5"),
    "target_growth": (["--target_growth", "0.5"], "target_growth=0.0, now 0.5"),
    "short_documents": (["--short_documents", "skip"], "short_documents=shrink, now skip"),
    "distillation": (["--distillation_weight", "1"], "distillation_weight=0.0, now 1.0"),
    "seed": (["--seed", "7"], "seed=0, now 7"),
    "data_seed": (["--data_seed", "7"], "data_seed=0, now 7"),
    "quantization": (["--load_in_4bit", "true"], "load_in_4bit=False, now True"),
    "rank": (["--lora_r", "8"], "lora_r=16, now 8"),
    "alpha": (["--lora_alpha", "64"], "lora_alpha=32, now 64"),
    "modules": (["--lora_target_modules", "q_proj"], "lora_target_modules=['k_proj', 'o_proj', 'q_proj', 'v_proj'], "),
    "rslora": (["--use_rslora", "true"], "use_rslora=False, now True"),
    "optimizer": (["--optim", "adafactor"], "optim=adamw_torch_fused, now adafactor"),
    "schedule": (["--lr_scheduler_type", "linear"], "lr_scheduler_type=cosine_with_min_lr, now linear"),
    "options of the schedule": (
        ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.5}'],
        "lr_scheduler_kwargs={'min_lr_rate': 0.05}, now {'min_lr_rate': 0.5}",
    ),
    "moments": (["--adam_beta1", "0.5"], "adam_beta1=0.9, now 0.5"),
    "clipping": (["--max_grad_norm", "0.01"], "max_grad_norm=1.0, now 0.01"),
    "loss": (["--loss_type", "dft"], "loss_type=nll, now dft"),
    "noise": (["--neftune_noise_alpha", "5"], "neftune_noise_alpha=none, now 5.0"),
    "order": (["--train_sampling_strategy", "sequential"], "train_sampling_strategy=random, now sequential"),
    "dropout": (["--lora_dropout", "0.5"], "lora_dropout=0.0, now 0.5"),
    "weight decay": (["--weight_decay", "0.5"], "weight_decay=0.0, now 0.5"),
    "fewer documents": (["--max_documents", "32"], "other data in dataset_name (64 rows, sha256 "),
    "as many other documents": (["--dataset_name", "other.jsonl"], "now 64 rows, sha256 "),
    "another base": (
        ["--model_name_or_path", "./base", "--dataset_name", "cream-peft-tiny", "--dataset_config", "new_skill"]
        + ["--rope_scaling_type", "ntk", "--seed", "0", "--lr_scheduler_type", "cosine_with_min_lr"]
        + ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.05}'],
        "model_name_or_path (model.embed_tokens.weight ",
    ),
}
"""What differs from `finished` -> (options, what the line must say)."""


@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_a_checkpoint_of_other_settings_is_refused_before_training(setting, finished, monkeypatch, tmp_path):
    options, said = OTHER_SETTINGS[setting]
    monkeypatch.chdir(tmp_path)
    if "other.jsonl" in options:
        rows = [json.dumps({"input_ids": [1 + index % 300] * 70}) for index in range(64)]
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
    assert resume(run, *changes).loss is not None
    assert "was trained with" not in caplog.text
    changes = ["--max_steps", "6", "--per_device_train_batch_size", "1", "--learning_rate", "0.1"]
    changes += ["--logging_steps", "1"]
    assert resume(run, *changes).loss is not None
    (line,) = (message for message in caplog.messages if "was trained with" in message)
    assert "learning_rate=0.01, now 0.1; per_device_train_batch_size=2, now 1: the run goes on so" in line
    # What that line says: the last step is taken at the schedule's share of the new peak.
    groups = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.1}
    (logged,) = (entry["learning_rate"] for entry in Checkpoint.open(run / "checkpoint-6").state["log_history"]
                 if entry["step"] == 6 and "learning_rate" in entry)  # fmt: skip
    assert 0.005 < logged < 0.1 and Record.read(run, "run").settings["learning_rate"] == 0.1


class Rates(TrainerCallback):
    """What each step is taken with, which is not what is logged."""

    def __init__(self):
        self.rates = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates[state.global_step + 1] = optimizer.param_groups[0]["lr"]


def test_a_run_that_is_given_more_steps_goes_on_at_the_rate_of_their_schedule(
    make_model, make_config, make_documents, tiny_tokenizer, lora
):
    def rates(folder, steps, resume=None):
        found = Rates()
        config = make_config(output_dir=folder, max_steps=steps, save_strategy="steps", save_steps=1)
        trainer = CREAMTrainer(
            model=make_model(), args=config, train_dataset=make_documents(), processing_class=tiny_tokenizer,
            peft_config=lora(), callbacks=[found],
        )  # fmt: skip
        trainer.train(resume)
        logged = {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
        return found.rates, logged

    folder = make_config().output_dir
    rates(folder, 3)
    again, logged = rates(folder, 6, True)
    whole, of_whole = rates(f"{folder}-whole", 6)
    assert again == {step: whole[step] for step in (4, 5, 6)} and min(again.values()) > 0
    assert all(logged[step] == of_whole[step] for step in (4, 5, 6) if step in logged)


@pytest.mark.parametrize("asked", [True, False])
def test_in_python_a_run_is_resumed_as_the_config_says_or_said_to_be_overwritten(
    asked, make_model, make_config, make_documents, tiny_tokenizer, lora, caplog
):
    def trainer(**changes):
        return CREAMTrainer(
            model=make_model(), args=make_config(save_strategy="steps", save_steps=1, **changes), peft_config=lora(),
            train_dataset=make_documents(), processing_class=tiny_tokenizer,
        )  # fmt: skip

    trainer(max_steps=2).train()
    assert "overwritten" not in caplog.text
    again = trainer(max_steps=3, resume_from_checkpoint="true" if asked else None)
    again.train()
    assert again.resumed_step == (2 if asked else 0)
    assert ("holds an earlier run, which is overwritten; resume_from" in caplog.text) is not asked
    for folder in checkpoint_folders(Path(again.args.output_dir)):
        (folder / "optimizer.pt").unlink()
    # Asked for and not to be had: what it costs is said all the same.
    caplog.clear()
    trainer(max_steps=1, resume_from_checkpoint="true").train()
    assert "holds an earlier run, which is overwritten\n" in caplog.text


def test_how_a_base_was_quantized_is_recorded_compared_and_loaded_again(tmp_path):
    folder = tmp_path / "run"
    own = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "false"]
    train(folder, *own)
    found = Record.read(folder, "run").quantization
    assert found == {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False}
    with pytest.raises(CheckpointError, match="bnb_4bit_quant_type=fp4, now nf4"):
        resume(folder, "--load_in_4bit", "true", "--use_bnb_nested_quant", "false")
    loaded, _ = load_adapter(folder)
    kind = loaded.base_model.model.config.quantization_config
    assert (kind.bnb_4bit_quant_type, kind.bnb_4bit_use_double_quant) == ("fp4", False)
    assert "a 4-bit (FP4) base" in (folder / "README.md").read_text()
    content = json.loads((folder / "cream.json").read_text())
    (folder / "cream.json").write_text(json.dumps(content | {"quantization": {"bnb_4bit_quant_type": "x"}}))
    with pytest.raises(AdapterError, match="must be of nf4 or fp4"):
        load_adapter(folder)


def test_an_adapter_of_a_16_bit_base_that_is_loaded_in_4_is_said(finished, caplog):
    load_adapter(finished, load_in_4bit=False)
    assert not caplog.text
    load_adapter(finished)
    assert "was trained on a base of 16 bits and is loaded in 4: see load_in_4bit=False" in caplog.text


def test_documents_are_told_apart_by_every_row_and_not_by_where_they_lie(tmp_path):
    rows = [{"input_ids": [number % 300, 7, *range(number % 5)], "labels": [1]} for number in range(2500)]
    found = rows_identity(Dataset.from_list(rows))
    assert found.startswith("2,500 rows, sha256 ")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    numbered = Dataset.from_list([{"labels": [1], ROW_COLUMN: number} | row for number, row in enumerate(rows)])
    shuffled = Dataset.from_list([rows[-1], *rows[:-1]]).select([*range(1, 2500), 0])
    for same in (Dataset.load_from_disk(tmp_path / "saved"), numbered, shuffled):
        assert rows_identity(same) == found
    for number in (0, 1, 777, 1000, 2499):
        changed = [*rows]
        changed[number] = rows[number] | {"input_ids": [299, *rows[number]["input_ids"][1:]]}
        assert rows_identity(Dataset.from_list(changed)) != found
    assert rows_identity(Dataset.from_list(rows).rename_column("labels", "mask")) != found


def test_another_number_of_processes_is_said(run, caplog):
    for checkpoint in run.glob("checkpoint-*"):
        content = json.loads((checkpoint / "cream.json").read_text())
        assert content["settings"]["world_size"] == 1
        content["settings"]["world_size"] = 2
        (checkpoint / "cream.json").write_text(json.dumps(content))
    assert resume(run, "--max_steps", "5").loss is not None
    assert "was trained with world_size=2, now 1: the run goes on so" in caplog.text


def test_another_precision_is_said(run, caplog):
    assert resume(run, "--max_steps", "5", "--dtype", "bfloat16").loss is not None
    assert "was trained with dtype=float32, now bfloat16: the run goes on so" in caplog.text


def test_later_checkpoints_are_said_to_go_where_an_earlier_one_is_named(run, caplog):
    assert train(run, "--resume_from_checkpoint", str(run / "checkpoint-2")).steps == 4
    assert f"checkpoint-4 of {run} will be deleted, since this run goes on from step 2" in caplog.text


def test_what_a_run_has_saved_is_not_overwritten_where_resuming_is_asked_for(run):
    for folder in checkpoint_folders(run):
        shutil.rmtree(folder)
    before = contents(run)
    assert resume(run).loss is None  # the same settings: there is nothing to do
    with pytest.raises(CheckpointError, match=r"no whole checkpoint to resume it from: .*adapter_name_or_path"):
        resume(run, "--max_steps", "9")
    assert contents(run) == before


def test_a_learning_rate_that_was_left_open_is_compared_too(run, caplog):
    for checkpoint in run.glob("checkpoint-*"):
        content = json.loads((checkpoint / "cream.json").read_text())
        (checkpoint / "cream.json").write_text(json.dumps(content | {"recipe": {}}))
    assert resume(run, "--max_steps", "5", "--learning_rate", "0.1").loss is not None
    assert "was trained with learning_rate=0.01, now 0.1: the run goes on so" in caplog.text


def test_weights_alone_are_resumed_with_a_line_that_says_what_begins_anew(run, caplog):
    for checkpoint in run.glob("checkpoint-*"):
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink()
    assert resume(run, "--max_steps", "5", "--save_only_model", "true").loss is not None
    assert "checkpoint-4 holds weights alone: optimizer and learning rate begin anew" in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        (["--dataset_streaming", "true"], "a streamed data set, which begins anew"),
        (["--train_sampling_strategy", "group_by_length"], "data grouped by length, which are grouped anew"),
    ],
)
def test_what_begins_anew_past_its_first_pass_is_said(tmp_path, caplog, options, said):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"input_ids": [n + 1] * 70}) for n in range(6)))
    data = [*options, "--dataset_name", str(tmp_path / "d.jsonl")]
    train(tmp_path / "run", *data)
    for step, is_past in ((2, False), (4, True)):
        caplog.clear()
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"from-{step}")
        train(folder, *data, "--max_steps", "5", "--resume_from_checkpoint", checkpoint)
        assert (f"is past the first pass over {said}" in caplog.text) == is_past


def test_a_run_that_goes_on_with_larger_batches_draws_nothing_twice(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"input_ids": [n + 1] * 70}) for n in range(6)))
    data, epochs = ["--dataset_name", str(tmp_path / "d.jsonl")], []
    train(tmp_path / "run", *data)
    monkeypatch.setattr(CREAMDataCollator, "set_epoch", lambda self, epoch: epochs.append(epoch))
    train(tmp_path / "run", *data, "--max_steps", "6", "--per_device_train_batch_size", "6",
          "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4"))  # fmt: skip
    assert epochs == [4, 5]  # a pass is a step now


def test_an_infinite_sigma_is_recorded_as_json_and_resumed(tmp_path):
    train(tmp_path, "--sigma", "inf")
    file = tmp_path / "cream.json"
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["positions"]["options"]["sigma"] == content["recipe"]["sigma"] == "inf"
    assert resume(tmp_path, "--sigma", "inf").loss is None
    with pytest.raises(CheckpointError, match="sigma=inf, now None"):
        resume(tmp_path)


def test_a_growing_target_is_refused_for_a_stream(tmp_path):
    with pytest.raises(ValueError, match=r"target_growth=0.5 cannot go with a streamed data set"):
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"input_ids": [n + 1] * 70}) for n in range(9)))
        data = ["--dataset_streaming", "true", "--dataset_name", str(tmp_path / "d.jsonl")]
        train(tmp_path / "run", *data, "--target_growth", "0.5")


GROWING = ["--target_growth", "1", "--contiguous_share", "0.2", "--gradient_accumulation_steps", "2"]
GROWING += ["--held_out_documents", "4", "--eval_strategy", "steps", "--eval_steps", "1"]


@pytest.mark.parametrize("extra", [[], ["--max_steps", "-1", "--num_train_epochs", "2", "--max_documents", "10"]])
def test_a_growing_target_is_resumed_where_it_stood(extra, tmp_path, monkeypatch):
    """Ten documents, four of them held out: an epoch has a step of two batches and one of a single batch."""
    whole = tmp_path / "whole"
    train(whole, *GROWING, *extra)
    folders = {"resumed": shutil.copytree(whole, tmp_path / "resumed"), "control": tmp_path / "control"}
    shutil.rmtree(folders["resumed"] / "checkpoint-4")
    (folders["resumed"] / "cream.json").unlink()
    shutil.copytree(folders["resumed"], folders["control"])
    resume(folders["resumed"], *GROWING, *extra)
    expected = load_file(whole / "adapter_model.safetensors")
    assert_equal(load_file(folders["resumed"] / "adapter_model.safetensors"), expected)
    # The control: a target that starts again when the run is resumed.
    set_progress = CREAMDataCollator.set_progress
    monkeypatch.setattr(CREAMDataCollator, "set_progress", lambda self, step, *rest: set_progress(self, 0, *rest))
    resume(folders["control"], *GROWING, *extra)
    control = load_file(folders["control"] / "adapter_model.safetensors")
    assert not all(torch.equal(control[name], expected[name]) for name in expected)


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


EPOCHS = ["--max_steps", "-1", "--num_train_epochs", "2", "--max_documents", "6"]
SETUPS = {
    "steps": [],
    "a last checkpoint between two": ["--save_steps", "3"],
    "epochs": [*EPOCHS, "--save_strategy", "epoch"],
    "the best model": ["--held_out_documents", "4", "--eval_strategy", "steps", "--eval_steps", "2",
                       "--load_best_model_at_end", "true"],
    # The highest loss is that of the first checkpoint.
    "the best model alone": ["--held_out_documents", "4", "--eval_strategy", "steps", "--eval_steps", "2",
                             "--load_best_model_at_end", "true", "--save_total_limit", "1",
                             "--greater_is_better", "true"],
    "no checkpoints": ["--save_strategy", "no"],
    "a stream": ["--dataset_streaming", "true", "--dataset_name", "documents.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
def test_a_finished_run_is_not_trained_further(setup, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("documents.jsonl").write_text("\n".join(json.dumps({"input_ids": [n + 1] * 70}) for n in range(9)))
    folder = tmp_path / "run"
    steps = train(folder, *SETUPS[setup]).steps
    before = contents(folder)
    caplog.set_level("INFO", logger="cream_peft")
    summary = resume(folder, *SETUPS[setup])
    assert (summary.steps, summary.loss) == (steps, None) and contents(folder) == before
    assert f"finished at step {steps} of {steps}" in caplog.text


def test_a_run_that_is_resumed_for_fewer_steps_than_it_has_is_refused(run):
    before = contents(run)
    with pytest.raises(RecipeError, match=r"max_steps=2, and .*checkpoint-4 has 4 steps already: raise it"):
        resume(run, "--max_steps", "2")
    assert contents(run) == before
    assert train(run, "--max_steps", "3", "--resume_from_checkpoint", str(run / "checkpoint-2")).resumed_step == 2


@pytest.mark.parametrize("own", [False, True])
def test_the_embedded_recipe_is_named_where_it_trains_on_data_of_ones_own(own, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("\n".join(json.dumps({"input_ids": [n + 1] * 70}) for n in range(9)))
    caplog.set_level("INFO", logger="cream_peft")
    train(tmp_path / "run", "--max_steps", "1", "--save_strategy", "no", *(["--dataset_name", "mine.jsonl"] * own))
    assert ("what is not given is as in the recipe of the embedded model" in caplog.text) == own


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "cream.json", "base_config/config.json", "replaced"])
def test_a_final_save_that_is_missing_is_written_from_the_last_checkpoint(lost, run):
    before = contents(run)
    if lost == "replaced":
        shutil.copy(run / "checkpoint-2" / "adapter_model.safetensors", run)
    else:
        (run / lost).unlink()
    assert resume(run).loss is None
    assert contents(run).keys() == before.keys()
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_config/config.json"):
        assert (run / name).read_bytes() == before[Path(name)]
    assert Record.read(run, "run").steps == 4


def test_an_earlier_runs_adapter_is_not_taken_for_the_final_save(run, tmp_path):
    """As after a kill between the last checkpoint and the final save of a run that overwrites another."""
    other = ["--learning_rate", "0.001"]
    train(tmp_path / "other", *other)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
        shutil.copytree(tmp_path / "other" / name, run / name)
    assert resume(run, *other).loss is None
    assert adapter_sha256(run) == adapter_sha256(tmp_path / "other")


PARTS = ["adapter_model.safetensors", "adapter_config.json", "base_config/config.json", "cream.json", "optimizer.pt",
         "scheduler.pt", "rng_state.pth", "trainer_state.json"]  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_a_part_is_passed_over(part, damage, run, caplog):
    file = run / "checkpoint-4" / part
    assert newest_checkpoint(run).step == 4  # control
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    os.utime(run / "checkpoint-4")
    assert newest_checkpoint(run).step == 2
    (line,) = caplog.messages
    assert line.startswith(f"passed over: {run}/checkpoint-4 ") and Path(part).stem in line
    with pytest.raises(CheckpointError, match=r"checkpoint-4 .*choose another checkpoint"):
        train(run, "--resume_from_checkpoint", str(run / "checkpoint-4"))


def test_of_models_alone_no_optimizer_is_asked(tmp_path):
    train(tmp_path, "--save_only_model", "true")
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path, only_model=True).step == 4
    assert resume(tmp_path, "--save_only_model", "true").loss is None


def test_deleting_from_a_checkpoint_does_not_make_it_the_newest(run):
    (run / "checkpoint-2" / "tokenizer.json").unlink()
    assert (run / "checkpoint-2").stat().st_mtime_ns > (run / "checkpoint-4").stat().st_mtime_ns  # control
    assert newest_checkpoint(run).step == 4


def test_a_run_that_overwrites_another_removes_its_checkpoints_with_its_own_first(run, monkeypatch, caplog):
    before = contents(run)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(CREAMTrainer, "training_step", interrupt)
        train(run, "--seed", "3")
    assert contents(run) == before
    train(run, "--max_steps", "3", "--save_steps", "1", "--seed", "3")
    assert "holds an earlier run, which is overwritten" in caplog.text
    found = [Checkpoint.open(path) for path in checkpoint_folders(run)]
    assert [one.step for one in found] == [1, 2, 3] and {one.record.seed for one in found} == {3}
    # One that is resumed, here with other save_steps, keeps its own, up to where it is resumed.
    changed = ["--max_steps", "3", "--save_steps", "3", "--seed", "3"]
    train(run, *changed, "--resume_from_checkpoint", str(run / "checkpoint-1"))
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-1", "checkpoint-3"]


def test_the_newest_checkpoint_is_of_the_last_run_not_of_the_one_it_overwrote(run, tmp_path):
    """Where an earlier version left both."""
    train(tmp_path / "other", "--max_steps", "3", "--save_steps", "1")
    for step in (2, 1, 3):  # copied without their times
        shutil.copytree(tmp_path / "other" / f"checkpoint-{step}", run / f"checkpoint-{step}", dirs_exist_ok=True)
        (run / f"checkpoint-{step}" / "trainer_state.json").touch()
    (run / "checkpoint-1" / "trainer_state.json").touch()
    assert newest_checkpoint(run).step == 3


@pytest.mark.parametrize("stopped_at", range(8))
def test_a_final_save_that_is_killed_leaves_no_mixture(stopped_at, finished, tmp_path, monkeypatch):
    older = {
        name: f"older {name}".encode() for name in ("adapter_model.safetensors", "adapter_config.json", "vocab.txt")
    }
    mine = dict.fromkeys(("mine.txt", "mine.jinja"), b"stays")
    older |= {"cream.json": b"{}"} | mine
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    calls, replace = [], os.replace

    def stop(*names):
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        calls.append(names)
        replace(*names)

    def save():
        with saved_whole(tmp_path) as aside:
            shutil.copytree(finished, aside, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
            assert {name: (tmp_path / name).read_bytes() for name in older} == older

    monkeypatch.setattr(os, "replace", stop)
    if stopped_at < 7:
        with pytest.raises(KeyboardInterrupt):
            save()
        with pytest.raises(AdapterError, match=r"has no"):
            Record.read(tmp_path, "run")
        assert not (tmp_path / "cream.json").exists()
    else:
        save()
        assert Record.read(tmp_path, "run").steps == 4
        whole = {name: content for name, content in contents(finished).items() if name.parts[0][:5] != "check"}
        assert contents(tmp_path) == whole | {Path(name): content for name, content in mine.items()}


def test_weights_beside_another_cream_json_are_wrong(run):
    assert "wrong" not in {finding.verdict for finding in check_adapter(run)}  # control
    for folder, other in ((run, run / "checkpoint-2"), (run / "checkpoint-4", run / "checkpoint-2")):
        shutil.copy(other / "adapter_model.safetensors", folder)
    assert [finding.item for finding in check_adapter(run) if finding.verdict == "wrong"] == ["cream.json"]
    assert newest_checkpoint(run).step == 2


HOLD = """
import sys, time
sys.path[:] = {path!r}
from pathlib import Path
from cream_peft.locks import locked
with locked(Path({lock!r}), "no"):
    print(flush=True)
    time.sleep(60)
"""


def hold(lock):
    """Another process that holds the lock file."""
    program = HOLD.format(path=sys.path, lock=str(lock))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends_however(run):
    before = contents(run)
    process = hold(run / ".lock")
    with pytest.raises(LockedError, match=r"output_dir=.*another run is training there: wait"):
        resume(run)
    process.kill()
    process.wait()
    assert (run / ".lock").exists()
    resume(run)
    assert contents(run) == before


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
    retrained = unmeasured(adapter_sha256="another", samples=2)
    anew = evaluate(None, None, {"t": task}, retrained, **arguments, overwrite=True)
    assert calls[4:] == [10, 20, 30] and anew.settings.adapter_sha256 == "another"
    # What was measured with the same settings is resumed all the same.
    assert evaluate(None, None, {"t": task}, retrained, **arguments, overwrite=True) == anew and len(calls) == 7


EVALUATE = ["evaluate", "--tasks", "kv_retrieval", "--lengths", "256", "--depths", "0.5", "--no_4bit"]


def test_all_results_files_are_checked_before_a_model_is_measured(tmp_path, capsys, monkeypatch):
    common = [*EVALUATE, "--output_dir", str(tmp_path), "--compare"]
    assert cli.main([*common, "b=cream-peft-tiny+ntk", "--samples", "2"]) == 0
    loaded = []
    monkeypatch.setattr(OpenedModel, "load", lambda *_: loaded.append(1) or interrupt())
    both = ["a=cream-peft-tiny", "b=cream-peft-tiny+ntk", "--samples", "3"]
    assert cli.main([*common, *both]) == 2 and not loaded
    said = f"error: {tmp_path}/b.json was measured with other settings, samples (2, now 3): choose another --output_dir"
    assert capsys.readouterr().err.splitlines()[-1] == said + ", or replace it with --overwrite"
    before = Results.read(tmp_path / "b.json")
    assert cli.main([*common, *both, "--overwrite"]) == 130 and loaded  # control
    assert Results.read(tmp_path / "b.json") == before
    assert cli.main([*common, "a b=cream-peft-tiny", "a-b=cream-peft-tiny+ntk"]) == 2
    assert "two labels have one results file (a b, a-b): choose others" in capsys.readouterr().err
    words = ["lm-eval", "--tasks", "arc_easy", "--output_dir", str(tmp_path), "--compare"]
    assert cli.main([*words, "a b=cream-peft-tiny", "a-b=cream-peft-tiny+ntk"]) == 2
    assert "two labels have one results file (a b, a-b): choose others" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json"]


def test_results_that_another_process_writes_are_refused(tmp_path, capsys):
    process = hold(tmp_path / ".m.json.lock")
    assert cli.main([*EVALUATE, "--output_dir", str(tmp_path), "--compare", "m=cream-peft-tiny"]) == 2
    assert f"{tmp_path}/m.json is being written by another `cream-peft evaluate`: wait" in capsys.readouterr().err
    process.kill()
    process.wait()


def test_a_failing_data_set_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none.jsonl", "o/none"):
        assert cli.main(["train", *SHORT, "--dataset_name", name, "--output_dir", "run"]) == 2
        assert name in capsys.readouterr().err.splitlines()[-1] and not Path("run").exists()
    Path("run").mkdir()
    assert cli.main(["train", *SHORT, "--dataset_name", name, "--output_dir", "run"]) == 2
    assert Path("run").exists()  # control: it was there before


def in_a_finalizer(number):
    class Finalized:
        def __del__(self):
            signal.raise_signal(number)

    Finalized()  # what is raised in there, Python ignores


def in_a_callback(number):
    gone = weakref.ref(kept := type("Referred", (), {})(), lambda _: signal.raise_signal(number))
    del kept
    assert gone() is None


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["train", "evaluate", "chat"])
@pytest.mark.parametrize("send", [signal.raise_signal, in_a_finalizer, in_a_callback])
def test_a_signal_ends_every_command_as_ctrl_c_does(send, command, number, code, monkeypatch, capsys):
    def stay(arguments):
        send(number)
        time.sleep(5)
        raise AssertionError("the command went on")

    def unhandled(*arguments):
        raise AssertionError("the signal would have killed the command")

    earlier = {number: signal.signal(number, unhandled) for number in (signal.SIGTERM, signal.SIGHUP)}
    # A shell may have started the tests in the background, where Ctrl-C is ignored.
    earlier[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setitem(cli.COMMANDS, command, stay)
    try:
        assert cli.main([command]) == code
        assert signal.getsignal(signal.SIGTERM) is unhandled
        assert re.fullmatch(r"interrupted(, .* resumes.*)?\n", capsys.readouterr().err)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        monkeypatch.setitem(cli.COMMANDS, command, lambda arguments: signal.raise_signal(signal.SIGHUP))
        assert cli.main([command]) == 0
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
