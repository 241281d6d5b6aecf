"""Times CREAMTrainer against SFTTrainer, and the position sampler against the authors' preprocessing function.

python tests/bench_cpu.py --output FILE [--authors CHECKOUT] [--rounds 8] [--steps 20]

Both parts alternate the two sides within one run and compare pair by pair, so that a machine whose speed drifts does
not decide. The authors' function is taken from src/train.py of a checkout of wutong4012/CREAM; without one that part
says "not run".
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from cream_peft import CREAMConfig, CREAMDataCollator, CREAMTrainer
from cream_peft.collator import ROW_COLUMN
from cream_peft.model import load_base, load_tokenizer
from cream_peft.tiny import TINY_ID
from cream_peft.tiny.recall import training_rows
from cream_peft.trainer import versions

WINDOW, TARGET, BATCH = 256, 2048, 16


class _Clock(TrainerCallback):
    """Seconds per step, data loading included; the first two steps are warm-up."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[1]) / (len(self.ends) - 2)


def step_seconds(trainer_class: type, config_class: type, steps: int, **settings: Any) -> float:
    """Mean seconds of a training step of the tiny model with LoRA, fp32."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = config_class(
            scratch, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no", report_to="none", bf16=False,
            use_cpu=True, dataloader_pin_memory=False, seed=0, **settings,
        )  # fmt: skip
        tokenizer = load_tokenizer(TINY_ID)
        tokenizer.eos_token = tokenizer.bos_token
        clock = _Clock()
        trainer = trainer_class(
            model=load_base(TINY_ID, target_length=TARGET, rope_scaling_type="ntk", load_in_4bit=False),
            args=arguments,
            train_dataset=Dataset.from_dict(training_rows(BATCH * steps, WINDOW, seed=1)),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )
        trainer.train()
        return clock.seconds()


def bench_steps(rounds: int, steps: int) -> dict[str, Any]:
    ours: list[float] = []
    theirs: list[float] = []
    for index in range(rounds):
        sides = [
            (theirs, SFTTrainer, SFTConfig, {"max_length": WINDOW}),
            (ours, CREAMTrainer, CREAMConfig,
             {"context_length": WINDOW, "target_length": TARGET, "rope_scaling_type": "ntk"}),
        ]  # fmt: skip
        for found, trainer_class, config_class, settings in sides if index % 2 == 0 else reversed(sides):
            found.append(step_seconds(trainer_class, config_class, steps, **settings))
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "seconds_per_step_cream_trainer": ours,
        "seconds_per_step_sft_trainer": theirs,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def authors_function(checkout: Path) -> Any:
    """The function CREAM of the authors' src/train.py, without the imports of the rest of that file."""
    import scipy.special

    tree = ast.parse((checkout / "src" / "train.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "CREAM")
    names = {"random": random, "np": np, "sp": scipy.special, "torch": torch}
    exec(compile(ast.Module([function], []), "authors", "exec"), names)
    return names["CREAM"]


def bench_sampler(checkout: Path | None, rounds: int, examples: int = 256) -> dict[str, Any] | str:
    """Seconds per example of drawing and gathering 4,096 tokens of a 4,096-token document for a context of 32,768."""
    if checkout is None:
        return "not run"
    window, target = 4096, 32_768
    function = authors_function(checkout)
    documents = np.random.default_rng(0).integers(0, 32_000, (examples, window))
    as_lists = documents.tolist()
    rows = [{"input_ids": document, ROW_COLUMN: row} for row, document in enumerate(documents)]
    collate = CREAMDataCollator(pad_token_id=0, context_length=window, target_length=target)
    ours, theirs = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        function(
            {"input_ids": as_lists},
            scaled_max_position_embeddings=target,
            model_max_position_embeddings=window,
            tokenizer=None,
        )
        theirs.append((time.perf_counter() - start) / examples)
        start = time.perf_counter()
        for first in range(0, examples, 4):
            collate(rows[first : first + 4])
        ours.append((time.perf_counter() - start) / examples)
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    return {
        "seconds_per_example_sampler_and_collator": ours,
        "seconds_per_example_authors_function": theirs,
        "times_faster": ratios,
        "median_times_faster": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--authors", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    results = {
        "command": "make bench-cpu" + (" AUTHORS=CHECKOUT" if options.authors else ""),
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "architecture": platform.machine()},
        "trainer": bench_steps(options.rounds, options.steps),
        "sampler": bench_sampler(options.authors, options.rounds),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"step time, CREAMTrainer / SFTTrainer: {results['trainer']['median_ratio']:.3f}")
    sampler = results["sampler"]
    faster = sampler if isinstance(sampler, str) else f"{sampler['median_times_faster']:.0f} times faster"
    print(f"sampler and collator against the authors' function: {faster}")
    print(f"The figures are in {options.output}")


if __name__ == "__main__":
    main()
