"""`cream-peft bench`, `memory: low`, and the script that measures on a GPU, as far as a CPU can tell."""

import json
import math
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_hqq_available
from trl import SFTConfig, get_peft_config
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from cream_peft import CREAMTrainer, cli
from cream_peft.model import base as model
from cream_peft.model import record
from cream_peft.model.tokenizer import load_tokenizer
from cream_peft.plan import gpus as cards
from cream_peft.plan.advice import training_flops
from cream_peft.plan.memory import Training
from cream_peft.train import bench, machine
from cream_peft.train.machine import base_config
from cream_peft.train.recipe import RecipeError, parse_recipe

VOCABULARY, LAYERS, WINDOW = 512, 4, 64
SIZES = ["--context_length", str(WINDOW), "--target_length", str(4 * WINDOW), "--per_device_train_batch_size", "2"]
SIZES += ["--gradient_accumulation_steps", "1", "--lr_scheduler_type", "linear", "--warmup_steps", "0"]


@pytest.fixture
def architecture(tmp_path):
    """A folder with a config.json and no weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=WINDOW,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "architecture")
    return ["--model_name_or_path", str(tmp_path / "architecture"), *SIZES]


@pytest.fixture
def make_trainer(architecture, tmp_path):
    """The bench's trainer on a random 4-bit model; equal weights and documents every time."""

    def make(*arguments, cls=CREAMTrainer):
        recipe = bench.parse_bench([*architecture, "--learning_rate", "1e-3", *arguments], steps=3)
        config, recipe.run.output_dir = base_config(recipe), str(tmp_path / "run")
        recipe.run.resolve(WINDOW)
        loaded = bench.load_random(recipe, config)
        torch.manual_seed(0)
        return cls(
            model=loaded,
            args=recipe.run,
            train_dataset=bench.random_documents(config, WINDOW, 6),
            processing_class=load_tokenizer(bench.TINY_ID),
            peft_config=get_peft_config(recipe.model),
        )

    return make


def trained(trainer):
    """The loss over the run, and the adapter after it."""
    loss = trainer.train().training_loss
    return loss, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# cream-peft bench


def test_bench_takes_real_steps_on_an_architecture_without_weights(architecture, tmp_path, capsys):
    path = tmp_path / "measured.json"
    assert cli.main(["bench", *architecture, "--steps", "3", "--json", str(path), "--learning_rate", "1e-8"]) == 0
    printed, measured = capsys.readouterr().out, json.loads(path.read_text())
    assert measured["steps"] == 3 and measured["tokens_per_step"] == 2 * WINDOW
    assert measured["tokens_per_second"] == pytest.approx(2 * WINDOW / measured["seconds_per_step"])
    # A random model knows nothing of the next token.
    assert measured["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    recipe = parse_recipe(architecture)
    terms = machine.plan_recipe(recipe, base_config(recipe)).terms
    assert measured["planned_gib"] == terms["total"] - terms["cuda_context"]
    assert f"{measured['tokens_per_second']:,.0f}" in printed and f"{measured['planned_gib']:.2f} GiB" in printed
    if not torch.cuda.is_available():
        assert measured["peak_allocated_gib"] is None and "unknown GPU" not in printed
        assert printed.count("not measured") == printed.count("there is no CUDA GPU") == 1


def test_a_recipe_keeps_its_settings_but_those_that_save_publish_or_evaluate():
    recipe = Path(__file__).parents[1] / "recipes/llama-2-7b-chat/cream-4k-32k-qlora.yaml"
    written = parse_recipe(["--config", str(recipe)])
    taken = bench.parse_bench(["--config", str(recipe), "--lora_r", "4", "--eval_on_start", "true"], steps=7)
    assert written.run.evaluates and not taken.run.evaluates
    assert written.run.assistant_only_loss and not taken.run.assistant_only_loss
    assert taken.run.eval_strategy == taken.run.save_strategy == "no" and taken.run.max_steps == 7
    assert written.run.gradient_accumulation_steps > taken.run.gradient_accumulation_steps == 2
    assert taken.model.lora_r == 4 and taken.run.optim == written.run.optim
    assert taken.run.target_length == written.run.target_length
    with pytest.raises(RecipeError, match="--steps 1 must be at least 2"):
        bench.parse_bench([], steps=1)


def test_what_a_machine_without_a_gpu_cannot_try_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = Path(__file__).parents[1] / "recipes/llama-2-7b/cream-4k-32k-qlora.yaml"
    cases = {
        "no CUDA GPU here: leave it out": ["--memory_limit", "8GB"],
        "Llama-2-7b-hf is too large to try without a CUDA GPU": ["--config", str(recipe)],
        "'9 lives' is not known": ["--memory-limit", "9 lives"],
        "--gpu is not for bench: use --memory_limit": ["--gpu", "8"],
        "--max_steps is not for bench: use --steps": ["--max-steps=3"],
    }
    for said, arguments in cases.items():
        assert cli.main(["bench", *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_memory_that_runs_out_is_explained_with_the_plan(architecture, monkeypatch, capsys):
    def raise_out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(CREAMTrainer, "training_step", raise_out_of_memory)
    assert cli.main(["bench", *architecture]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in line and "the plan is" in line


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once that were made under this mode."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_loading_holds_one_weight_at_a_time_beside_the_quantized_ones(architecture):
    recipe = parse_recipe(architecture)
    config = base_config(recipe)
    recipe.run.resolve(WINDOW)
    with LiveBytes() as live:
        loaded = bench.load_random(recipe, config)
    weights = [parameter for name, parameter in loaded.named_parameters() if "proj" in name]
    assert len(weights) == 7 * LAYERS and all(weight.quant_state.nested for weight in weights)
    resident, largest = loaded.get_memory_footprint(), 4 * 704 * 256
    dense = 4 * (LAYERS * (4 * 256**2 + 3 * 256 * 704) + 2 * VOCABULARY * 256)
    assert live.peak < resident + 3 * largest
    assert dense > resident + 3 * largest  # control: what all weights at once would take
    embeddings = {loaded.get_input_embeddings().weight.data_ptr(), loaded.get_output_embeddings().weight.data_ptr()}
    assert len(embeddings) == 2  # what is not quantized has memory of its own


def test_a_16_bit_base_has_memory_of_its_own_for_every_weight(architecture):
    recipe = parse_recipe([*architecture, "--load_in_4bit", "false"])
    config = base_config(recipe)
    recipe.run.resolve(WINDOW)
    storages = {parameter.untyped_storage().data_ptr() for parameter in bench.load_random(recipe, config).parameters()}
    assert len(storages) == 9 * LAYERS + 3


def test_a_tied_head_is_the_embeddings_and_is_loaded_once(tmp_path):
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=WINDOW, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    recipe = parse_recipe(["--model_name_or_path", str(tmp_path), *SIZES])
    config = base_config(recipe)
    recipe.run.resolve(WINDOW)
    names = list(bench.random_weights(config, torch.float32, load_in_4bit=False))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = bench.load_random(recipe, config)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_the_cpu_is_not_measured_beside_a_gpu_whose_name_it_would_get(architecture, monkeypatch):
    recipe = bench.parse_bench([*architecture, "--use_cpu", "true"], steps=2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(RecipeError, match="use_cpu=true, and bench measures the GPU that is there"):
        bench.bench_recipe(recipe)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "RTX 4090")
    assert record.machine(use_cpu=True).startswith("CPU ") and record.machine() == "RTX 4090"


def test_every_weight_is_trained_where_a_recipe_says_so(architecture, monkeypatch):
    trained = []
    monkeypatch.setattr(bench, "time_steps", lambda trainer, *_: trained.append(trainer.model) or sys.exit())
    recipe = bench.parse_bench([*architecture, "--use_peft", "false", "--load_in_4bit", "false"], steps=2)
    with pytest.raises(SystemExit):
        bench.bench_recipe(recipe)
    assert all(parameter.requires_grad for parameter in trained[0].parameters())


def test_utilisation_is_known_for_the_cards_that_plan_knows(monkeypatch):
    recipe = bench.parse_bench(["--gradient_checkpointing", "true"], steps=2)
    config = base_config(recipe)
    recipe.run.resolve(256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 40 * 2**30))
    settings = {"context_length": 256, "lora_r": 16, "target_modules": recipe.model.lora_target_modules}
    flops = sum(training_flops(config, Training(gradient_checkpointing=True, **settings)).values())
    for name, peak in {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "Tesla T4": 65e12}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        shares = bench.utilisation(recipe, config, 1e6)
        assert shares["with_recomputation"] == pytest.approx(flops * 1e6 / peak)
        assert 0.6 < shares["model_flop_utilisation"] / shares["with_recomputation"] < 0.8
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert set(bench.utilisation(recipe, config, 1e6).values()) == {None}


# memory: low


def test_memory_low_chooses_what_was_left_open_and_nothing_else(make_config):
    low, default = make_config(memory="low"), make_config()
    assert (low.optim, low.activation_offloading) == (OptimizerNames.PAGED_ADAMW_8BIT, True)
    assert (default.optim, default.activation_offloading) == (SFTConfig("unused", bf16=False).optim, False)
    # Even where it is the value that would have been taken without memory=low.
    for name in ("adamw_torch", "adamw_torch_fused"):
        kept = make_config(memory="low", optim=name, activation_offloading=False)
        assert (kept.optim, kept.activation_offloading) == (OptimizerNames(name), False)
    recipe = parse_recipe(["--memory", "low", "--optim", "adamw_torch"])
    assert recipe.run.activation_offloading and recipe.run.optim == "adamw_torch"
    with pytest.raises(RecipeError, match="memory='little' is unknown: use one of default, low"):
        parse_recipe(["--memory", "little"])


def test_the_allocator_is_set_up_only_where_the_user_has_not_done_it(monkeypatch):
    said = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    for name in model.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.expand_cuda_segments()
    assert said == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model.expand_cuda_segments()
    assert said == ["expandable_segments:True"]
    monkeypatch.setenv(model.ALLOCATOR_VARIABLES[0], "max_split_size_mb:128")
    model.expand_cuda_segments()
    assert len(said) == 1


def test_memory_low_trains_to_the_same_loss_with_8_bit_moments(make_trainer):
    default, low = make_trainer(), make_trainer("--memory", "low")
    (loss, adapter), (loss_low, adapter_low) = trained(default), trained(low)
    assert loss_low == pytest.approx(loss, abs=1e-4)
    # B starts at zero: its norm is how far it went.
    moved = [name for name in adapter if "lora_B" in name]
    gap = sum((adapter[name] - adapter_low[name]).square().sum() for name in moved).sqrt()
    assert 0 < gap < 0.05 * sum(adapter[name].square().sum() for name in moved).sqrt()
    for trainer, dtype in ((default, torch.float32), (low, torch.uint8)):
        states = trainer.optimizer.optimizer.state.values()
        moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
        moments = [moment for moment in moments if moment.numel() >= 4096]
        assert len(moments) >= 2 * 2 * 4 * LAYERS and {moment.dtype for moment in moments} == {dtype}


def test_offloading_is_left_alone_where_there_is_no_gpu(make_trainer, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: None)
    trainer = make_trainer("--activation_offloading", "true", "--use_cpu", "true")
    assert not trainer.args.activation_offloading
    trainer.train()
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'type'"):  # control: TRL alone
        get_act_offloading_ctx_manager(trainer.model)


class _Stream:
    """A CUDA stream, as far as TRL asks it for anything."""

    def nothing(self, *args):
        pass

    wait_stream = wait_event = synchronize = record_event = nothing


@pytest.mark.parametrize("use_streams", [False, True])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_offloading_moves_every_layers_input_and_changes_no_bit(make_trainer, monkeypatch, use_streams, checkpointing):
    arguments = ["--gradient_checkpointing", checkpointing]
    loss, adapter = trained(make_trainer(*arguments))
    trainer = make_trainer(*arguments)
    # TRL's own class, told that the CPU is a GPU.
    device = SimpleNamespace(
        Stream=_Stream, current_stream=_Stream, stream=lambda stream: nullcontext(), empty_cache=lambda: None
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        patch.setattr(torch, "get_device_module", lambda *args: device)
        offloading = get_act_offloading_ctx_manager(trainer.model, use_pin_memory=False, use_streams=use_streams)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *args: None)
    packed = []

    class Tracker(dict):
        def __setitem__(self, key, value):
            packed.append((value[1], tuple(value[0].shape)))
            super().__setitem__(key, value)

    offloading.tracker, trainer.maybe_activation_offload_context = Tracker(), offloading
    loss_offloaded, adapter_offloaded = trained(trainer)
    assert loss_offloaded == loss and all(torch.equal(adapter[name], adapter_offloaded[name]) for name in adapter)
    hidden = sum(moved for moved, shape in packed if shape == (2, WINDOW, 256))
    assert hidden >= 3 * LAYERS  # three steps
    inner = [moved for moved, shape in packed if shape == (2, WINDOW, 704)]
    assert bool(inner) == (checkpointing == "false")  # with checkpointing a layer's insides are not kept at all


# The script for a GPU


@pytest.fixture
def measure():
    return load_script("tests/gpu/measure.py")


def test_the_script_says_in_one_line_that_there_is_no_gpu(measure, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["measure.py"])
    with pytest.raises(SystemExit) as stopped:
        measure.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("there is no CUDA GPU here: nothing was measured")


@pytest.mark.parametrize(
    ("written", "options", "said"),
    [
        ('{"tiny": true, "cas', [], "gpu.json is damaged"),
        ("[]", [], "gpu.json is damaged"),
        ('{"tiny": true, "cases": {"7B low, 8 GB": {}}}', [], "gpu.json is damaged"),
        (None, ["--only", "70B"], "--only '70B' is in no case's name: 7B low, 8 GB; "),
    ],
)
def test_the_script_refuses_a_damaged_file_and_no_case_in_one_line(
    measure, monkeypatch, tmp_path, capsys, written, options, said
):
    path = tmp_path / "gpu.json"
    if written:
        path.write_text(written)
    monkeypatch.setattr("sys.argv", ["measure.py", "--tiny", "--output", str(path), *options])
    with pytest.raises(SystemExit) as stopped:
        measure.main()
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and said in line and line.count("\n") == 1


def test_ctrl_c_on_the_script_says_that_the_same_command_goes_on(measure, monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "start_case", interrupt)
    monkeypatch.setattr("sys.argv", ["measure.py", "--tiny", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stopped:
        measure.main()
    line = capsys.readouterr().err
    assert stopped.value.code == 130 and line.count("\n") == 1 and line.endswith("the same command resumes\n")


def test_the_table_of_the_tiny_model_says_that_it_is_no_7b(measure):
    first = {tiny: measure.table_of({"tiny": tiny, "cases": {}})[0] for tiny in (True, False)}
    assert first[True].endswith("no 7B, no 13B") and first[False].startswith("| case |")


def test_every_kind_of_case_runs_on_a_cpu(measure):
    kinds = {}
    for name, case in measure.CASES.items():
        kinds.setdefault((case["kind"], case.get("kv_cache")), name)
    assert {kind for kind, _ in kinds} == set(measure.KINDS)
    for (kind, cache), name in kinds.items():
        if cache == "quantized" and not is_hqq_available():
            continue
        result = measure.run_case(name, tiny=True)
        assert result["status"] == "measured" and result["tokens_per_second"] > 0
        if kind == "profile":
            assert any("mm" in kernel["kernel"] for kernel in result["kernels"])
        if kind in ("train", "read"):
            assert 0 < result["planned_gib"] < 1


def test_every_case_has_a_recipe_that_parses_and_a_limit_that_a_card_has(measure):
    limits = {8: 7.6, 12: 11.7, 16: 15.6, 24: 23.6}
    wanted = {"7B low, 8 GB", "7B default, 24 GB", "7B plain TRL", "13B low, 12 GB", "13B default, 16 GB"}
    assert wanted | {"7B reads 32K, 24 GB", "7B reads 32K, 4-bit cache, 12 GB"} <= set(measure.CASES)
    for name, case in measure.CASES.items():
        recipe = bench.parse_bench(case["arguments"], measure.STEPS)
        assert ("13b" in recipe.model.model_name_or_path) == name.startswith("13B")
        assert (recipe.run.memory == "low") == ("low" in name)
        if case["limit"]:
            assert cards.parse_gpu(measure.CARD[case["limit"]]) == limits[case["limit"]]


def test_the_script_goes_on_where_it_stopped_and_tries_again_what_failed(measure, monkeypatch, tmp_path, capsys):
    started = []

    def start_case(name, tiny, seconds):
        started.append(name)
        if len(started) == 2:
            return {"status": "failed: not done after 1 s"}
        return {"status": "measured", "limit_gib": 7.6, "peak_allocated_gib": 5.5, "planned_gib": 5.0}

    monkeypatch.setattr(measure, "start_case", start_case)
    monkeypatch.setattr(measure, "CASES", {name: measure.CASES[name] for name in list(measure.CASES)[:3]})
    first, second, third = measure.CASES
    path = tmp_path / "gpu.json"
    assert measure.measure(path, True, minutes=0, case_seconds=1)["cases"] == {}
    measure.measure(path, True, minutes=1, case_seconds=1)
    assert started == [first, second, third]
    results = measure.measure(path, True, minutes=1, case_seconds=1)
    assert started == [first, second, third, second]
    assert json.loads(path.read_text()) == results and results["cases"][second]["status"] == "measured"
    assert f"| {first} | 7.60 | 5.50 | 5.00 | +10.0% |" in "\n".join(measure.table_of(results))
    with pytest.raises(ValueError, match="was written with --tiny: choose another"):
        measure.measure(path, False, minutes=1, case_seconds=1)


def test_a_case_that_does_not_fit_or_is_planned_not_to_is_recorded_as_such(measure, monkeypatch):
    def raise_out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(measure.KINDS, "train", raise_out_of_memory)
    assert measure.run_case("7B low, 8 GB", tiny=True)["status"] == "does not fit"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(measure, "TOO_LARGE", 0.1)
    assert measure.run_case("7B low, 8 GB", tiny=False)["status"].startswith("skipped: planned ")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * 2**30, 6 * 2**30))
    assert measure.run_case("7B low, 8 GB", tiny=False)["status"] == "skipped: this GPU has 6.0 GiB"


@pytest.mark.slow
def test_a_case_in_a_process_of_its_own_comes_back_and_one_that_takes_too_long_says_so(measure):
    assert measure.start_case("7B low, 8 GB", True, 120)["status"] == "measured"
    assert measure.start_case("7B low, 8 GB", True, 0.1)["status"] == "failed: not done after 0 s"
