"""Before the first step: do the drawn positions reach the model, and does attention cross the segments?"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch

from .collator import ROW_COLUMN
from .rows import IGNORE_INDEX

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 64
MOST_DRAWS = 64


class PositionError(RuntimeError):
    """The model does not see what the position sampler drew."""


def check_positions(trainer: Any) -> None:
    """Check on this trainer's model, through its own loss, that positions arrive and attention crosses the segments.

    Feeds the start of one training document to the CREAMTrainer's model twice, the second time with other tokens in
    the head segment. The rotary embedding must get the drawn positions, and the last token's hidden state must change.

    Raises:
        PositionError: if either fails.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning("positions are not checked before training: the model is not on one device yet")
        return
    row = next(iter(trainer.train_dataset))
    input_ids = row["input_ids"][:CHECKED_TOKENS]
    for number in range(MOST_DRAWS):
        batch = trainer.data_collator([{"input_ids": input_ids, "labels": input_ids, ROW_COLUMN: number}])
        if "position_ids" not in batch:
            raise PositionError(f"{type(trainer.data_collator).__name__} emits no position_ids: use CREAMDataCollator")
        wanted = batch["position_ids"][0]
        jumps = torch.nonzero(wanted.diff() != 1).flatten()
        # Plain positions, a share of the draws perhaps, would prove nothing.
        if len(jumps):
            break
    head_length = int(jumps[0]) + 1 if len(jumps) else max(1, len(wanted) // 2)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][:, :head_length] += 1
    changed["input_ids"] %= trainer.scaled_config.vocab_size

    arrived, last = _observe(trainer, batch)
    _, last_changed = _observe(trainer, changed)
    if not torch.equal(arrived.flatten()[-len(wanted) :], wanted.to(arrived)):
        raise PositionError(
            "the drawn position_ids do not reach the model's rotary embedding: something between the data "
            "collator and the model replaces them"
        )
    if len(wanted) > head_length and torch.equal(last, last_changed):
        raise PositionError(
            "attention does not cross the segments: the last token does not see the head. Without an "
            "attention_mask transformers takes each jump of the positions for a new document"
        )


def _observe(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [tokens] that the rotary embedding got, and the last token's hidden state, both on the CPU."""
    seen: dict[str, torch.Tensor] = {}

    def positions_hook(module, args, kwargs):
        seen["positions"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def hidden_hook(module, args, output):
        seen["hidden"] = output[0][:, -1]

    decoder = trainer.accelerator.unwrap_model(trainer.model).get_decoder()
    was_training = trainer.model.training
    trainer.model.eval()
    with ExitStack() as stack:
        for module in decoder.modules():
            if "RotaryEmbedding" in type(module).__name__:
                hook = module.register_forward_pre_hook(positions_hook, with_kwargs=True)
                stack.callback(hook.remove)
        stack.callback(decoder.register_forward_hook(hidden_hook).remove)
        stack.enter_context(torch.no_grad())
        # The model's own forward gets it only once transformers trains.
        stack.enter_context(trainer.accelerator.autocast())
        inputs = trainer._prepare_inputs(dict(batch))
        # By which the loss of experts' routers is divided, and which transformers sets once it trains.
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=(inputs["labels"] != IGNORE_INDEX).sum())
    trainer.model.train(was_training)
    trainer._metrics["eval"].clear()
    return seen["positions"].cpu(), seen["hidden"].float().cpu()
