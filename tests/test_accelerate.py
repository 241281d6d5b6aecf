"""Several processes: the configs for accelerate, and two ranks against one with twice the accumulation."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers.training_args import ParallelMode

from cream_peft import CREAMConfig, cli
from cream_peft.model import base as model
from cream_peft.tiny import TINY_ID
from cream_peft.train.recipe import EMBEDDED_RECIPE, parse_recipe

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp-qlora": DistributedType.FSDP,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
}
PER_CONFIG = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def command_of(path):
    """The words of the header's command, with a recipe in RECIPE's place."""
    comments = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    start = next(index for index, line in enumerate(comments) if line.startswith("Command:"))
    words = [comments[start].removeprefix("Command:")]
    for line in comments[start + 1 :]:
        if not line.startswith("--"):
            break
        words.append(line)
    return shlex.split(" ".join(words).replace("RECIPE", str(EMBEDDED_RECIPE)))


def test_there_is_a_config_for_each_way():
    assert {path.stem for path in CONFIGS} == set(TYPES)


@PER_CONFIG
def test_accelerate_understands_the_config_and_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert config.distributed_type == TYPES[path.stem]
    # accelerate's bf16 would have its way where the recipe says no.
    assert (config.num_processes, config.mixed_precision) == (2, "no" if path.stem == "ddp" else "bf16")
    accelerate, launch, *words = command_of(path)
    assert (accelerate, launch) == ("accelerate", "launch")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    ways = {"ddp": arguments.multi_gpu, "fsdp-qlora": arguments.use_fsdp, "deepspeed-zero3": arguments.use_deepspeed}
    assert [name for name, chosen in ways.items() if chosen] == [path.stem]
    assert arguments.module and arguments.training_script == "cream_peft.cli"
    command, *options = arguments.training_script_args
    recipe = parse_recipe(options)
    assert command == "train"
    assert recipe.model.load_in_4bit == (path.stem != "deepspeed-zero3")
    if path.stem == "fsdp-qlora":
        # accelerate shares out 4-bit weights only where they are stored in a floating-point type.
        assert recipe.model.bnb_4bit_quant_storage == "bfloat16" and arguments.fsdp_version == 2
    if path.stem != "ddp":
        assert "bit" not in recipe.run.optim


@PER_CONFIG
def test_the_header_says_what_it_is_for_and_what_was_run(path):
    text = path.read_text()
    assert all(f"# {name}:" in text for name in ("Purpose", "Hardware", "Command", "Run"))
    assert "not run" in text.lower()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_that_zero_3_shares_out_is_not_put_on_one_gpu(monkeypatch, sharded):
    asked = {}

    class Stop(Exception):
        pass

    def from_pretrained(source, **kwargs):
        asked.update(kwargs)
        raise Stop

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(model, "is_deepspeed_zero3_enabled", lambda: sharded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(Stop):
        model.load_base(TINY_ID, dtype="bfloat16", load_in_4bit=False, attn_implementation="sdpa")
    assert asked.get("device_map") == (None if sharded else {"": 1})


def test_the_config_for_ddp_and_its_page_say_what_cpus_need():
    ddp = (ROOT / "recipes" / "accelerate" / "ddp.yaml").read_text()
    assert "`--use_cpu true`" in ddp
    assert "On CPUs add `--use_cpu true`" in (ROOT / "recipes" / "README.md").read_text()


def test_processes_that_would_train_apart_are_refused_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(CREAMConfig, "parallel_mode", ParallelMode.NOT_PARALLEL)
    arguments = ["train", "--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: 2 processes") and "--use_cpu true" in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "bench"])
def test_one_process_for_several_gpus_is_refused_before_the_base_is_loaded(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(CREAMConfig, "parallel_mode", ParallelMode.NOT_DISTRIBUTED)
    monkeypatch.setattr(CREAMConfig, "n_gpu", 2)
    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    output = ["--output_dir", str(tmp_path / "run")] if command == "train" else []
    assert cli.main([command, *output]) == 2
    assert "2 GPUs are there for one process: choose one with CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False])
def test_two_cpu_processes_train_together_with_use_cpu_and_not_at_all_without(tmp_path, together):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[0])]
    arguments = ["-m", "cream_peft.cli", "train", "--max_steps", "1", "--max_documents", "32", "--output_dir", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [*launcher, *arguments, *(["--use_cpu", "true"] if together else [])]
    done = subprocess.run(words, cwd=tmp_path, env=environment, timeout=300, capture_output=True, text=True)
    assert (done.returncode == 0) == together == (tmp_path / "run").exists()
    assert ("would train apart" in done.stderr) != together


RECORDER = """
import json, os, sys
from cream_peft.train import run as train
from cream_peft.train.recipe import parse_recipe

draws = []

class Recorder(train.CREAMTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        draws.extend(zip(inputs["input_ids"].tolist(), inputs["position_ids"].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)

train.CREAMTrainer = Recorder
loss = train.run_recipe(parse_recipe(sys.argv[2:])).loss
with open(sys.argv[1] + os.environ.get("RANK", "0"), "w") as file:
    json.dump({"loss": loss, "draws": draws}, file)
"""


@pytest.mark.slow
def test_two_ranks_have_the_draws_the_loss_and_the_weights_of_one_with_twice_the_accumulation(tmp_path):
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)
    shared = ["--max_steps", "4", "--save_strategy", "no", "--use_cpu", "true", "--load_in_4bit", "false", "--memory"]
    shared += ["low", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "true"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node"]

    def run(name, ranks, accumulation):
        arguments = [str(script), str(tmp_path / name), *shared, "--output_dir", str(tmp_path / f"run-{name}")]
        arguments += ["--gradient_accumulation_steps", str(accumulation)]
        launcher = [*torchrun, str(ranks)] if ranks > 1 else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *launcher, *arguments], env=environment, check=True, timeout=300, capture_output=True
        )
        assert b"find_unused_parameters" not in done.stderr
        return [json.loads((tmp_path / f"{name}{rank}").read_text()) for rank in range(ranks)]

    (first, second), (alone,), (half,) = run("two", 2, 1), run("one", 1, 2), run("half", 1, 1)
    drawn = [{json.dumps(draw) for draw in rank["draws"]} for rank in (first, second, alone)]
    assert [len(draws) for draws in drawn] == [16, 16, 32]
    assert drawn[0].isdisjoint(drawn[1]) and drawn[0] | drawn[1] == drawn[2]
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert half["loss"] != pytest.approx(alone["loss"], abs=1e-3)  # control: what one rank's draws alone give
    two, one, other = (load_file(tmp_path / f"run-{n}" / "adapter_model.safetensors") for n in ("two", "one", "half"))
    gap, control = (max(float((w[name] - one[name]).abs().max()) for name in one) for w in (two, other))
    assert gap < 0.02 * control
