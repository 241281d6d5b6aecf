"""Makes the shipped checkpoint: a 0.43 M parameter Llama that recalls inside its window of 256 tokens, and not beyond.

python recipes/cream-peft-tiny/make_base.py --output DIR [--seed 0]     (about 3 minutes on two CPU cores)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections import deque
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from cream_peft.tiny.documents import BEGIN, VOCABULARY_SIZE, evaluate_recall, training_document, vocabulary

logger = logging.getLogger(__name__)

WINDOW = 256
STEPS = 700
ECHO_STEPS = 200  # at least: the echo stays until recall has begun, which comes later with some seeds
STALL_SHARE = 0.4  # of the steps; recall that begins later is not finished by the last: another initialisation
ECHO_LOSS = 0.4  # nats; a model that only guesses among the values it has seen stays near 0.65
SHORT_STEPS = 50  # further steps on documents of 64 tokens, without the echo, before the window's 256
ATTEMPTS = 8
MINIMUM_RECALL = 0.97


def make_model() -> LlamaForCausalLM:
    """The untrained model, initialised from torch's global random state."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words split at whitespace; padding is `<s>`."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary())}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Cleaning up would glue a filler such as ".07" to the word before it.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<s>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def training_batch(rng: np.random.Generator, *, short: bool, echo: bool) -> dict[str, torch.Tensor]:
    """input_ids, labels and attention_mask: [64, 64] when short, where recall is learnt sooner, else [32, 256]."""
    documents = []
    for _ in range(64 if short else 32):
        options = {} if short else {"density": rng.uniform(0.3, 1.0), "new_key_share": rng.uniform(0.3, 0.7)}
        documents.append(training_document(rng, 64 if short else WINDOW, echo=echo, **options))
    input_ids, labels = (torch.from_numpy(np.stack(column)) for column in zip(*documents, strict=True))
    return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}


def make_optimizer(model: LlamaForCausalLM, steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW at 2e-3, 50 steps of warm-up, then a cosine to zero."""
    optimizer = AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)


def pretrain(seed: int, steps: int = STEPS) -> tuple[LlamaForCausalLM, int] | None:
    """Trains from scratch; returns the model and how many steps had the echo, or None when recall did not begin.

    The same seed and number of threads give the same weights on the same machine.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model().train()
    optimizer, schedule = make_optimizer(model, steps)
    losses: deque[float] = deque(maxlen=20)
    echo, echo_steps = True, 0
    progress = trange(steps, desc=f"pretraining, seed {seed}", unit="step", mininterval=1.0)
    for step in progress:
        echo = echo and (step < ECHO_STEPS or mean(losses) > ECHO_LOSS)
        echo_steps += echo
        if echo_steps > max(ECHO_STEPS, STALL_SHARE * steps):
            progress.close()
            return None
        loss = model(**training_batch(rng, short=step < echo_steps + SHORT_STEPS, echo=echo), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return model.eval(), echo_steps


def pretrain_until_learnt(seed: int, steps: int = STEPS) -> tuple[LlamaForCausalLM, dict[str, int]]:
    """Pretrains with `seed`, then seed + 1000, seed + 2000..., until recall begins; about every second seed stalls."""
    for attempt in range(1, ATTEMPTS + 1):
        pretrained = pretrain(seed + 1000 * (attempt - 1), steps)
        if pretrained is not None:
            return pretrained[0], {"attempts": attempt, "echo_steps": pretrained[1]}
        logger.info("recall did not begin in time: another initialisation")
    raise RuntimeError(f"recall did not begin in {ATTEMPTS} attempts from seed {seed}; try another seed")


def make_base(
    output: str | Path,
    seed: int = 0,
    steps: int = STEPS,
    minimum_recall: float = MINIMUM_RECALL,
    documents: int = 32,
) -> dict[str, Any]:
    """Pretrains, checks recall inside the window on `documents` documents, saves into `output`.

    Returns:
        What `origin.json` holds.
    """
    start = time.perf_counter()
    model, attempts = pretrain_until_learnt(seed, steps)
    seconds = time.perf_counter() - start
    recall = {
        f"{factor}x": float(evaluate_recall(model, factor * WINDOW, documents, seed=1)["correct"].mean())
        for factor in (1, 8)
    }
    logger.info("seed %d: recall %s after %.0f s", seed, recall, seconds)
    if recall["1x"] < minimum_recall:
        raise RuntimeError(
            f"seed {seed} recalls {recall['1x']:.3f} inside the window, needed {minimum_recall}; try another seed"
        )
    origin = {
        "seed": seed,
        "steps": steps,
        **attempts,
        "seconds": round(seconds, 1),
        "recall": recall,
        "parameters": model.num_parameters(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "architecture": platform.machine()},
    }
    model.save_pretrained(output)
    make_tokenizer().save_pretrained(output)
    (Path(output) / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
    return origin


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pretraining steps (default: {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1, as for the shipped one)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    origin = make_base(arguments.output, arguments.seed, arguments.steps)
    logger.info("recall %s; saved in %s", origin["recall"], arguments.output)


if __name__ == "__main__":
    main()
