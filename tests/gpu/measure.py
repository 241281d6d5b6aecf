"""Measures training and reading long documents on a CUDA GPU: peak memory, speed, and what plan says of each.

    python tests/gpu/measure.py --output FILE.json

One call stays under nine minutes. Each case runs in a process of its own and is written to FILE at once, so that the
same command goes on where it stopped. Weights and documents are random: nothing is downloaded. A limit is the memory
that torch reports for the card named, CUDA's context included. `--tiny` tries the script itself, with the embedded
model and without limits, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# A machine with a GPU may have no network: fail at once where something would be downloaded after all.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RECIPE = ["--config", str(ROOT / "recipes/llama-2-7b/cream-4k-32k-qlora.yaml")]
THIRTEEN = [*RECIPE, "--model_name_or_path", "meta-llama/Llama-2-13b-hf"]
LOW = ["--memory", "low"]
CARD = {8: "RTX 4060 8GB", 12: "RTX 3060 12GB", 16: "RTX 4060 Ti 16GB", 24: "RTX 3090 24GB"}
"""GB on the box -> the card whose memory is the limit."""
STEPS, LENGTH, NEW_TOKENS = 4, 32_768, 8
# A case that plan puts so many times above its limit is not tried; with so little time left none is started.
TOO_LARGE, LEAST_SECONDS = 1.25, 20


def _cases() -> dict[str, dict[str, Any]]:
    """Name -> kind of case, recipe arguments, and limit in GB; what matters most comes first."""
    cases: dict[str, dict[str, Any]] = {}

    def add(name: str, kind: str, arguments: list[str], limit: int | None = None, **more: Any) -> None:
        case = {"kind": kind, "arguments": arguments, "limit": limit}
        cases[name + (f", {limit} GB" if limit else "")] = case | more

    add("7B low", "train", [*RECIPE, *LOW], 8)
    add("7B default", "train", RECIPE, 8)
    add("7B plain TRL", "trl", RECIPE)
    add("13B low", "train", [*THIRTEEN, *LOW], 12)
    add("7B reads 32K", "read", RECIPE, 24, kv_cache="default")
    add("7B reads 32K, 4-bit cache", "read", RECIPE, 12, kv_cache="quantized")
    add("13B default", "train", THIRTEEN, 16)
    add("7B profile", "profile", RECIPE)
    for limit in (12, 16, 24):
        add("7B default", "train", RECIPE, limit)
        add("7B low", "train", [*RECIPE, *LOW], limit)
    add("13B low", "train", [*THIRTEEN, *LOW], 16)
    add("13B default", "train", THIRTEEN, 12)
    # What each choice brings by itself.
    add("7B offload alone", "train", [*RECIPE, "--activation_offloading", "true"])
    add("7B 32-bit optimizer", "train", [*RECIPE, "--optim", "adamw_torch_fused"])
    add("7B plain TRL", "trl", RECIPE, 8)
    add("7B plain TRL", "trl", RECIPE, 12)
    return cases


CASES = _cases()


def train_case(case: dict[str, Any], recipe: Any, limit: float | None) -> dict[str, Any]:
    from cream_peft.train.bench import bench_recipe

    return asdict(bench_recipe(recipe, limit))


def profile_case(case: dict[str, Any], recipe: Any, limit: float | None) -> dict[str, Any]:
    """What `train` measures, under torch's profiler, and the kernels that took longest (milliseconds in all)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from cream_peft.train.bench import bench_recipe

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        measured = asdict(bench_recipe(recipe, limit))
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -getattr(kernel, clock))
    times = [
        {"kernel": kernel.key[:120], "milliseconds": getattr(kernel, clock) / 1000, "calls": kernel.count}
        for kernel in kernels
    ]
    return measured | {"kernel_milliseconds": sum(kernel["milliseconds"] for kernel in times), "kernels": times[:25]}


def trl_case(case: dict[str, Any], recipe: Any, limit: float | None) -> dict[str, Any]:
    """TRL's SFTTrainer with its own defaults: no double quantization, LoRA dropout 0.05, its optimizer. The batch, the
    length and LoRA's rank and modules are the recipe's."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from cream_peft.model.tokenizer import load_tokenizer
    from cream_peft.train import bench
    from cream_peft.train.machine import base_config

    config, run, arguments = base_config(recipe), recipe.run, recipe.model
    run.resolve(config.max_position_embeddings)
    run.target_length, run.rope_scaling_type = config.max_position_embeddings, None
    arguments.use_bnb_nested_quant = False
    if limit is not None:
        bench.limit_memory(limit)
    tokenizer = load_tokenizer(bench.TINY_ID)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.bos_token
    examples = run.per_device_train_batch_size * run.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=bench.load_random(recipe, config),
            args=SFTConfig(
                scratch, max_length=run.context_length, max_steps=run.max_steps, save_strategy="no", report_to="none",
                logging_strategy="no", disable_tqdm=True, per_device_train_batch_size=run.per_device_train_batch_size,
                gradient_accumulation_steps=run.gradient_accumulation_steps, bf16=run.bf16, fp16=run.fp16,
            ),
            train_dataset=bench.random_documents(config, run.context_length, examples * run.max_steps),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=arguments.lora_r, lora_alpha=arguments.lora_alpha, lora_dropout=0.05,
                target_modules=arguments.lora_target_modules, task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        measured = bench.time_steps(trainer, run.max_steps, examples * run.context_length)
    return asdict(measured) | bench.utilisation(recipe, config, measured.tokens_per_second)


def read_case(case: dict[str, Any], recipe: Any, limit: float | None) -> dict[str, Any]:
    """A document of LENGTH tokens read into a cache a chunk at a time, as `cream-peft chat` does, and an answer."""
    import torch
    from peft import get_peft_model
    from trl import get_peft_config

    from cream_peft.evals.answers import chunked_logits
    from cream_peft.model.kv_cache import PREFILL_CHUNK, new_cache
    from cream_peft.plan.memory import Reading
    from cream_peft.train import bench
    from cream_peft.train.machine import base_config

    config = base_config(recipe)
    recipe.run.resolve(config.max_position_embeddings)
    length = min(LENGTH, recipe.run.target_length)
    if limit is not None:
        bench.limit_memory(limit)
    model = get_peft_model(bench.load_random(recipe, config), get_peft_config(recipe.model)).eval()
    ids = torch.randint(config.vocab_size, (1, length), device=model.device)
    mask, cache = torch.ones_like(ids), new_cache(model.config, case["kv_cache"])
    bench.peaks(reset=True)
    start = time.perf_counter()
    for _ in chunked_logits(model, ids[0, :-1].tolist(), cache, PREFILL_CHUNK, first=length):
        pass
    # .item() waits for the GPU.
    _ = ids[0, 0].item()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS)
    reading = Reading(
        length=length,
        kv_cache=case["kv_cache"],
        load_in_4bit=recipe.model.load_in_4bit,
        lora_r=recipe.model.lora_r,
        target_modules=recipe.model.lora_target_modules,
    )
    terms = reading.terms(config)
    planned = {"planned_gib": terms["total"] - terms["cuda_context"], "length": length}
    return {"tokens_per_second": length / seconds, **planned, **bench.peaks()}


KINDS = {"train": train_case, "profile": profile_case, "trl": trl_case, "read": read_case}


def run_case(name: str, tiny: bool) -> dict[str, Any]:
    """Measure one case in this process: what it found, with its status."""
    import torch

    from cream_peft.model.record import machine, versions
    from cream_peft.plan.gpus import parse_gpu
    from cream_peft.train.bench import parse_bench, peaks
    from cream_peft.train.machine import base_config, plan_recipe

    case, arguments = CASES[name], CASES[name]["arguments"]
    if tiny:
        options = [word for word in arguments if word in ("--memory", "low")]
        arguments = [*options, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    limit = parse_gpu(CARD[case["limit"]]) if case["limit"] and not tiny else None
    result = {"limit_gib": limit, "machine": machine(), "versions": versions()}
    recipe = parse_bench(arguments, STEPS)
    if limit is not None:
        total = torch.cuda.mem_get_info()[1] / 2**30
        planned = plan_recipe(recipe, base_config(recipe)).terms["total"] if case["kind"] == "train" else 0
        if limit > total:
            return result | {"status": f"skipped: this GPU has {total:.1f} GiB"}
        if planned > TOO_LARGE * limit:
            return result | {"status": f"skipped: planned {planned:.1f} GiB"}
    try:
        return result | {"status": "measured"} | KINDS[case["kind"]](case, recipe, limit)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return result | {"status": "does not fit", "said": " ".join(str(error).split())[:300], **peaks()}


def start_case(name: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """Run a case in a process of its own, for at most so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--case", name, "--output", str(path), *(["--tiny"] if tiny else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: not done after {seconds:.0f} s"}
        if path.is_file():
            return json.loads(path.read_text())
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"status": f"failed: exit {done.returncode}: {said[:300]}", "stderr": done.stderr[-3000:]}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(scratch, path)


def measure(path: Path, tiny: bool, minutes: float, case_seconds: float, only: str = "") -> dict[str, Any]:
    """Run the cases that `path` does not hold yet, in the time there is, and return all results."""
    end = time.monotonic() + 60 * minutes
    try:
        results = json.loads(path.read_text()) if path.is_file() else {"tiny": tiny, "cases": {}}
        done = {name for name, result in results["cases"].items() if not result["status"].startswith("failed")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or not of this script: delete it, or choose another --output") from error
    if results.get("tiny") != tiny:
        raise ValueError(f"{path} was {'not ' * tiny}written with --tiny: choose another --output")
    if not any(only in name for name in CASES):
        raise ValueError(f"--only {only!r} is in no case's name: {'; '.join(CASES)}")
    pending = [name for name in CASES if only in name and name not in done]
    for name in pending:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            break
        start = time.monotonic()
        result = start_case(name, tiny, min(case_seconds, left))
        results["cases"][name] = result | {"kind": CASES[name]["kind"], "seconds": round(time.monotonic() - start, 1)}
        _write(path, results)
        print(f"{name}: {result['status']}, {time.monotonic() - start:.0f} s", flush=True)
    return results


def table_of(results: dict[str, Any]) -> list[str]:
    """The table's lines, in Markdown, memory in GiB."""
    lines = ["The embedded tiny model on this machine, without limits: no 7B, no 13B", ""] if results["tiny"] else []
    lines += ["| case | limit | peak allocated | planned | off by | reserved | tokens/s | of peak FLOP/s | |"]
    lines.append("|---" * 9 + "|")
    for name, result in results["cases"].items():
        peak, planned, share = (result.get(key) for key in ("peak_allocated_gib", "planned_gib", "with_recomputation"))
        off = f"{peak / planned - 1:+.1%}" if peak and planned else ""
        found = [result.get("limit_gib"), peak, planned, off, result.get("peak_reserved_gib")]
        cells = ["" if value is None else value if isinstance(value, str) else f"{value:.2f}" for value in found]
        speed = result.get("tokens_per_second")
        cells += ["" if speed is None else f"{speed:,.0f}", "" if share is None else f"{share:.0%}", result["status"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu.json", help="results (default: runs/gpu.json)")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all cases of this call (default: 8.5)")
    parser.add_argument("--case_seconds", type=float, default=150, help="time for one case (default: 150)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="try the script itself with the embedded model")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        _write(options.output, run_case(options.case, options.tiny))
        return
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA GPU here: nothing was measured; --tiny tries the script itself\n")
    try:
        results = measure(options.output, options.tiny, options.minutes, options.case_seconds, options.only)
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted, what was measured is in {options.output}: the same command resumes\n")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(table_of(results)))
    left = [name for name in CASES if options.only in name and name not in results["cases"]]
    if left:
        print(f"{len(left)} cases are left: the same command resumes ({', '.join(left)})")
    print(f"The results are in {options.output}")


if __name__ == "__main__":
    main()
