"""Cards, hours and advice; what `cream-peft plan` prints, and what is said when memory runs out."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from conftest import estimate, estimate_evaluation, estimate_validation
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from cream_peft import cli, errors
from cream_peft.commands import evaluate_parser
from cream_peft.model import base
from cream_peft.model.base import embedded_config
from cream_peft.plan import advice as plan
from cream_peft.plan import fit, memory
from cream_peft.plan.advice import in_words
from cream_peft.plan.gpus import GPUS, find_gpu, parse_gpu
from cream_peft.plan.memory import ATTENTION, Reading, Training, Validation
from cream_peft.rope import pretrained_window
from cream_peft.tiny import TINY_ID
from cream_peft.train import machine
from cream_peft.train import run as train
from cream_peft.train.recipe import RecipeError, parse_recipe

ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LLAMA2, LLAMA2_13B, QWEN3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "Qwen/Qwen3-8B-Base"
SETTINGS = {"context_length": 4096}


def advise(config, gib, **settings):
    return plan.advise(config, gib, Training(**settings))


def advise_validation(config, gib, **settings):
    return plan.advise(config, gib, Validation(**settings))


def advise_evaluation(config, gib, **settings):
    return plan.advise(config, gib, Reading(**settings))


def plan_of(config, settings, validation=None, **options):
    """As JSON has it."""
    held_out = validation and Validation(**validation)
    return asdict(plan.plan_gpus(config, Training(**settings), held_out, **options))


# Cards


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("8GB", GPUS["RTX 4060 8GB"].gib),
        ("16 gb", GPUS["T4 16GB"].gib),
        ("24G", GPUS["L4 24GB"].gib),
        ("10GB", GPUS["RTX 3080 10GB"].gib),
        ("11GB", 11),
        ("8GiB", 8),
        ("7.5 gib", 7.5),
        ("24", 24),
        ("RTX 4090", GPUS["RTX 4090 24GB"].gib),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", GPUS["RTX 4070 Ti SUPER 16GB"].gib),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", GPUS["RTX 4090 Laptop 16GB"].gib),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", GPUS["RTX PRO 6000 96GB"].gib),
        ("NVIDIA RTX A6000", GPUS["RTX A6000 48GB"].gib),
        ("NVIDIA H100 PCIe", GPUS["H100 PCIe 80GB"].gib),
        ("Tesla V100-PCIE-32GB", GPUS["V100 32GB"].gib),
        ("AMD Radeon RX 7900 XTX", GPUS["RX 7900 XTX 24GB"].gib),
        ("7900 XTX", GPUS["RX 7900 XTX 24GB"].gib),
        ("AMD Radeon AI PRO R9700", GPUS["R9700 32GB"].gib),
        ("rtx4060", GPUS["RTX 4060 8GB"].gib),
        ("4090", GPUS["RTX 4090 24GB"].gib),
        ("3060 12GB", GPUS["RTX 3060 12GB"].gib),
        ("4060 Ti 16GB", GPUS["RTX 4060 Ti 16GB"].gib),
        ("400", 400),
        ("NVIDIA H100 80GB HBM3", GPUS["H100 80GB"].gib),
        ("A100-SXM4-80GB", GPUS["A100 80GB"].gib),
        ("NVIDIA A100-PCIE-40GB", GPUS["A100 40GB"].gib),
        ("NVIDIA A100 80GB PCIe", GPUS["A100 80GB"].gib),
        ("A100-80GB", GPUS["A100 80GB"].gib),
        ("a100 40", GPUS["A100 40GB"].gib),
        ("T4", GPUS["T4 16GB"].gib),
    ],
)
def test_a_gpu_is_known_by_its_name_or_its_memory(text, gib):
    assert parse_gpu(text) == gib


UNKNOWN = ["", "0GB", "RTX", "RTX 3050", "lots", "8TB", "GB", "8000MB", "8192MiB", "4090GB", "4050", "401"]


@pytest.mark.parametrize("text", [*UNKNOWN, "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4080 Laptop GPU"])
def test_a_gpu_that_is_not_known_is_refused_with_what_is(text):
    with pytest.raises(
        ValueError, match=r"is not known: give its memory in GB or GiB \(8GB, 7.6GiB\), or a name such as RTX 4060"
    ):
        parse_gpu(text)


@pytest.mark.parametrize("name", ["A100", "V100", "RTX 3060", "RTX 3080", "RTX 4060 Ti", "RTX 5060 Ti"])
def test_a_name_that_two_cards_have_is_refused_with_both(name):
    both = [gpu for gpu in GPUS if gpu.rpartition(" ")[0] == name]
    for text in (name, f"NVIDIA {name.replace('RTX', 'GeForce RTX')}"):
        with pytest.raises(ValueError, match=f"can be {both[0]} or {both[1]}: say which"):
            parse_gpu(text)


def test_a_driver_that_names_two_cards_means_the_one_of_its_memory():
    assert find_gpu("NVIDIA GeForce RTX 4060 Ti", 15.6) == "RTX 4060 Ti 16GB"
    assert find_gpu("NVIDIA GeForce RTX 4060 Ti", 7.7) == "RTX 4060 Ti 8GB"
    assert find_gpu("NVIDIA H100 80GB HBM3", 12.0) == "H100 80GB" and find_gpu("RTX 3050", 7.6) is None


def test_a_card_that_is_no_memory_size_is_found_by_its_name():
    assert find_gpu("a100 40") == "A100 40GB" and find_gpu("RTX 3050") is None and find_gpu("8GB") is None


def test_every_card_has_a_speed_and_less_memory_than_its_name_says():
    assert all(gpu.tflops > 0 for gpu in GPUS.values())
    assert all(0.9 < gpu.gib / float(re.search(r"(\d+)GB", name)[1]) < 1 for name, gpu in GPUS.items())
    assert set(plan.SHOWN) < set(GPUS) and list(plan.SHOWN) == sorted(plan.SHOWN, key=list(GPUS).index)


# Speed


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
def test_the_operations_are_those_that_torch_counts_in_a_real_step(targets, checkpointing):
    tokens = 128
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=8, lora_dropout=0.0, target_modules=list(targets))
    )
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        decoder = model.train().get_base_model().model
        decoder(torch.arange(tokens)[None] % 64, use_cache=False).last_hidden_state.sum().backward()
    settings = {"context_length": tokens, "lora_r": 8, "target_modules": targets}
    parts = plan.training_flops(config, Training(gradient_checkpointing=checkpointing, **settings))
    # Eager attention does the whole square.
    planned = parts["linears"] + parts["adapter"] + 2 * parts["attention"]
    assert planned * tokens == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert parts["head"] == 3 * 2 * 64 * 64


def test_the_operations_of_the_held_out_loss_are_those_that_torch_counts_forward():
    tokens, sizes = 256, {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=3, attn_implementation="eager", **sizes
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        AutoModelForCausalLM.from_config(config)(torch.arange(tokens)[None] % 64, use_cache=False)
    # Eager attention does the whole square.
    square = 4 * 3 * 64 * tokens / 2
    assert (plan.held_out_flops(config, tokens) + square) * tokens == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "published"), [(1024, 2295), (2048, 2741), (4096, 2926), (8192, 3128), (32_768, 2216)]
)
def test_the_speed_is_near_what_llama_factory_published_for_an_a100(tokens, published):
    # Its wiki, Performance comparison: QLoRA of Llama-2-7B, all linears, rank 8, batch 1, flash attention, A100 40GB.
    settings = {"context_length": tokens, "lora_r": 8, "target_modules": ALL_LINEAR}
    (row,) = plan_of(embedded_config(LLAMA2), settings, gpus={"A100 40GB": GPUS["A100 40GB"].gib})["cards"]
    least, most = row["tokens_per_second"]
    assert least == most == pytest.approx(published, rel=0.1 if tokens == 4096 else 0.4)


def test_hours_are_those_of_the_recipes_steps_or_of_a_thousand():
    planned = [
        plan_of(embedded_config(LLAMA2), SETTINGS | {"gradient_accumulation_steps": 32, "max_steps": steps})
        for steps in (None, 250)
    ]
    for row, quarter in zip(planned[0]["cards"], planned[1]["cards"], strict=True):
        hours = [1000 * 32 * 4096 / speed / 3600 for speed in reversed(row["tokens_per_second"])]
        assert row["hours"] == pytest.approx(hours) and quarter["hours"] == pytest.approx([each / 4 for each in hours])
    by_card = {row["card"]: row["hours"] for row in planned[0]["cards"]}
    assert by_card["H100 80GB"] < by_card["RTX 4090 24GB"] < by_card["RTX 3060 12GB"]


def test_only_a_card_whose_speed_was_measured_has_one_number_of_hours():
    by_card = {row["card"]: row["hours"] for row in plan_of(embedded_config(LLAMA2), SETTINGS)["cards"]}
    assert {card for card, (least, most) in by_card.items() if least == most} == {"A100 40GB", "A100 80GB"}
    least, most = by_card["RTX 4090 24GB"]
    assert most / least == pytest.approx(plan.UTILISATION[1] / plan.UTILISATION[0])


def test_a_card_of_unknown_speed_and_a_tiny_model_have_no_hours():
    (row,) = plan_of(embedded_config(LLAMA2), SETTINGS, gpus={"8GB": 8.0})["cards"]
    assert row["fits"] and row["hours"] is row["tokens_per_second"] is None
    tiny = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    assert {row["hours"] for row in plan_of(tiny, SETTINGS)["cards"]} == {None}


# Advice


def test_advice_is_the_smallest_change_of_settings_that_fits():
    config = embedded_config(LLAMA2)
    settings = {"context_length": 4096, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    assert advise(config, 200.0, **settings) == {}
    assert advise(config, 23.6, **settings) == {"gradient_checkpointing": True}
    assert advise(config, 7.6, **settings) == {"gradient_checkpointing": True, "per_device_train_batch_size": 1}
    assert advise(config, 3.0, **settings) is None
    for gib in (5.0, 5.7, 6.2, 8.0, 11.7):
        changes = advise(config, gib, **settings)
        assert estimate(config, **settings | changes)["total"] <= gib
        for name in changes:
            without = {key: value for key, value in changes.items() if key != name}
            assert estimate(config, **settings | without)["total"] > gib


def test_the_window_is_kept_as_long_as_main_memory_can_help():
    config = embedded_config(LLAMA2)
    assert advise(config, 6.0, **SETTINGS) == {"activation_offloading": True}
    longer = {"context_length": 16_384, "lora_r": 64, "target_modules": ALL_LINEAR}
    changes = advise(config, 11.7, **longer)
    assert "context_length" not in changes and changes["activation_offloading"]
    assert "context_length" in advise(config, 7.6, **longer)


def test_advice_is_in_keys_that_a_recipe_has():
    both = {"activation_offloading": True, "optim": "paged_adamw_8bit"}
    assert in_words(both) == "activation_offloading: true, optim: paged_adamw_8bit"
    for key in ("memory", "activation_offloading", "gradient_checkpointing", "per_device_train_batch_size", "optim"):
        assert hasattr(parse_recipe([]).run, key)
    assert (in_words({}), in_words(None)) == ("", "")


def test_a_held_out_loss_is_made_to_fit_by_its_own_keys():
    config, settings = embedded_config(LLAMA2), {"eval_length": 32_768, "per_device_eval_batch_size": 8}
    assert advise_validation(config, 80.0, **settings) == {}
    assert advise_validation(config, 11.7, **settings) == {"per_device_eval_batch_size": 1}
    assert advise_validation(config, 6.0, **settings) == {"per_device_eval_batch_size": 1, "eval_length": 8192}


def test_evaluation_is_made_to_fit_by_4_bits_then_another_cache_then_a_shorter_document():
    config, whole = embedded_config(LLAMA2), {"length": 32_768, "load_in_4bit": False}
    assert advise_evaluation(config, 39.4, **whole) == {}
    assert advise_evaluation(config, 23.6, **whole) == {"load_in_4bit": True}
    assert advise_evaluation(config, 11.7, **whole) == {"load_in_4bit": True, "kv_cache": "quantized"}
    shorter = advise_evaluation(config, 11.7, length=262_144)
    assert shorter["kv_cache"] == "quantized" and 32_768 <= shorter["length"] < 262_144
    assert estimate_evaluation(config, **shorter)["total"] <= 11.7


def test_a_plan_lists_every_card_and_advises_on_those_that_do_not_fit():
    config, validation = embedded_config(QWEN3), {"eval_length": 4096}
    planned = plan_of(config, SETTINGS, validation, target_length=131_072)
    assert planned["terms"] == estimate(config, **SETTINGS)
    assert planned["validation"] == estimate_validation(config, **validation)
    assert [row["card"] for row in planned["cards"]] == list(plan.SHOWN)
    assert [row["card"] for row in planned["cards"] if not row["fits"]] == ["RTX 4060 8GB"]
    cards = {row["card"]: row["evaluates_with"] for row in planned["cards"]}
    assert cards["RTX 4060 8GB"] == [] and cards["T4 16GB"] == cards["RTX 3060 12GB"] == []
    assert cards["L4 24GB"] == ["quantized"] and cards["A100 40GB"] == ["default", "quantized"]
    assert planned["advice"][:2] == [
        "training on RTX 4060 8GB: activation_offloading: true, context_length: 2048",
        "evaluating on RTX 4060 8GB: --kv_cache quantized --lengths 8192",
    ]
    assert "evaluating on RTX 3060 12GB, RTX 4070 12GB or T4 16GB: --kv_cache" in planned["advice"][2]
    # One line for all GPUs with one remedy.
    two = plan_of(embedded_config(LLAMA2_13B), SETTINGS, gpus={"5GB": 5.0, "RTX 4060 8GB": 6.0, "7GB": 7.0})["advice"]
    assert two[0] == "training on 5GB, RTX 4060 8GB or 7GB: no settings fit, a smaller base may"
    nothing = plan_of(embedded_config(LLAMA2_13B), SETTINGS, gpus={"6GB": 6.0})["advice"]
    assert [line.split(": ", 1)[1] for line in nothing] == ["no settings fit, a smaller base may"] * 2


def test_a_card_that_trains_but_cannot_compute_the_held_out_loss_does_not_fit():
    validation = {"eval_length": 8192, "per_device_eval_batch_size": 8}
    planned = plan_of(embedded_config(LLAMA2), SETTINGS, validation, gpus={"RTX 4060 8GB": 7.6})
    assert planned["terms"]["total"] < 7.6 and not planned["cards"][0]["fits"]
    assert planned["advice"] == ["training on RTX 4060 8GB: per_device_eval_batch_size: 1"]


# The command


def planned_by(arguments, tmp_path, capsys):
    assert cli.main(["plan", *arguments, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out


RECIPE = "model_name_or_path: meta-llama/Llama-2-7b-hf\ndataset_name: o/d\noutput_dir: run\ntarget_length: 32768\n"
RECIPE += "max_steps: 1000\ngradient_checkpointing: true\nper_device_train_batch_size: 1\neval_strategy: steps\n"
RECIPE += "gradient_accumulation_steps: 32\nper_device_eval_batch_size: 1\n"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


def test_plan_prints_every_term_cache_card_and_assumption(recipe, tmp_path, capsys):
    planned, printed = planned_by(["--config", recipe], tmp_path, capsys)
    # What a recipe does not have has no row.
    assert "weight_copies" in planned["terms"] and "weight_copies" not in printed
    for term, size in ((term, size) for term, size in planned["terms"].items() if size):
        assert re.search(rf"^  {term}(?: \*)? +{size:.2f}(?:   \S.*)?$", printed, re.MULTILINE)
    for term in planned["evaluation"]["terms"]["default"]:
        sizes = " +".join(f"{terms[term]:.2f}" for terms in planned["evaluation"]["terms"].values())
        assert re.search(rf"^  {term}(?: \*)? +{sizes}(?:   \S.*)?$", printed, re.MULTILINE)
    assert printed.startswith("base: 6.74 billion parameters; 6.48 in 4 bits, 0.26 in 16; LoRA: 16.8 million on q_")
    assert planned["base"]["parameters"] == planned["base"]["active"] == 6_738_415_616
    assert "evaluation at 32,768 tokens" in printed
    held_out = f"{planned['validation']['total']:.2f}   total, {planned['validation_tokens']:,} tokens at once"
    assert planned["validation_tokens"] == 4096 and re.search(rf"held-out loss +{held_out}", printed)
    for row in planned["cards"]:
        line = re.search(rf"^{row['card']} .*", printed, re.MULTILINE)[0]
        assert f"{row['hours'][0]:.1f}" in line and ", ".join(row["evaluates_with"]) in line
        assert ("published" in line) == (row["hours"][0] == row["hours"][1]) and len(line) < 90
    assert "assuming 25% to 50% of the GPU's dense 16-bit peak" in printed
    assert "131,072 tokens a step, 131,072,000 in 1,000 steps" in printed
    assert "not measured" in printed


def test_plan_refuses_the_bases_that_training_refuses(tmp_path, capsys):
    MistralConfig(sliding_window=4096, max_position_embeddings=8192).save_pretrained(tmp_path)
    asked = ["--model_name_or_path", str(tmp_path), "--dataset_name", "d.jsonl", "--target_length", "65536"]
    for command in ("plan", "train"):
        assert cli.main([command, *asked, "--output_dir", str(tmp_path / "run"), "--load_in_4bit", "false"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: sliding_window is 4096, below target_length 65536"), (command, line)


def test_plan_for_one_card_lists_it_alone(recipe, tmp_path, capsys):
    planned, printed = planned_by([f"--config={recipe}", "--gpu", "geforce rtx 4090"], tmp_path, capsys)
    assert [row["card"] for row in planned["cards"]] == ["RTX 4090 24GB"] and "RTX 3060" not in printed
    planned, printed = planned_by(["--config", recipe, "--gpu", "5.6GB"], tmp_path, capsys)
    assert "training on 5.6GB: activation_offloading: true, optim: paged_adamw_8bit\n" in printed


def test_the_printed_terms_without_those_never_there_together_add_up_to_the_total(recipe, tmp_path, capsys):
    _, printed = planned_by(["--config", recipe], tmp_path, capsys)
    tables = [part for part in printed.split("\n\n") if "the larger of" in part]
    assert len(tables) == 2
    for table in tables:
        rows = re.findall(r"^  ([a-z_]+)( \*)? +(\d+\.\d\d)", table, re.MULTILINE)
        sizes = {term: float(size) for term, _, size in rows}
        either = re.search(r"the larger of (.*) and (.*)", table).groups()
        sums = [sum(sizes[term] for term in phase.split(" + ")) for phase in either]
        assert {term for term, mark, _ in rows if mark} == {term for phase in either for term in phase.split(" + ")}
        together = sum(float(size) for term, mark, size in rows if not mark and term != "total")
        assert together + max(sums) == pytest.approx(sizes["total"], abs=0.06)
        assert together + sum(sums) != pytest.approx(sizes["total"], abs=0.06)  # control: all of them


@pytest.mark.parametrize("gib", ["6.2", "5.6", "5.5", "5.2"])
def test_advice_fits_once_a_recipe_that_sets_its_optimizer_takes_it(recipe, tmp_path, capsys, gib):
    options = ["--config", recipe, "--optim", "adamw_torch_fused", "--gpu", gib]
    planned, _ = planned_by(options, tmp_path, capsys)
    (line,) = (line for line in planned["advice"] if line.startswith("training"))
    keys = dict(change.split(": ") for change in line.split(": ", 1)[1].split(", "))
    taken, _ = planned_by([*options, *(word for key in keys for word in (f"--{key}", keys[key]))], tmp_path, capsys)
    assert not planned["cards"][0]["fits"] and taken["cards"][0]["fits"]


def test_offloading_without_checkpoints_is_said_to_save_nothing(recipe, tmp_path, capsys):
    low = ["--config", recipe, "--memory", "low", "--gpu", "H100"]
    said = "activation_offloading is planned to save nothing without checkpoints: set gradient_checkpointing: true"
    planned, printed = planned_by([*low, "--gradient_checkpointing", "false"], tmp_path, capsys)
    assert planned["advice"] == [said] and said in printed
    assert planned_by(low, tmp_path, capsys)[0]["advice"] == []


def test_memory_low_and_its_parts_change_the_plan(recipe, tmp_path, capsys):
    usual, low, offloaded = (
        planned_by(["--config", recipe, *options], tmp_path, capsys)[0]["terms"]
        for options in ([], ["--memory", "low"], ["--activation_offloading", "true"])
    )
    assert low["checkpoints"] == offloaded["checkpoints"] < usual["checkpoints"] / 6
    assert low["optimizer"] < offloaded["optimizer"] / 3
    assert low["total"] - low["cuda_context"] < 5.0 < usual["total"] - usual["cuda_context"]


def test_the_help_of_plan_names_config_and_where_the_keys_come_from(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(part in printed for part in ("--config FILE", "--gpu", "--json", "cream-peft train --help"))


# Out of memory


def tiny_run(tmp_path, *options):
    settings = ("--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--disable_tqdm", "true", *options)
    return parse_recipe(["--max_documents", "8", *settings])


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [(torch.OutOfMemoryError, "CUDA out of memory."), (RuntimeError, "DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_runs_out_is_explained_by_the_plan(tmp_path, monkeypatch, validating, kind, message):
    def run_out(*_, **__):
        raise kind(message)

    monkeypatch.setattr(train.CREAMTrainer, "prediction_step" if validating else "training_step", run_out)
    monkeypatch.setattr(train, "check_machine", lambda recipe, config: None)  # it would be refused at once
    monkeypatch.setattr(fit, "allowed_gib", lambda: 0.01)
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "1", "--held_out_documents", "2"]
    with pytest.raises(kind) as caught:
        train.run_recipe(tiny_run(tmp_path, *evaluated))
    line = errors.explain(caught.value)
    assert line.startswith("out of memory") and "\n" not in line
    assert ("loss of held-out documents" in line) == validating
    assert re.search(r"the plan is \d\.\d GiB, most for \w+ \(\d\.\d GiB\), and the GPU has 0\.0 GiB for it: ", line)
    assert "`cream-peft plan`" in line


def test_the_line_names_the_largest_term_the_plan_the_card_and_the_change():
    config, settings = embedded_config(LLAMA2), {"context_length": 32_768}
    line = plan.out_of_memory_note(config, Training(**settings), 11.0)
    needed = estimate(config, **settings)["total"] - memory.CUDA_CONTEXT_GIB
    assert f"the plan is {needed:.1f} GiB, most for checkpoints (8.0 GiB), and the GPU has 11.0 GiB for it" in line
    change = advise(config, 11.0 + memory.CUDA_CONTEXT_GIB, **settings)
    assert line.endswith(f": set {in_words(change)}")


def test_where_the_plan_says_it_fits_the_change_saves_a_tenth():
    config = embedded_config(LLAMA2)
    for gib in (None, 23.6):
        line = plan.out_of_memory_note(config, Training(**SETTINGS), gib)
        keys = dict(change.split(": ") for change in line.rpartition("set ")[2].split(", "))
        changes = {key: value == "true" or value for key, value in keys.items()}
        whole, less = (estimate(config, **SETTINGS | change)["total"] - 0.75 for change in ({}, changes))
        assert changes and less <= 0.9 * whole and ("by plan it fits" in line) == (gib is not None)


def test_where_the_plan_says_it_fits_and_nothing_takes_less_the_line_asks_for_no_smaller_base():
    smallest = {"context_length": 1024, "lora_r": 1, "activation_offloading": True, "optim": "paged_adamw_8bit"}
    line = plan.out_of_memory_note(embedded_config(LLAMA2), Training(**smallest), 23.6)
    assert line.endswith("by plan it fits, so something else held memory (see nvidia-smi) or the plan is wrong")


def test_evaluation_says_what_was_planned_and_which_flag_to_change(monkeypatch):
    config = embedded_config(LLAMA2)
    monkeypatch.setattr(fit, "allowed_gib", lambda: 7.2)

    def said(**settings):
        with pytest.raises(MemoryError) as caught, fit.reading_explained(config, Reading(**settings)):
            raise MemoryError
        return errors.explain(caught.value)

    line = said(length=32_768, kv_cache="quantized", load_in_4bit=True)
    assert line.startswith("out of memory with prompts of 32,768 tokens: the plan is 9.4 GiB, most for kv_cache (5.0")
    assert line.endswith("and the GPU has 7.2 GiB for it: --lengths 16384")
    line = said(length=8192, kv_cache="default", load_in_4bit=False)
    assert line.endswith("for it: --kv_cache quantized, without --no_4bit")
    flags = line.split("for it: ")[1].split(", ")[0]
    parser = evaluate_parser()
    assert parser.parse_args(flags.split()).kv_cache == "quantized"
    monkeypatch.setattr(fit, "allowed_gib", lambda: 6.0)
    flags = said(length=262_144).split("for it: ")[1]
    assert parser.parse_args(flags.split()).lengths == [8192]
    monkeypatch.setattr(fit, "allowed_gib", lambda: 1.0)
    assert said(length=8192).endswith("no settings are enough")


def test_a_base_that_cannot_be_planned_still_gets_the_general_line(tmp_path, monkeypatch):
    recipe = tiny_run(tmp_path)
    config = machine.base_config(recipe)
    monkeypatch.setattr(config, "num_experts", 8, raising=False)
    with pytest.raises(MemoryError) as caught, machine.memory_explained(recipe, config):
        raise MemoryError
    assert errors.explain(caught.value) == errors.WHAT_TAKES_LESS
    with pytest.raises(KeyError) as other, machine.memory_explained(recipe, config):
        raise KeyError("x")
    assert not getattr(other.value, "__notes__", [])


def test_a_small_gpu_does_not_refuse_a_run_that_is_sharded_or_on_the_cpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fit, "allowed_gib", lambda: 0.1)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    recipe = tiny_run(tmp_path, "--per_device_train_batch_size", "4096")
    config = machine.base_config(recipe)
    recipe.run.resolve(pretrained_window(config))
    with pytest.raises(RecipeError, match="this recipe does not fit"):
        machine.check_machine(recipe, config)
    on_cpu = tiny_run(tmp_path, "--per_device_train_batch_size", "4096", "--use_cpu", "true")
    on_cpu.run.resolve(pretrained_window(config))
    machine.check_machine(on_cpu, config)
    assert not caplog.messages
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with monkeypatch.context() as launched:
            launched.setenv(name, "true")
            machine.check_machine(recipe, config)
            with pytest.raises(MemoryError) as caught, machine.memory_explained(recipe, config):
                raise MemoryError
        assert errors.explain(caught.value) == errors.WHAT_TAKES_LESS
        assert "memory is not planned: the plan is of one GPU" in caplog.messages.pop()


def test_use_cpu_keeps_the_model_off_a_gpu_that_is_there(tmp_path, monkeypatch):
    asked = {}

    class Stop(Exception):
        pass

    def from_pretrained(*arguments, **options):
        asked.update(options)
        raise Stop

    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for use_cpu in (True, False):
        recipe = tiny_run(tmp_path, "--use_cpu", str(use_cpu), "--load_in_4bit", "false")
        with monkeypatch.context() as there:
            there.setattr("torch.cuda.is_available", lambda: True)
            there.setattr("torch.cuda.current_device", lambda: 0)
            there.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
            with pytest.raises(Stop):
                base.load_base(TINY_ID, **base.base_options(recipe.model, use_cpu))
        assert asked["device_map"] == {"": "cpu" if use_cpu else 0}
        assert asked["dtype"] == (torch.float32 if use_cpu else torch.bfloat16)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--lora_modules_to_save", "lm_head"), "lora_modules_to_save"),
        (("--use_dora", "true"), "use_dora"),
        (("--attn_implementation", "eager"), "attn_implementation: eager"),
        (("--dtype", "float32"), "dtype: float32"),
        ((), None),
    ],
)
def test_what_takes_memory_that_is_not_planned_is_said(option, said, tmp_path, monkeypatch, caplog):
    recipe = tiny_run(tmp_path, *option)
    config = machine.base_config(recipe)
    last = machine.plan_recipe(recipe, config).advice[-1:]
    assert (f"not planned, and takes more: {said}" in last) == bool(said)
    monkeypatch.setattr(fit, "allowed_gib", lambda: 80.0)
    machine.check_machine(recipe, config)
    assert caplog.messages == ([f"not planned, and takes more memory: {said}"] if said else [])


@pytest.mark.parametrize(("scaling", "is_said"), [("none", True), ("yarn", False)])
def test_a_target_beyond_the_window_without_scaling_is_doubted_in_the_plan(scaling, is_said, capsys):
    assert cli.main(["plan", "--rope_scaling_type", scaling]) == 0
    said = "rope_scaling_type is none and target_length=2,048 is beyond the base's window of 256"
    assert (said in capsys.readouterr().out) is is_said
