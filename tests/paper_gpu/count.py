"""Runs training steps, the held-out loss and reading on the CUDA code path without a GPU, and counts what they take.

    python tests/paper_gpu/count.py --output FILE.json [--layers 2] [--only NAME ...]

The trainer and the libraries are the real ones; tensors on the GPU have a size and no content (device.py). Peaks are of
storages alive, in GiB, beside plan's without CUDA's context. Each case is written to FILE at once, and the same
command goes on where it stopped. A C++ compiler must be there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import device  # noqa: E402 before torch
import torch  # noqa: E402
from fake import PaperGPU, choose_attention, swap_fake_tensors  # noqa: E402

GIB, LENGTH, STEPS = 2**30, 32_768, 2
BASE = "llama-2-7b/cream-4k-32k-qlora"


def cases() -> dict[str, dict[str, Any]]:
    """Name -> recipe, further arguments, card, and for reading the KV cache."""
    recipes = sorted(str(path.relative_to(ROOT / "recipes"))[:-5] for path in ROOT.glob("recipes/*/cream-*.yaml"))
    found: dict[str, dict[str, Any]] = {recipe: {"recipe": recipe} for recipe in recipes}

    def add(name: str, *arguments: str, recipe: str = BASE, **more: str) -> None:
        found[name] = {"recipe": recipe, "arguments": list(arguments)} | more

    thirteen = ("--model_name_or_path", "meta-llama/Llama-2-13b-hf")
    add("7B, memory: low", "--memory", "low")
    add("13B", *thirteen)
    add("13B, memory: low", *thirteen, "--memory", "low")
    add("7B, fp16 on Turing", card="turing")
    add("Mistral-7B, fp16 on Turing", recipe="mistral-7b-v0.3/cream-32k-128k-qlora", card="turing")
    add("7B on Hopper", card="hopper")
    add("7B, 16-bit base", "--load_in_4bit", "false")
    add("7B, all linears", "--lora_target_modules", "all-linear")
    add("7B, dropout", "--lora_dropout", "0.05")
    add("7B, batch 2", "--per_device_train_batch_size", "2")
    add("7B, without checkpoints", "--gradient_checkpointing", "false")
    add("7B, every weight", "--use_peft", "false", "--load_in_4bit", "false")
    for name, recipe in (("7B", BASE), ("Mistral-7B", "mistral-7b-v0.3/cream-32k-128k-qlora")):
        for cache, bits in (("default", 16), ("quantized", 4)):
            add(f"{name} reads 32K, {bits}-bit cache", recipe=recipe, cache=cache)
    return found


def empty_weights(config: Any, dtype: torch.dtype, load_in_4bit: bool) -> dict[str, torch.Tensor]:
    """bench.random_weights without the numbers, for which CUDA has a generator."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    quantized = {name for name, weight in shapes.items() if load_in_4bit and weight.dim() == 2 and ".layers." in name}
    largest = max((shapes[name].numel() for name in quantized), default=0)
    shared = torch.empty(largest, dtype=dtype, device="cuda")
    return {
        name: shared[: weight.numel()].view(weight.shape)
        if name in quantized
        else torch.empty(weight.shape, dtype=dtype, device="cuda")
        for name, weight in shapes.items()
    }


def counted(gpu: PaperGPU, terms: dict[str, float]) -> dict[str, Any]:
    """What was counted since the last reset, beside the plan; and the count starts anew."""
    peak, planned = gpu.peak / GIB, terms["total"] - terms["cuda_context"]
    found = {"peak_gib": round(peak, 4), "planned_gib": round(planned, 4), "off": round(peak / planned - 1, 4)}
    found |= {"attention": dict(gpu.attention), "waits": dict(gpu.waits)}
    gpu.reset()
    return found


def train_case(gpu: PaperGPU, recipe: Any, config: Any) -> dict[str, Any]:
    """Two steps of two micro-batches, and the held-out loss."""
    from cream_peft.model.base import load_tokenizer, lora_config
    from cream_peft.tiny import TINY_ID
    from cream_peft.train import bench
    from cream_peft.train.machine import memory_settings
    from cream_peft.train.trainer import CREAMTrainer

    run = recipe.run
    run.eval_strategy = "steps"
    training, held_out = memory_settings(recipe)
    # It is asked for by itself, below.
    run.eval_strategy = "no"
    with tempfile.TemporaryDirectory() as run.output_dir:
        count = run.per_device_train_batch_size * run.gradient_accumulation_steps * STEPS
        trainer = CREAMTrainer(
            model=bench.load_random(recipe, config),
            args=run,
            train_dataset=bench.random_documents(config, run.context_length, count),
            eval_dataset=bench.random_documents(config, run.eval_length, run.per_device_eval_batch_size),
            processing_class=load_tokenizer(TINY_ID),
            peft_config=lora_config(recipe.model) if recipe.model.use_peft else None,
        )
        step, phases = trainer.training_step, {"step": {}, "between": {}}

        def training_step(*args, **kwargs):
            phases["between"] = dict(gpu.waits)
            gpu.waits.clear()
            loss = step(*args, **kwargs)
            phases["step"] = dict(gpu.waits)
            gpu.waits.clear()
            return loss

        trainer.training_step = training_step
        gpu.reset()
        trainer.train()
        result = counted(gpu, training.terms(config)) | {"dtype": "float16" if run.fp16 else "bfloat16"}
        result |= {"waits": phases["step"], "waits_between": phases["between"]}
        trainer.evaluate()
        return result | {"held_out": counted(gpu, held_out.terms(config))}


def read_case(gpu: PaperGPU, recipe: Any, config: Any, cache: str) -> dict[str, Any]:
    """A document read as `chat` and `evaluate` do."""
    from peft import get_peft_model

    from cream_peft.evals.answers import chunked_logits
    from cream_peft.model.base import lora_config
    from cream_peft.model.kv_cache import PREFILL_CHUNK, new_cache
    from cream_peft.plan.memory import Reading
    from cream_peft.train import bench

    model = get_peft_model(bench.load_random(recipe, config), lora_config(recipe.model)).eval()
    gpu.reset()
    ids = [index % config.vocab_size for index in range(LENGTH)]
    for _ in chunked_logits(model, ids, new_cache(model.config, cache), PREFILL_CHUNK, first=LENGTH - 1):
        pass
    reading = Reading(
        length=LENGTH, kv_cache=cache, lora_r=recipe.model.lora_r, target_modules=recipe.model.lora_target_modules
    )
    return counted(gpu, reading.terms(config))


def run_case(gpu: PaperGPU, case: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """Count one case, at its base's own number of layers if that is None."""
    from cream_peft.rope import pretrained_window
    from cream_peft.train import bench
    from cream_peft.train.machine import base_config

    device.card.name = case.get("card", "ampere")
    gpu.forget()
    arguments = ["--config", str(ROOT / f"recipes/{case['recipe']}.yaml"), *case.get("arguments", [])]
    start, recipe = time.perf_counter(), bench.parse_bench(arguments, STEPS)
    config = base_config(recipe)
    config.num_hidden_layers = layers or config.num_hidden_layers
    recipe.run.resolve(pretrained_window(config))
    with gpu:
        result = read_case(gpu, recipe, config, case["cache"]) if "cache" in case else train_case(gpu, recipe, config)
    seconds = round(time.perf_counter() - start, 1)
    return {"layers": config.num_hidden_layers, "card": device.card.name, "seconds": seconds} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="so many layers only (default: the base's own)")
    parser.add_argument("--only", nargs="+", default=[""], help="only cases whose name contains one of these")
    options = parser.parse_args()
    import datasets
    import libraries
    import transformers

    from cream_peft.model.record import versions
    from cream_peft.train import bench

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gpu = PaperGPU()
    libraries.install(gpu)
    choose_attention(gpu)
    swap_fake_tensors()
    bench.random_weights = empty_weights
    # What the libraries hold is not looked through again and again.
    gc.freeze()
    command = "python tests/paper_gpu/count.py --output FILE" + (f" --layers {options.layers}" * bool(options.layers))
    results = {"command": command, "versions": versions(), "machine": "no GPU: counted on the CUDA code path"}
    results["cases"] = json.loads(options.output.read_text())["cases"] if options.output.is_file() else {}
    for name, case in cases().items():
        if not any(part in name for part in options.only) or "peak_gib" in results["cases"].get(name, {}):
            continue
        try:
            found = run_case(gpu, case, options.layers)
            said = f"{found['peak_gib']:.2f} GiB, planned {found['planned_gib']:.2f}, {found['seconds']} s"
        except Exception as error:
            traceback.print_exc()
            found = {"error": (said := f"{type(error).__name__}: {error}")}
        results["cases"][name] = found
        print(f"{name}: {said}", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
