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
# Fake tensors are not for several threads at once.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import device  # noqa: E402 before torch
from cases import cases, problems  # noqa: E402
from fake import PaperGPU, choose_attention, swap_fake_tensors  # noqa: E402

GIB, LENGTH, STEPS = 2**30, 32_768, 2


def counted(gpu: PaperGPU, terms: dict[str, float]) -> dict[str, Any]:
    """What was counted since the last reset, beside the plan; and the count starts anew."""
    peak, planned = gpu.peak / GIB, terms["total"] - terms["cuda_context"]
    found = {"peak_gib": round(peak, 4), "planned_gib": round(planned, 4), "kernels": sorted(gpu.kernels_of_sdpa)}
    gpu.reset()
    return found


def train_case(gpu: PaperGPU, recipe: Any, config: Any) -> dict[str, Any]:
    """Two steps of two micro-batches, and the held-out loss."""
    from trl import get_peft_config

    from cream_peft.model.tokenizer import load_tokenizer
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
            peft_config=get_peft_config(recipe.model),
        )
        step, before, within = trainer.training_step, [], []

        def training_step(*args, **kwargs):
            if not before:
                # Without those of the check of positions, which runs before autocast is set up.
                gpu.kernels_of_sdpa.clear()
            before.append(gpu.take_host_syncs())
            loss = step(*args, **kwargs)
            within.append(gpu.take_host_syncs())
            return loss

        trainer.training_step = training_step
        gpu.reset()
        trainer.train()
        # Before the first micro-batch of the second step comes the optimizer's.
        syncs = {"host_syncs": within[-1], "optimizer_host_syncs": before[run.gradient_accumulation_steps]}
        result = counted(gpu, training.terms(config)) | syncs
        trainer.evaluate()
        return result | {"held_out": counted(gpu, held_out.terms(config))}


def read_case(gpu: PaperGPU, recipe: Any, config: Any, cache: str) -> dict[str, Any]:
    """A document read as `chat` and `evaluate` do."""
    from peft import get_peft_model
    from trl import get_peft_config

    from cream_peft.evals.answers import chunked_logits
    from cream_peft.model.kv_cache import PREFILL_CHUNK, new_cache
    from cream_peft.plan.memory import Reading
    from cream_peft.train import bench

    model = get_peft_model(bench.load_random(recipe, config), get_peft_config(recipe.model)).eval()
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
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    recipe.run.resolve(pretrained_window(config))
    with gpu:
        result = read_case(gpu, recipe, config, case["cache"]) if "cache" in case else train_case(gpu, recipe, config)
    seconds = round(time.perf_counter() - start, 1)
    return {"layers": config.num_hidden_layers, "card": device.card.name, "seconds": seconds} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="so many layers only (default: the base's own)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=cases(), help="only these cases")
    options = parser.parse_args()
    import datasets
    import libraries
    import transformers

    from cream_peft.model.record import versions

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gpu = PaperGPU()
    libraries.install(gpu)
    choose_attention(gpu)
    swap_fake_tensors()
    # What the libraries hold is not looked through again and again.
    gc.freeze()
    path, layers = options.output, options.layers
    command = f"python tests/paper_gpu/count.py --output FILE{f' --layers {layers}' if layers else ''}"
    results = {"command": command, "versions": versions(), "machine": "no GPU: counted on the CUDA code path"}
    results["cases"] = json.loads(path.read_text())["cases"] if path.is_file() else {}
    for name, case in cases().items():
        if name not in (options.only or cases()) or "peak_gib" in results["cases"].get(name, {}):
            continue
        try:
            found = run_case(gpu, case, layers)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        results["cases"][name] = found
        said = "; ".join(problems(case, found)) or f"{found['peak_gib']:.2f} GiB, planned {found['planned_gib']:.2f}"
        print(f"{name}: {said}, {found.get('seconds')} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
