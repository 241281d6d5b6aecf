"""Self-distillation against forgetting: at short lengths the adapter is held to what the untouched base computes.

The idea is LongReD's (arXiv 2502.07365, ACL 2025): short texts at plain positions, and the cosine distance of hidden
states to those of the base before extension. Here the teacher is the student itself, adapter off and RoPE unscaled, so
that no second model is loaded. Of LongReD's layers only the last is compared: it is all that the LM head reads, and no
logits are computed, of which a vocabulary of 128K tokens makes 2 GiB for 4,096 tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch.nn import functional
from transformers import PreTrainedConfig

from .. import rope
from ..model.misfit import KEEPS_BASE


def refuse_distillation(args: Any, peft_config: PeftConfig | None) -> None:
    """Refuse a positive `distillation_weight` where there is no base to hold to, or where processes share the model.

    Raises:
        ValueError: naming which of the two.
    """
    given = f"distillation_weight={args.distillation_weight:g}"
    # Of other values disable_adapter() leaves something in the base.
    undone = {"bias": ("none",), "init_lora_weights": KEEPS_BASE}
    for name, values in undone.items() if args.distillation_weight else ():
        value = getattr(peft_config, name, values[0])
        if value not in values:
            raise ValueError(f"{given} cannot go with {name}={value}, which changes the base that is held to")
    if args.distillation_weight and peft_config is None:
        raise ValueError(
            f"{given} holds a new adapter to its base: with use_peft=false no base is left, and a second stage would "
            "lose what the first one taught: leave it out"
        )
    if args.distillation_weight and args.sharded_by:
        raise ValueError(f"{given} cannot go with {args.sharded_by}: use recipes/accelerate/ddp.yaml, or leave it out")


@contextmanager
def as_base(model: PeftModel, scaled_config: PreTrainedConfig) -> Generator[None]:
    """Inside, `model` is the base it was made of: adapter off, RoPE unscaled, no dropout, no gradients."""
    was_training = model.training
    model.eval()
    try:
        rope.apply_scaling(model, cast(Any, model).unscaled_config)
        with model.disable_adapter(), torch.no_grad():
            yield
    finally:
        rope.apply_scaling(model, scaled_config)
        model.train(was_training)


def last_hidden_states(model: Any, decoder: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the LM head of `model`, wrapped or not, reads of `batch` at positions 0..n-1: [batch, tokens, hidden]."""
    found = []
    hook = decoder.register_forward_hook(lambda module, args, output: found.append(output[0]))
    positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    try:
        # Through the whole model, for autocast and DDP; one token's logits cost nothing.
        model(**batch, position_ids=positions.expand_as(batch["input_ids"]), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - cosine in fp32, the mean over each row's tokens (mask [batch, tokens], 0 for padding), then over the rows."""
    distance = 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return ((distance * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def distil(trainer: Any, model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Add the gradient of `distillation_weight` x distance for the first `distillation_length` tokens of each window.

    It has a backward pass of its own, so that its activations are gone before those of the long positions come. It is
    a mean over the windows of a step, as TRL averages a loss that is not one of tokens.

    Returns:
        The distance, without the weight, averaged over the processes.
    """
    length, unwrapped = trainer.args.distillation_length, trainer.accelerator.unwrap_model(model)
    decoder = unwrapped.get_decoder()
    batch = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask")}
    with as_base(unwrapped, trainer.scaled_config):
        teacher = last_hidden_states(unwrapped, decoder, batch)
    # DDP then averages both gradients at once, in the backward pass that follows.
    with trainer.accelerator.no_sync(model):
        distance = cosine_distance(last_hidden_states(model, decoder, batch), teacher, batch["attention_mask"])
        share = trainer.args.distillation_weight / trainer.current_gradient_accumulation_steps
        trainer.accelerator.backward(share * distance)
    return trainer.accelerator.gather(distance.detach()).mean().item()
