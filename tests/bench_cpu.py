"""Times CREAMTrainer against SFTTrainer, the position sampler against the authors' preprocessing function, and the
answers of evaluate against a plain loop of generate on the same prompts.

python tests/bench_cpu.py --output FILE [--authors CHECKOUT] [--rounds 12] [--steps 120]

All parts alternate the two sides within one process, step by step or round by round, so that a machine whose speed
drifts does not decide. The authors' function is taken from src/train.py of a checkout of wutong4012/CREAM; without one
that part says "not run".
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from cream_peft import CREAMConfig, CREAMDataCollator, CREAMTrainer
from cream_peft.evals.answers import scored_answers
from cream_peft.evals.prompts import Case, Writer
from cream_peft.evals.recall import embedded_kv_prompt
from cream_peft.model.base import load_base
from cream_peft.model.record import machine, versions
from cream_peft.model.tokenizer import load_tokenizer
from cream_peft.tiny import TINY_ID
from cream_peft.tiny.documents import training_rows
from cream_peft.train.collator import ROW_COLUMN

WINDOW, TARGET, BATCH = 256, 2048, 16


class _Turns(TrainerCallback):
    """Lets two trainers take one step each in turn, and times each step, data loading included."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore):
        self.mine, self.other = mine, other
        self.seconds: list[float] = []

    def start(self) -> None:
        self.mine.acquire()
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)
        self.other.release()
        if state.global_step < args.max_steps:
            self.start()


def make_trainer(trainer_class: type, config_class: type, steps: int, scratch: str, **settings: Any) -> SFTTrainer:
    """A trainer of the tiny model with LoRA, fp32, on documents of the window.

    The learning rate is next to nothing, so that both sides go on computing with the same model.
    """
    arguments = config_class(
        scratch, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-8, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no", report_to="none", bf16=False,
        use_cpu=True, dataloader_pin_memory=False, seed=0, **settings,
    )  # fmt: skip
    tokenizer = load_tokenizer(TINY_ID)
    tokenizer.eos_token = tokenizer.bos_token
    trainer = trainer_class(
        model=load_base(TINY_ID, target_length=TARGET, rope_scaling_type="ntk", load_in_4bit=False),
        args=arguments,
        train_dataset=Dataset.from_dict(training_rows(BATCH * steps, WINDOW, seed=1)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps_in_turn(sides: list[tuple[type, type, dict[str, Any]]], steps: int) -> list[list[float]]:
    """Seconds of the steps of two trainers in one process, in turn; the first five steps are warm-up."""
    turns = [threading.Semaphore(0), threading.Semaphore(0)]
    clocks, threads = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for index, (trainer_class, config_class, settings) in enumerate(sides):
            trainer = make_trainer(trainer_class, config_class, steps, scratch, **settings)
            clock = _Turns(turns[index], turns[1 - index])
            trainer.add_callback(clock)

            def run(trainer=trainer, clock=clock):
                clock.start()
                trainer.train()

            clocks.append(clock)
            threads.append(threading.Thread(target=run))
            threads[-1].start()
        turns[0].release()
        for thread in threads:
            thread.join()
    return [clock.seconds[5:-1] for clock in clocks]


def bench_steps(steps: int) -> dict[str, Any]:
    """Step times of both trainers, each going first once."""
    sft = (SFTTrainer, SFTConfig, {"max_length": WINDOW})
    lengths = {"context_length": WINDOW, "target_length": TARGET, "rope_scaling_type": "ntk"}
    cream = (CREAMTrainer, CREAMConfig, lengths)
    theirs_first, ours_second = steps_in_turn([sft, cream], steps)
    ours_first, theirs_second = steps_in_turn([cream, sft], steps)
    ours, theirs = statistics.median(ours_first + ours_second), statistics.median(theirs_first + theirs_second)
    return {
        "steps": len(ours_first + ours_second),
        "median_seconds_per_step_sft_trainer": theirs,
        "median_seconds_per_step_cream_trainer": ours,
        "ratio_of_medians": ours / theirs,
        "ratio_when_cream_trainer_goes_first": statistics.median(ours_first) / statistics.median(theirs_second),
        "ratio_when_sft_trainer_goes_first": statistics.median(ours_second) / statistics.median(theirs_first),
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


def plain_answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """What one would write: generate, one prompt after the other."""
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        replies.append(tokenizer.decode(output[0, len(prompt) :]))
    return replies


def bench_answers(rounds: int) -> dict[str, Any]:
    """Tokens of prompts per second: five keys of one document of 2,048 tokens."""
    tokenizer = load_tokenizer(TINY_ID)
    model = load_base(TINY_ID, target_length=TARGET, rope_scaling_type="ntk", load_in_4bit=False).eval()
    writer = Writer(tokenizer, "plain")
    asked = [embedded_kv_prompt(writer, Case(TARGET, depth, 0, 0, 1)) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    prompts = [prompt.tokens for prompt in asked]
    seconds: dict[str, list[float]] = {"evaluate": [], "generate": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours = [reply for reply, _ in scored_answers(model, tokenizer, asked, answer_tokens=1)]
        middle = time.perf_counter()
        theirs = plain_answers(model, tokenizer, prompts)
        seconds["evaluate"].append(middle - start)
        seconds["generate"].append(time.perf_counter() - middle)
        assert ours == theirs
    tokens, ratios = sum(map(len, prompts)), [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "one document": {
            "prompts": len(prompts),
            "tokens": tokens,
            "tokens_per_second_evaluate": tokens / statistics.median(seconds["evaluate"]),
            "tokens_per_second_generate": tokens / statistics.median(seconds["generate"]),
            "times_faster": ratios,
            "median_times_faster": statistics.median(ratios),
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--authors", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    # One thread: the idle threads of one trainer's pool would spin on the cores of the other.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = {
        "command": "make bench-cpu" + (" AUTHORS=CHECKOUT" if options.authors else ""),
        "versions": versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "trainer": bench_steps(options.steps),
        "sampler": bench_sampler(options.authors, options.rounds),
        "answers": bench_answers(options.rounds),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"step time, CREAMTrainer / SFTTrainer: {results['trainer']['ratio_of_medians']:.3f}")
    sampler = results["sampler"]
    faster = sampler if isinstance(sampler, str) else f"{sampler['median_times_faster']:.0f} times faster"
    print(f"sampler and collator against the authors' function: {faster}")
    for name, answered in results["answers"].items():
        print(f"answers, {name}: {answered['median_times_faster']:.1f} times as fast as a loop of generate")
    print(f"The figures are in {options.output}")


if __name__ == "__main__":
    main()
