"""Self-distillation: the teacher is the untouched base, and nothing but a second gradient comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from conftest import WINDOW, estimate
from datasets import Dataset
from safetensors.torch import load_file
from test_memory import TOKENS, LiveBytes, bytes_of, small
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from cream_peft import CREAMTrainer, cli, load_adapter
from cream_peft.model.base import load_base
from cream_peft.plan.advice import training_flops
from cream_peft.plan.memory import Training
from cream_peft.tiny import base_folder
from cream_peft.tiny.documents import MARK, evaluate_recall
from cream_peft.train.distillation import as_base, cosine_distance, last_hidden_states
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe

IDS = torch.arange(1, WINDOW + 1)[None] * 5 % 385
WEIGHT = {"distillation_weight": 2.0, "distillation_length": WINDOW // 2}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def make_trainer(make_model, make_documents, make_config, tiny_tokenizer, lora):
    def make(documents=None, cls=CREAMTrainer, dropout=0.0, model=None, peft_config="default", **changes):
        return cls(
            model=make_model() if model is None else model,
            args=make_config(**changes),
            train_dataset=documents if documents is not None else make_documents(),
            processing_class=tiny_tokenizer,
            peft_config=lora(lora_dropout=dropout) if peft_config == "default" else peft_config,
        )

    return make


@pytest.fixture
def short_documents(make_documents):
    """Of 40 and of 12 tokens, in turns: every batch is padded."""
    rows = make_documents(16)["input_ids"]
    return Dataset.from_dict({"input_ids": [row[: 12 if index % 2 else 40] for index, row in enumerate(rows)]})


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logits(model):
    return model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


@pytest.mark.parametrize("scaling", ["yarn", "ntk", "linear"])
def test_the_teacher_is_the_untouched_base_also_after_training_and_the_student_stays_as_it_was(
    make_trainer, make_model, scaling
):
    trainer = make_trainer(rope_scaling_type=scaling, dropout=0.5, max_steps=3, **WEIGHT)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        untouched, before = logits(make_model().eval()), logits(model)
        with model.disable_adapter():
            scaled = logits(model)
        with as_base(model, trainer.scaled_config):
            teacher = logits(model)
        after = logits(model)
    assert torch.equal(teacher, untouched) and torch.equal(before, after)
    assert (scaled - untouched).abs().max() > 1e-3  # control: the adapter off, and RoPE still scaled
    assert (before - scaled).abs().max() > 1e-3  # control: the adapter has learned
    assert model.config.rope_parameters == trainer.scaled_config.rope_parameters
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_whole_model_that_was_published_is_a_base_with_its_own_window_and_rope(
    make_trainer, make_model, tmp_path, scaling, is_loaded
):
    whole, longer = tmp_path / "whole", 2048
    make_trainer(model=make_model(), peft_config=None, rope_scaling_type=scaling, target_length=512).save_model(
        str(whole)
    )
    base = AutoModelForCausalLM.from_pretrained(whole).eval()
    model = base if is_loaded else str(whole)
    with torch.no_grad():
        untouched = logits(base)
        trainer = make_trainer(model=model, rope_scaling_type=None, target_length=512, **WEIGHT)
        trainer.model.eval()
        assert trainer.pretrained_window == 512 and torch.equal(logits(trainer.model), untouched)
        with as_base(trainer.model, trainer.scaled_config):
            assert torch.equal(logits(trainer.model), untouched)
    again = make_trainer(model=str(whole), rope_scaling_type=scaling, target_length=longer).scaled_config
    assert again.rope_parameters["factor"] == longer / 64  # 64, the window that it was made with


def test_an_error_of_the_teacher_leaves_the_scaled_rope_the_adapter_and_dropout_on(make_trainer):
    trainer = make_trainer(rope_scaling_type="yarn", dropout=0.5)
    model = trainer.model.train()
    rotary = model.get_base_model().model.rotary_emb
    scaled, factor = rotary.inv_freq.clone(), rotary.attention_scaling
    with pytest.raises(RuntimeError, match="out of memory"), as_base(model, trainer.scaled_config):
        # Control: in there all three are off.
        assert not torch.equal(rotary.inv_freq, scaled) and rotary.attention_scaling == 1.0 != factor
        assert not any(module.training for module in model.modules())
        raise RuntimeError("out of memory")
    assert torch.equal(rotary.inv_freq, scaled) and rotary.attention_scaling == factor
    assert all(module.training for module in model.modules())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert not layer.disable_adapters and layer.lora_A["default"].weight.requires_grad


def test_without_a_weight_a_run_is_what_it_was_bit_for_bit(make_trainer):
    class Before(CREAMTrainer):
        compute_loss = SFTTrainer.compute_loss

    def trained(cls=CREAMTrainer, **changes):
        trainer = make_trainer(cls=cls, dropout=0.1, logging_steps=1, **changes)
        trainer.train()
        return weights(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

    (before, losses, _), (now, losses_now, trainer), (other, _, _) = trained(Before), trained(), trained(**WEIGHT)
    assert losses == losses_now and all(torch.equal(before[name], now[name]) for name in before)
    assert not any("distillation_loss" in entry for entry in trainer.state.log_history)
    assert not all(torch.equal(before[name], other[name]) for name in before)  # control


def checkpointed(model, **options):
    """As transformers does when training begins."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def by_hand(trainer, base, batch):
    """1 - cosine of each real token of the window's first half, a mean a row, then of the rows."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[None, : min(WINDOW // 2, int(mask.sum()))]
        student = trainer.model.get_base_model().model(ids, use_cache=False).last_hidden_state[0]
        teacher = base.model(ids, use_cache=False).last_hidden_state[0].detach()
        rows.append(torch.stack([1 - s @ t / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True)]))
    return sum(row.mean() for row in rows) / len(rows)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_trls_plus_the_weight_times_that_of_the_distance(
    make_trainer, make_model, short_documents, reentrant
):
    trainer = make_trainer(short_documents, **WEIGHT)
    if reentrant is not None:
        checkpointed(trainer.model, use_reentrant=reentrant)
    plain = make_trainer(short_documents)
    # Away from the start, where lora_B is 0.
    for one in (trainer, plain):
        set_seed(3)
        for parameter in one.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    assert not batch["attention_mask"].all()
    for one in (trainer, plain):
        one.current_gradient_accumulation_steps = 1
        one.training_step(one.model, batch)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    without = {name: p.grad.clone() for name, p in plain.model.named_parameters() if p.requires_grad}
    distance = by_hand(plain, make_model(), batch)
    (2.0 * distance).backward()
    wanted = {name: p.grad for name, p in plain.model.named_parameters() if p.requires_grad}
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6, rtol=1e-4) for name in wanted)
    assert not any(torch.allclose(without[name], wanted[name], rtol=1e-2) for name in wanted)  # control
    assert trainer._metrics["train"]["distillation_loss"] == [pytest.approx(distance.item(), rel=1e-4)]


def test_windows_weigh_alike_in_one_batch_and_over_accumulation(make_trainer, short_documents):
    def trained(**changes):
        trainer = make_trainer(short_documents, optim="sgd", learning_rate=0.1, logging_steps=1, **changes)
        trainer.train()
        return weights(trainer), trainer.state.log_history

    together, log = trained(**WEIGHT)
    apart, log_apart = trained(per_device_train_batch_size=1, gradient_accumulation_steps=4, **WEIGHT)
    heavier, _ = trained(**WEIGHT | {"distillation_weight": 2.2})
    change = max((together[name] - apart[name]).abs().max() for name in together)
    assert change < 0.02 * max(
        (together[name] - heavier[name]).abs().max() for name in together
    )  # control: a tenth more
    assert log[0]["distillation_loss"] == pytest.approx(log_apart[0]["distillation_loss"], rel=1e-4)
    assert log[0]["loss"] == pytest.approx(log_apart[0]["loss"], rel=1e-4)


def test_evaluation_and_the_check_before_the_first_step_distil_nothing(make_trainer, make_documents):
    trainer = make_trainer(**WEIGHT)
    trainer.check_positions()
    trainer.evaluate(make_documents(4))
    assert not trainer._metrics["train"] and all(p.grad is None for p in trainer.model.parameters())


def test_a_recipe_in_4_bits_and_mixed_precision_distils_from_its_4_bit_base_and_records_it(tmp_path):
    options = ["--max_steps", "2", "--output_dir", str(tmp_path), "--bf16", "true", "--use_cpu", "true"]
    options += ["--rope_scaling_type", "yarn", "--distillation_weight", "0.5", "--save_steps", "1"]
    run_recipe(parse_recipe([*options, "--logging_steps", "1"]))
    record = json.loads((tmp_path / "cream.json").read_text())
    assert (record["distillation_weight"], record["distillation_length"]) == (0.5, 64)  # a quarter of the window
    log = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["distillation_loss"] < 2 for entry in log)
    model, _ = load_adapter(tmp_path)
    base = load_base(str(base_folder()), load_in_4bit=True).eval()
    scaled = load_base(str(base_folder()), target_length=2048, rope_scaling_type="yarn", load_in_4bit=True).eval()
    with torch.no_grad(), as_base(model, scaled.config):
        teacher = logits(model)
    with torch.no_grad():
        assert torch.equal(teacher, logits(base))
        assert not torch.allclose(teacher, logits(scaled), atol=1e-2)  # control


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--distillation_weight", "-1"], "distillation_weight=-1 must be a finite number of at least 0"),
        (["--distillation_length", "64"], "distillation_length=64 goes with a distillation_weight above 0"),
        (["--distillation_weight", "1", "--distillation_length", "257"], "at most context_length (256)"),
        (["--distillation_weight", "1", "--use_peft", "false"], "with use_peft=false no base is left"),
        (["--distillation_weight", "1", "--fsdp", "full_shard"], "distillation_weight=1 cannot go with FSDP"),
    ],
)
def test_what_cannot_be_distilled_is_refused_in_one_line(options, said, tmp_path, capsys):
    assert cli.main(["train", "--output_dir", str(tmp_path / "run"), *options]) == 2
    line = capsys.readouterr().err
    assert said in line and line.startswith("error: ") and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_stage_has_no_teacher(adapter, make_trainer, tmp_path):
    recipe = ["--adapter_name_or_path", str(adapter), "--dataset_name", "cream-peft-tiny", "--distillation_weight", "1"]
    with pytest.raises(ValueError, match="a second stage would lose what the first one taught"):
        run_recipe(parse_recipe([*recipe, "--output_dir", str(tmp_path / "run")]))
    model, _ = load_adapter(adapter, is_trainable=True)
    with pytest.raises(ValueError, match="a second stage"):
        make_trainer(model=model, peft_config=None, target_length=2048, **WEIGHT)


def test_the_distance_takes_the_memory_that_plan_says_and_a_short_one_none():
    norm = AutoModelForCausalLM.from_config(small(), dtype=torch.bfloat16).model.norm.requires_grad_(False)
    inputs = torch.randn(1, TOKENS, 256, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes() as live:
        with torch.no_grad():
            teacher = norm(inputs)
        live.peak = live.now
        distance = cosine_distance(norm(inputs), teacher, torch.ones(1, TOKENS))
        distance.backward()
    settings = {"context_length": 65_536, "lora_dropout": 0.0}
    config = small(hidden_size=256)
    planned = bytes_of(estimate(config, distillation_length=65_536, **settings), "logits")
    assert planned / 65_536 == pytest.approx(live.peak / TOKENS, rel=0.05)
    without = bytes_of(estimate(config, **settings), "logits")
    assert bytes_of(estimate(config, distillation_length=16_384, **settings), "logits") == without < planned


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_planned_operations_are_those_that_torch_counts(make_trainer, checkpointing):
    trainer = make_trainer(**WEIGHT)
    trainer.model.train().enable_input_require_grads()
    if checkpointing:
        checkpointed(trainer.model, use_reentrant=False)
    decoder = trainer.model.get_base_model().model
    batch = {"input_ids": IDS[:, :32], "attention_mask": torch.ones(1, 32, dtype=torch.int64)}
    with FlopCounterMode(display=False) as counter:
        with as_base(trainer.model, trainer.scaled_config):
            teacher = last_hidden_states(trainer.model, decoder, batch)
        cosine_distance(last_hidden_states(trainer.model, decoder, batch), teacher, batch["attention_mask"]).backward()
    config = trainer.scaled_config
    settings = {"context_length": 32, "lora_r": 4, "gradient_checkpointing": checkpointing}
    parts = training_flops(config, Training(distillation_length=32, **settings))
    attention = training_flops(config, Training(**settings))["attention"]
    # Eager attention does the whole square, and each pass ends with the logits of one token.
    square = attention * (1 + 1 / (3 + checkpointing))
    counted = counter.get_total_flops() - 2 * 2 * 64 * 385
    assert (parts["distillation"] + square) * 32 == pytest.approx(counted, rel=0.01)
    quarter = training_flops(config, Training(distillation_length=8, **settings))["distillation"]
    assert 0.2 < quarter / parts["distillation"] < 0.25


@pytest.mark.slow
def test_two_ranks_distil_as_one_with_twice_the_accumulation(tmp_path):
    def trained(name, ranks, accumulation, weight):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        module = ["-m", "cream_peft.cli", "train"]
        options = ["--max_steps", "3", "--save_strategy", "no", "--use_cpu", "true", "--load_in_4bit", "false"]
        options += ["--per_device_train_batch_size", "4", "--gradient_checkpointing", "true", "--optim", "sgd"]
        options += ["--output_dir", name, "--gradient_accumulation_steps", str(accumulation)]
        options += ["--distillation_weight", str(weight), "--warmup_steps", "0", "--learning_rate", "0.5"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *launcher, *module, *options]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300, capture_output=True)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    two, one, heavier = trained("two", 2, 1, 1), trained("one", 1, 2, 1), trained("heavier", 1, 2, 1.1)
    change = max((two[name] - one[name]).abs().max() for name in one)
    assert change < 0.02 * max((heavier[name] - one[name]).abs().max() for name in one)  # control: a tenth more


@pytest.mark.slow
def test_what_the_base_recalled_is_kept_while_a_new_skill_is_learned(tmp_path):
    def trained(weight):
        folder = tmp_path / str(weight)
        options = ["--output_dir", str(folder), "--distillation_weight", str(weight), "--save_strategy", "no"]
        run_recipe(parse_recipe(options))
        model, _ = load_adapter(folder)
        return [evaluate_recall(model, 256, 16, 7, mark=mark)["correct"].mean() for mark in (None, MARK)]

    (forgotten, skill), (kept, skill_kept) = trained(0), trained(1)
    assert skill > 0.9 and skill_kept > 0.9
    assert kept > forgotten + 0.2
