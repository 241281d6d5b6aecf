"""Stops a run that has diverged, and refuses one that has changed nothing, before either is saved as finished."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback

from ..rope import RopeError, check_scaling

MOST_SKIPPED = 25
"""Steps in a row that fp16's loss scaling may skip; it halves the scale at each, from 65,536."""


class TrainingError(ValueError):
    """A run that cannot lead to an adapter."""


class CheckScaling(TrainerCallback):
    """Looks at the frequencies once more before the first step: DeepSpeed before 0.19.2 and FSDP 1 round the buffers of
    the model that they wrap."""

    def __init__(self, scaled_config: PreTrainedConfig):
        self.scaled_config = scaled_config

    def on_train_begin(self, args, state, control, **kwargs):
        try:
            check_scaling(kwargs["model"], self.scaled_config)
        except RopeError as error:
            remedy = {"DeepSpeed": "install deepspeed>=0.19.2", "FSDP": "set fsdp_version to 2"}.get(args.sharded_by)
            raise RopeError(f"{args.sharded_by} has rounded RoPE: {remedy}" if remedy else str(error)) from error


class StopIfNotFinite(TrainerCallback):
    """Raises a TrainingError at the step whose gradients are not finite, before they reach the weights."""

    def __init__(self, mixed_precision: str):
        self.allowed = MOST_SKIPPED if mixed_precision == "fp16" else 0
        self.skipped = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not gradients or torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped > self.allowed:
            raise TrainingError(
                f"the gradients of step {state.global_step + 1} are not finite, so training was stopped: lower "
                f"learning_rate ({args.learning_rate:g}), or look at the documents of this step. Earlier checkpoints "
                f"in {args.output_dir} are kept"
            )


def digest(model: nn.Module) -> list[tuple[float, float]]:
    """Two sums over each trained parameter, which tell whether it has changed."""
    trained = (p.detach().float() for p in model.parameters() if p.requires_grad)
    return [(p.sum(dtype=torch.float64).item(), p.abs().sum(dtype=torch.float64).item()) for p in trained]


def refuse_useless(model: nn.Module, before: list[tuple[float, float]], args: Any) -> None:
    """Refuse trained weights that are not finite, or that are what they were before.

    Raises:
        TrainingError: naming which of the two.
    """
    after = digest(model)
    if not torch.isfinite(torch.tensor(after)).all():
        raise TrainingError(
            f"the trained weights are not finite, so they are not saved: lower learning_rate ({args.learning_rate:g})"
        )
    if after == before:
        raise TrainingError(
            f"training has changed no weight, so nothing is saved: raise max_steps or learning_rate "
            f"({args.learning_rate:g}), or lower warmup_steps ({args.warmup_steps:g})"
        )
