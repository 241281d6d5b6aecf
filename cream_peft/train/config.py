"""CREAMConfig: the settings of a run. Those of the model and of the data are in arguments.py."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..model.base import default_dtype, expand_cuda_segments
from ..positions import POSITION_STRATEGIES, generator, options_of
from ..publish.licenses import refuse_license
from ..rope import DEFAULT_FACTOR, ROPE_SCALING_TYPES

Kind = TypeVar("Kind", bound=type[Any])
SHORT_DOCUMENTS = ("shrink", "skip", "join")
MEMORY_SETTINGS = ("default", "low")
STRATEGY_KEYS = {"sigma": "cream", "chunks": "pose", "segment_length": "segments"}
"""Options that have a key of their own, and the strategy that they are of."""
SHORT_RUN = 10
"""Steps below which a run has no warm-up unless it is asked for one."""


def one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        names = ("none" if choice is None else str(choice) for choice in allowed)
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(names)}")


def refuse_below(least: int, arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def default_learning_rate(hidden_size: int, use_peft: bool = True) -> float:
    """The rate that QLoRA (arXiv 2305.14314) gives for 7B, 2e-4 at a hidden size of 4,096, carried over to other sizes
    with the exponent measured in "LoRA Without Regret" (Thinking Machines Lab, 2025); all weights train at a tenth."""
    rate = 2e-4 * (4096 / hidden_size) ** 0.78 * (1 if use_peft else 0.1)
    return float(f"{rate:.2g}")


class Lengths(NamedTuple):
    """The lengths of a run in tokens, see CREAMConfig."""

    context_length: int
    target_length: int
    eval_length: int


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def documented(kind: Kind) -> Kind:
    """Put the help texts of the fields that are ours into the docstring, for help()."""
    own = [one for one in kind.__dataclass_fields__.values() if one.name in kind.__annotations__]
    lines = [f"        {one.name}: {one.metadata['help']}" for one in own]
    kind.__doc__ = "\n".join([f"{kind.__doc__}".rstrip(), "", "    Args:", *lines, ""])
    return kind


@documented
@dataclass
class CREAMConfig(SFTConfig):
    """SFTConfig with the fields of context extension. Every other field means what it means in TRL.

    `max_length` alone differs: the trainer sets it to `target_length`, so that TRL hands whole documents to the
    position sampler instead of cutting them at 1,024 tokens; a value of your own is refused.

    Raises:
        ValueError: on an unknown strategy or scaling, lengths that contradict one another, or a TRL option that would
            undo the positions (packing, padding_free, skip_prepare_dataset).
    """

    context_length: int | None = option(
        None, "Tokens fed per training example. None: the base's max_position_embeddings."
    )
    target_length: int | None = option(
        None, "Context length to reach, in tokens. None: 8 times the base's max_position_embeddings."
    )
    position_strategy: str = option("cream", f"How positions are drawn: {', '.join(POSITION_STRATEGIES)}.")
    sigma: float | None = option(
        None,
        "Width of the Gaussian that places the middle segment, in half windows (cream only). A number: the authors' "
        "clamped one, 3 in their paper. inf: a uniform middle. None: 3/8 of the factor, truncated: no pile-up at the "
        "ends.",
    )
    chunks: int | None = option(None, "Chunks with a skip before each but the first (pose only). None: 2.")
    segment_length: int | None = option(None, "Mean tokens of a segment (segments only). None: 32.")
    position_strategy_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of a strategy of your own, see recipes/add-your-own.md. None: none."}
    )
    contiguous_share: float = option(0.0, "Share of the examples that get plain positions, whatever the strategy.")
    contiguous_text: bool = option(
        False, "Feed the first tokens of each document, whatever tokens the strategy would pick."
    )
    target_growth: float = option(
        0.0, "Share of the run over which positions rise from context_length to target_length. 0: the target at once."
    )
    rope_scaling_type: str | None = option("yarn", f"RoPE scaling of the base: none, {', '.join(ROPE_SCALING_TYPES)}.")
    short_documents: str = option(
        "shrink",
        "Documents shorter than context_length: shrink the segments, skip the document, or join those that fit "
        "into it together.",
    )
    eval_length: int | None = option(
        None, "Tokens per evaluation document, at plain positions 0..n-1. None: context_length."
    )
    distillation_weight: float = option(
        0.0, "Weight of the loss that holds the adapter to the untouched base at plain positions. 0: none."
    )
    distillation_length: int | None = option(
        None, "Tokens of each window that this loss reads. None: a quarter of context_length."
    )
    base_model_id: str | None = option(
        None, "Hub id that the adapter names as its base when the base was loaded from a local folder."
    )
    license: str | None = option(
        None, "Licence on the model card, as the Hub names it. None: the one on the base's card."
    )
    memory: str = option(
        "default",
        "low: an 8-bit paged optimizer, layer checkpoints kept in main memory, and a CUDA allocator that "
        "grows its segments. Each of optim and activation_offloading that you set yourself stays as you set it.",
    )
    optim: OptimizerNames | None = field(  # ty: ignore[incompatible-attribute-override] None until __post_init__
        default=None, metadata={"help": f"Optimizer. None: {SFTConfig.optim}, or paged_adamw_8bit with memory=low."}
    )
    activation_offloading: bool | None = option(  # ty: ignore[incompatible-attribute-override] as optim
        None,
        "Keep what the forward pass leaves for the backward pass (with gradient checkpointing each "
        "layer's input) in main memory. None: true with memory=low, else false. Without a GPU it does nothing.",
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Whether DDP looks for parameters without a gradient in every step. An adapter has none."
    )
    learning_rate: float | None = option(  # ty: ignore[incompatible-attribute-override] as optim
        None,
        "Peak learning rate. None: 2e-4 for LoRA on a base of hidden size 4,096, more on smaller ones "
        "(see default_learning_rate); a tenth of that with use_peft: false.",
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Schedule of the rate."})
    warmup_steps: float | None = option(  # ty: ignore[incompatible-attribute-override] as optim
        None, "Steps over which the rate rises, or below 1 their share of the run. None: 0.05, below 10 steps none."
    )
    per_device_train_batch_size: int = option(1, "Windows of context_length tokens in one forward pass, on each GPU.")
    per_device_eval_batch_size: int = option(1, "Held-out documents of eval_length tokens in one forward pass.")
    gradient_accumulation_steps: int = option(
        16, "Forward passes per optimizer step; times the batch size they are the windows of a step."
    )
    logging_nan_inf_filter: bool = option(False, "TRL's; a value that is not finite stops the run here.")
    max_length: int | None = option(None, "Set by the trainer to target_length; not to be set by hand.")
    bf16: bool | None = option(
        None, "bfloat16 mixed precision. None: true on a GPU that has it; an older GPU gets fp16."
    )

    def __post_init__(self):
        if self.rope_scaling_type in ("none", "None"):
            self.rope_scaling_type = None
        one_of("position_strategy", self.position_strategy, POSITION_STRATEGIES)
        one_of("rope_scaling_type", self.rope_scaling_type, (None, *ROPE_SCALING_TYPES))
        one_of("short_documents", self.short_documents, SHORT_DOCUMENTS)
        self._check_strategy()
        one_of("memory", self.memory, MEMORY_SETTINGS)
        sizes = ("train_batch_size", "eval_batch_size")
        refuse_below(1, self, "gradient_accumulation_steps", *(f"per_device_{size}" for size in sizes))
        self._check_rates()
        refuse_license(self.license)
        self._check_lengths()
        self._refuse_packing()
        self._choose_memory()
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and default_dtype() == torch.bfloat16
            self.fp16 = self.fp16 or (on_gpu and not self.bf16)
        super().__post_init__()
        self._check_schedule()
        # Only now: given as JSON on a command line it was text until here.
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError(
                "dataset_kwargs={'skip_prepare_dataset': true} bypasses the row numbers that positions are drawn from; "
                "pass pre-tokenised documents in an input_ids column instead"
            )

    @property
    def evaluates(self) -> bool:
        """Whether the loss of held-out documents is computed during training."""
        return self.eval_strategy != "no" or self.eval_on_start

    @property
    def sharded_by(self) -> str | None:
        """FSDP or DeepSpeed, where one gives each process a part of the model; accelerate sets the environment."""
        asked = {"FSDP": self.fsdp, "DeepSpeed": self.deepspeed}
        return next((n for n, on in asked.items() if on or parse_flag_from_env(f"ACCELERATE_USE_{n.upper()}")), None)

    def strategy_options(self) -> dict[str, Any]:
        """The options of the position strategy that are set."""
        known, kwargs = options_of(self.position_strategy), self.position_strategy_kwargs
        values = {name: getattr(self, name) for name in STRATEGY_KEYS if name in known}
        values |= kwargs if isinstance(kwargs, dict) else {}
        return {name: value for name, value in values.items() if value is not None}

    def _check_strategy(self) -> None:
        known = options_of(self.position_strategy)
        for name, strategy in STRATEGY_KEYS.items():
            if name not in known and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value} goes with position_strategy={strategy}, got {self.position_strategy}")
        if isinstance(self.position_strategy_kwargs, str):
            self.position_strategy_kwargs = json.loads(self.position_strategy_kwargs)
        kwargs: Any = self.position_strategy_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"position_strategy_kwargs={kwargs} must be a mapping")
        for name in kwargs:
            if name not in known or name in STRATEGY_KEYS:
                others = ", ".join(sorted(set(known) - set(STRATEGY_KEYS))) or "none"
                key = f": write {name}: {kwargs[name]}" if name in known else ""
                raise ValueError(
                    f"position_strategy_kwargs has {name}, and position_strategy={self.position_strategy} takes "
                    f"{others}{key}"
                )
        # The strategy itself says which values it takes.
        try:
            POSITION_STRATEGIES[self.position_strategy](1, 1, 1, generator(0, 0, 0), **self.strategy_options())
        except TypeError as error:
            raise ValueError(f"position_strategy_kwargs={self.position_strategy_kwargs}: {error}") from error
        for name in ("contiguous_share", "target_growth"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} must be from 0 to 1")
        if self.target_growth and self.dataloader_num_workers:
            raise ValueError(
                f"target_growth={self.target_growth:g} cannot go with dataloader_num_workers="
                f"{self.dataloader_num_workers}, since workers draw ahead of the steps: set one of them to 0"
            )

    def _check_rates(self) -> None:
        """Refuse what trains nothing, or diverges at once."""
        if self.warmup_steps is None:
            self.warmup_steps = 0 if 0 < self.max_steps < SHORT_RUN else 0.05
        if self.max_steps == 1:
            # Its only step would have a rate of 0.
            self.warmup_steps = 0
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate={self.learning_rate:g} must be above 0 and at most 1")
        if not (self.num_train_epochs > 0 and math.isfinite(self.num_train_epochs)):
            raise ValueError(f"num_train_epochs={self.num_train_epochs:g} must be above 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, or -1 to count epochs")
        for name in ("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "distillation_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value:g} must be a finite number of at least 0")

    def _check_schedule(self) -> None:
        """Build the schedule once; its errors otherwise come after the data and the model are loaded."""
        kwargs = self.lr_scheduler_kwargs
        name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(name, optimizer, 1, 10, kwargs if isinstance(kwargs, dict) else None)
        except (TypeError, ValueError) as error:
            said = re.sub(r"\w*get_\w+\(\) ", "", str(error))
            raise ValueError(f"lr_scheduler_kwargs={kwargs} do not go with lr_scheduler_type={name}: {said}") from error

    def _check_lengths(self) -> None:
        for name in ("context_length", "target_length", "eval_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}={value} must be at least 2 tokens: one is given and one predicted")
            if value is not None and value > (self.target_length or value):
                raise ValueError(
                    f"{name}={value} is longer than target_length={self.target_length}: lower {name}, or raise "
                    "target_length"
                )
        length = self.distillation_length
        if length is not None and not (self.distillation_weight and 0 < length <= (self.context_length or length)):
            raise ValueError(
                f"distillation_length={length} goes with a distillation_weight above 0, and must be at least 1 and at "
                f"most context_length ({self.context_length or 'the window'})"
            )
        if self.max_length is not None and self.max_length != self.target_length:
            raise ValueError(
                f"max_length={self.max_length} is not for you to set: TRL would cut documents there before positions "
                "are drawn. Set context_length (tokens fed) and target_length (tokens reached) instead"
            )

    def _choose_memory(self) -> None:
        """What `memory` decides, where it was left open. Chunked logits and 16-bit embeddings are for every setting."""
        low = self.memory == "low"
        if self.optim is None:
            self.optim = OptimizerNames.PAGED_ADAMW_8BIT if low else OptimizerNames(SFTConfig.optim)
        if self.activation_offloading is None:
            self.activation_offloading = low
        if low and not self.use_cpu:
            expand_cuda_segments()

    def _refuse_packing(self) -> None:
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=true cannot go with context extension: every example needs its own position_ids. "
                    "Use short_documents=join to fill the window"
                )

    def resolve(self, pretrained_window: int) -> Lengths:
        """Fill the lengths left open from the base's pretrained window (tokens). Once they are set, nothing changes.

        Raises:
            ValueError: if lengths contradict one another.
        """
        if self.target_length is None:
            self.target_length = DEFAULT_FACTOR * pretrained_window
        if self.context_length is None:
            self.context_length = min(pretrained_window, self.target_length)
        if self.eval_length is None:
            self.eval_length = self.context_length
        if self.distillation_weight and self.distillation_length is None:
            self.distillation_length = max(1, self.context_length // 4)
        self.max_length = self.target_length
        self._check_lengths()
        return Lengths(self.context_length, self.target_length, self.eval_length)
