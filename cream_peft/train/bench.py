"""Trains a recipe for some steps on random weights and random documents: peak memory and speed, with plan beside them.

What is measured is the real trainer on the real architecture; neither weights nor documents are downloaded.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PrinterCallback, ProgressCallback, TrainerCallback
from trl import get_peft_config

from .. import rope
from ..model.base import base_options, load_base
from ..model.record import machine, versions
from ..model.tokenizer import load_tokenizer
from ..plan import memory
from ..plan.advice import training_flops
from ..plan.gpus import GPUS, find_gpu
from ..terminal import table
from ..tiny import TINY_ID
from .machine import CPU_PARAMETERS, base_config, memory_explained, memory_settings, refuse_processes
from .recipe import Recipe, RecipeError, parse_recipe
from .trainer import CREAMTrainer

MOST_ACCUMULATION = 2
"""With two micro-batches a step gradients are there during a forward pass, as in a long one; more only take longer."""
FIXED = "--save_strategy no --eval_strategy no --logging_strategy no --load_best_model_at_end false --report_to none "
FIXED += "--eval_on_start false --push_to_hub false --assistant_only_loss false --short_documents shrink "
FIXED += "--disable_tqdm true"
"""Keys of a recipe that would save, publish, or need a tokenizer and documents of their own."""
OWN_OPTIONS = {"max_steps": "--steps", "gpu": "--memory_limit"}
"""Options of train and plan -> what bench has instead."""
SETTINGS = ("memory", "optim", "activation_offloading", "gradient_checkpointing", "per_device_train_batch_size")


class _Clock(TrainerCallback):
    """When each step ended, the GPU's work included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def parse_bench(arguments: list[str], steps: int) -> Recipe:
    """The recipe of `[--config FILE] [--field value ...]` for `steps` optimizer steps of at most two micro-batches."""
    for option in arguments:
        name = option.split("=")[0].replace("-", "_").removeprefix("__")
        if option.startswith("--") and name in OWN_OPTIONS:
            raise RecipeError(f"--{name} is not for bench: use {OWN_OPTIONS[name]}")
    if steps < 2:
        raise RecipeError(f"--steps {steps} must be at least 2: the first step is a warm-up")
    recipe = parse_recipe([*arguments, *FIXED.split()])
    run = recipe.run
    run.max_steps, run.gradient_accumulation_steps = steps, min(run.gradient_accumulation_steps, MOST_ACCUMULATION)
    # They name things of the base's own tokenizer.
    run.chat_template_path = run.eos_token = None
    return recipe


def random_weights(config: PreTrainedConfig, dtype: torch.dtype, load_in_4bit: bool) -> dict[str, torch.Tensor]:
    """A state dict of random weights for `config`, on the GPU where there is one.

    All that will be quantized is cut from one tensor of the largest weight's size, so that while loading there is never
    more than that beside the 4-bit weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # A tied head is the embeddings, and loaded with them.
    empty = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, config.initializer_range)

    quantized = {name for name, weight in empty.items() if load_in_4bit and weight.dim() == 2 and ".layers." in name}
    shared = draw(max((empty[name].numel() for name in quantized), default=0))
    weights = {}
    for name, weight in empty.items():
        if name in quantized:
            weights[name] = shared[: weight.numel()].view(weight.shape)
        else:
            weights[name] = draw(*weight.shape)
        if weight.dim() == 1:
            weights[name].fill_(0 if name.endswith("bias") else 1)
    return weights


def load_random(recipe: Recipe, config: PreTrainedConfig) -> Any:
    """The recipe's base as training loads it, scaled and quantized, but with random weights."""
    options, run = base_options(recipe.model, recipe.run.use_cpu), recipe.run
    options |= {"target_length": run.target_length, "rope_scaling_type": run.rope_scaling_type}
    weights = random_weights(config, options["dtype"], options["load_in_4bit"])
    model = load_base(recipe.model.model_name_or_path or "", config=config, state_dict=weights, **options)
    # With random weights it is not the base of that name.
    model.config._name_or_path = ""
    return model


def random_documents(config: PreTrainedConfig, tokens: int, count: int) -> Dataset:
    """`count` documents of `tokens` random token ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (count, tokens), generator=generator)
    return Dataset.from_dict({"input_ids": ids.numpy()})


def context_gib() -> float:
    """GiB on the GPU beside torch's allocator: CUDA's context, as far as other processes leave it to be seen."""
    free, total = torch.cuda.mem_get_info()
    return min((total - free - torch.cuda.memory_reserved()) / memory.GIB, memory.CUDA_CONTEXT_GIB)


def limit_memory(gib: float) -> None:
    """Let this process take no more than `gib` GiB of the GPU, CUDA's context included.

    Raises:
        ValueError: without a GPU, or on one with less.
    """
    if not torch.cuda.is_available():
        raise ValueError("--memory_limit is kept by CUDA's allocator, and there is no CUDA GPU here: leave it out")
    total = torch.cuda.mem_get_info()[1] / memory.GIB
    if gib > total:
        raise ValueError(f"--memory_limit {gib:.1f} GiB is more than the {total:.1f} GiB of this GPU: lower it")
    torch.cuda.set_per_process_memory_fraction(max(0.0, gib - context_gib()) / total)


def peaks(reset: bool = False) -> dict[str, float | None]:
    """Peaks of torch's CUDA allocator since they were last reset, in GiB; None without a GPU."""
    if not torch.cuda.is_available():
        return {"peak_allocated_gib": None, "peak_reserved_gib": None}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"peak_allocated_gib": allocated / memory.GIB, "peak_reserved_gib": reserved / memory.GIB}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What some steps of training took: the median step (the first is a warm-up), peaks in GiB (None: no GPU)."""

    loss: float
    steps: int
    seconds_per_step: float
    tokens_per_step: int
    tokens_per_second: float
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None


@dataclass(frozen=True, kw_only=True)
class Bench(Steps):
    """What `cream-peft bench --json` writes. Shares are None for a GPU that plan does not know, as on a CPU; so are
    there expandable_segments and context_gib."""

    model: str | None
    machine: str
    versions: dict[str, str]
    memory_limit_gib: float | None
    planned_gib: float
    loading_peak_gib: float | None
    settings: dict[str, str]
    model_flop_utilisation: float | None
    with_recomputation: float | None
    expandable_segments: bool | None
    context_gib: float | None


def time_steps(trainer: Any, steps: int, tokens: int) -> Steps:
    """Train for `steps` steps of `tokens` tokens."""
    clock = _Clock()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    peaks(reset=True)
    loss = trainer.train().training_loss
    seconds = statistics.median(after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False))
    speed = {"seconds_per_step": seconds, "tokens_per_step": tokens, "tokens_per_second": tokens / seconds}
    return Steps(loss=loss, steps=steps, **speed, **peaks())


def utilisation(recipe: Recipe, config: PreTrainedConfig, tokens_per_second: float) -> dict[str, float | None]:
    """Shares of the GPU's 16-bit peak: the model's own operations, and with what checkpointing computes again, which
    is the share that plan assumes. None for a GPU that plan does not know."""
    training, _ = memory_settings(recipe)
    shares = {"model_flop_utilisation": False, "with_recomputation": training.gradient_checkpointing}
    here = torch.cuda.is_available()
    gpu = find_gpu(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / memory.GIB) if here else None
    if gpu is None:
        return dict.fromkeys(shares)
    flops = {again: training_flops(config, replace(training, gradient_checkpointing=again)) for again in (False, True)}
    reached = tokens_per_second / (GPUS[gpu].tflops * 1e12)
    return {share: sum(flops[again].values()) * reached for share, again in shares.items()}


def bench_recipe(recipe: Recipe, memory_limit: float | None = None) -> Bench:
    """Train `recipe` (of `parse_bench`) on random weights and documents, within `memory_limit` GiB of the GPU.

    Raises:
        torch.OutOfMemoryError: where it does not fit.
        ValueError: a recipe or a limit that this machine cannot take.
    """
    config, name, on_gpu = base_config(recipe), recipe.model.model_name_or_path, torch.cuda.is_available()
    if on_gpu and recipe.run.use_cpu:
        raise RecipeError("use_cpu=true, and bench measures the GPU that is there: hide it, with CUDA_VISIBLE_DEVICES=")
    refuse_processes(recipe.run)
    recipe.run.resolve(rope.pretrained_window(config))
    terms = memory_settings(recipe)[0].terms(config)
    if not on_gpu and memory.parameter_count(config) > CPU_PARAMETERS:
        raise RecipeError(f"{name} is too large to try without a CUDA GPU: see cream-peft plan")
    if memory_limit is not None:
        limit_memory(memory_limit)
    with memory_explained(recipe, config):
        loading, steps = _run_steps(recipe, config)
    segments = torch.cuda.memory_snapshot() if on_gpu else []
    return Bench(
        **vars(steps),
        **utilisation(recipe, config, steps.tokens_per_second),
        model=name,
        machine=machine(),
        versions=versions(),
        memory_limit_gib=memory_limit,
        planned_gib=terms["total"] - terms["cuda_context"],
        loading_peak_gib=loading,
        settings={key: str(getattr(getattr(recipe.run, key), "value", getattr(recipe.run, key))) for key in SETTINGS},
        expandable_segments=any(segment.get("is_expandable") for segment in segments) if on_gpu else None,
        context_gib=context_gib() if on_gpu else None,
    )


def _run_steps(recipe: Recipe, config: PreTrainedConfig) -> tuple[float | None, Steps]:
    """The peak of loading in GiB, and the steps."""
    run, length = recipe.run, recipe.run.context_length or 0
    examples = run.per_device_train_batch_size * run.gradient_accumulation_steps
    peaks(reset=True)
    model = load_random(recipe, config)
    loading = peaks()["peak_allocated_gib"]
    with tempfile.TemporaryDirectory() as run.output_dir:
        trainer = CREAMTrainer(
            model=model,
            args=run,
            train_dataset=random_documents(config, length, examples * run.max_steps),
            processing_class=load_tokenizer(TINY_ID),
            peft_config=get_peft_config(recipe.model),
        )
        return loading, time_steps(trainer, run.max_steps, examples * length)


def text_of(result: Bench) -> str:
    """What was measured, as `cream-peft bench` prints it."""
    on_gpu = result.peak_allocated_gib is not None
    sizes = {"loading peak": result.loading_peak_gib, "peak allocated": result.peak_allocated_gib}
    sizes |= {"planned": result.planned_gib, "peak reserved": result.peak_reserved_gib}
    rows = [(name, f"{size:.2f} GiB") for name, size in sizes.items() if size is not None]
    rows += [] if on_gpu else [("peak memory", "not measured, there is no CUDA GPU")]
    step = f"{result.seconds_per_step:.3g} s a step of {result.tokens_per_step:,} tokens"
    rows += [("tokens/s", f"{result.tokens_per_second:,.0f} ({step})")]
    shares = {"model FLOP utilisation": result.model_flop_utilisation, "with recomputation": result.with_recomputation}
    for name, share in shares.items() if on_gpu else ():
        rows.append((name, "unknown GPU" if share is None else f"{share:.0%} of the GPU's 16-bit peak"))
    heading = f"{result.model} on {result.machine}, random weights, {result.steps} steps"
    return f"{heading}\n\n{table(['measured', ''], rows)}"
