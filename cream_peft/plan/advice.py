"""What a recipe asks of a GPU: which GPUs hold it, how long they take, and what to change where one does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..model.kv_cache import KV_CACHES, PREFILL_CHUNK
from ..terminal import table
from .gpus import CARDS, TFLOPS
from .memory import (
    CUDA_CONTEXT_GIB,
    Phases,
    Reading,
    Settings,
    Terms,
    Training,
    Validation,
    attention_widths,
    linear_parameters,
    target_linears,
    trained_parameters,
)

# Assumed, not measured here: the share of TFLOPS that training reaches, as LLaMA-Factory's published QLoRA speed on an
# A100 does (tests/test_plan.py).
UTILISATION = 0.4
# Below so many parameters a GPU mostly waits for Python, and that share means nothing.
SMALLEST_TIMED = 3e8
# A setting of Training -> the key of a recipe, where they differ; one of Reading -> the flag of evaluate.
RECIPE_KEYS = {"checkpoint_offload": "activation_offloading"}
EVALUATE_FLAGS = {"kv_cache": "--kv_cache", "length": "--lengths"}
NOTHING_FITS = "no settings fit, a smaller base may"


def training_flops(config: PreTrainedConfig, training: Training) -> dict[str, float]:
    """Floating-point operations a token of a training step, by part.

    A forward pass takes 2 a parameter, and 4 x layers x width x context for attention (PaLM, arXiv 2204.02311, appendix
    B), of which a causal kernel does half. Every part runs forward, once more in the backward pass where it was not
    kept (the layers with gradient_checkpointing, the head's tiles always), and backward: once to the inputs of frozen
    weights, which have no gradient of their own, twice where weights are trained too, and twice in attention.
    Checkpointing stops when it has what was kept, which is before down_proj where that has no adapter.
    """
    again, linears, targets = training.gradient_checkpointing, 2 * linear_parameters(config), training.target_modules
    down_proj = 2 * config.num_hidden_layers * config.intermediate_size * config.hidden_size
    adapted = "down_proj" in target_linears(config, targets)
    attention = 4 * config.num_hidden_layers * attention_widths(config)[0] * training.context_length / 2
    return {
        "linears": 2 * linears + again * (linears - (0 if adapted else down_proj)),
        "attention": (3 + again) * attention,
        "adapter": (3 + again) * 2 * trained_parameters(config, training.lora_r, targets),
        "head": 3 * 2 * config.vocab_size * config.hidden_size,
    }


def advise(config: PreTrainedConfig, gib: float, settings: Settings) -> dict[str, Any] | None:
    """The smallest change of `settings` that fits into `gib` GiB: {} if none is needed, None if all are not enough."""

    def fits(changes: Mapping[str, Any]) -> bool:
        return replace(settings, **changes).terms(config)["total"] <= gib

    changes: dict[str, Any] = {}
    for saving in [{}, *settings.savings()]:
        changes |= saving
        if fits(changes):
            break
    else:
        return None
    # Those taken before that turn out not to be needed.
    for name in reversed(list(changes)):
        without = {key: value for key, value in changes.items() if key != name}
        if fits(without):
            changes = without
    return changes


def in_words(changes: Mapping[str, Any] | None) -> str:
    """`key: value` of a recipe, for each of the changes. `memory: low` would not change an `optim` that is set."""
    return ", ".join(f"{RECIPE_KEYS.get(key, key)}: {str(value).lower()}" for key, value in (changes or {}).items())


def as_flags(changes: Mapping[str, Any] | None) -> str:
    """The changes of reading a document as flags of `cream-peft evaluate`, whose bases are in 4 bits by default."""
    changes = changes or {}
    flags = " ".join(f"{flag} {changes[key]}" for key, flag in EVALUATE_FLAGS.items() if key in changes)
    return ", ".join(part for part in (flags, "without --no_4bit" if "load_in_4bit" in changes else "") if part)


def shortage(config: PreTrainedConfig, settings: Settings, gib: float | None) -> str:
    """What `settings` need by plan against the `gib` GiB that a process may have (None: not known), CUDA's context
    counted in neither, and what to change; where the plan says that it fits, what saves a tenth."""
    terms = settings.terms(config)
    needed = terms["total"] - terms["cuda_context"]
    largest = max((name for name in terms if name not in ("total", "cuda_context")), key=lambda name: terms[name])
    there = "" if gib is None else f", and the GPU has {gib:.1f} GiB for it"
    allowed = min(0.9 * needed, needed if gib is None else gib) + CUDA_CONTEXT_GIB
    changes = advise(config, allowed, settings)
    remedy = as_flags(changes) if isinstance(settings, Reading) else f"set {in_words(changes)}" if changes else ""
    if gib is not None and needed <= gib:
        less = f"; what takes less: {remedy}" if remedy else ""
        remedy = f"by plan it fits, so something else held memory (see nvidia-smi) or the plan is wrong{less}"
    remedy = remedy or "take a smaller base or a larger GPU, no settings are enough"
    return f"the plan is {needed:.1f} GiB, most for {largest} ({terms[largest]:.1f} GiB){there}: {remedy}"


@dataclass(frozen=True)
class OnGPU:
    """One GPU: whether training fits, its speed where the GPU's is known, the caches with which evaluation fits."""

    card: str
    gib: float
    fits: bool
    tokens_per_second: float | None
    hours: float | None
    evaluates_with: list[str]


@dataclass(frozen=True)
class Evaluation:
    """GiB by term while a document of `length` tokens is read into each cache, and the totals on a 16-bit base."""

    length: int
    chunk: int
    terms: dict[str, Terms]
    sixteen_bit_base: dict[str, float]


@dataclass(frozen=True)
class Work:
    """Tokens and floating-point operations of training."""

    tokens_at_once: int
    tokens_per_step: int
    max_steps: int | None
    """None where the recipe counts in epochs; hours are then those of 1,000 steps."""
    flops_per_token: dict[str, float]
    utilisation: float | None
    """The share of a GPU's peak that is assumed; None for a model too small for that."""


@dataclass(frozen=True)
class Plan:
    """Peak memory in GiB, hours, and advice."""

    terms: Terms
    validation: Terms | None
    evaluation: Evaluation
    work: Work
    cards: list[OnGPU]
    advice: list[str]


def plan(
    config: PreTrainedConfig,
    training: Training,
    validation: Validation | None = None,
    *,
    target_length: int | None = None,
    gradient_accumulation_steps: int = 1,
    max_steps: int | None = None,
    cards: Mapping[str, float] | None = None,
) -> Plan:
    """The plan for `cards` (name -> GiB; None: CARDS).

    Args:
        validation: None where a run computes no loss of held-out documents.
        target_length: tokens to evaluate at; None: the context length.
    """
    reading = Reading(
        length=target_length or training.context_length,
        load_in_4bit=training.load_in_4bit,
        lora_r=training.lora_r,
        target_modules=training.target_modules,
    )
    caches = {cache: replace(reading, kv_cache=cache) for cache in KV_CACHES}
    whole = {cache: replace(one, load_in_4bit=False).terms(config)["total"] for cache, one in caches.items()}
    read = {cache: one.terms(config) for cache, one in caches.items()}
    tokens = training.context_length * training.per_device_train_batch_size
    utilisation = UTILISATION if linear_parameters(config) > SMALLEST_TIMED else None
    flops = training_flops(config, training)
    work = Work(tokens, tokens * gradient_accumulation_steps, max_steps, flops, utilisation)
    terms, held_out = training.terms(config), validation.terms(config) if validation else None
    peak = max(terms["total"], held_out["total"] if held_out else 0)
    rows = [
        OnGPU(card, gib, peak <= gib, *_speed(card, work), [name for name in read if read[name]["total"] <= gib])
        for card, gib in (cards or CARDS).items()
    ]
    advice = list(_advice(config, rows, training, validation, reading))
    return Plan(terms, held_out, Evaluation(reading.length, PREFILL_CHUNK, read, whole), work, rows, advice)


def _speed(card: str, work: Work) -> tuple[float, float] | tuple[None, None]:
    """Tokens a second and hours, where they can be told."""
    speed = TFLOPS.get(card, 0) * 1e12 * (work.utilisation or 0) / sum(work.flops_per_token.values())
    return (speed, (work.max_steps or 1000) * work.tokens_per_step / speed / 3600) if speed else (None, None)


def _advice(
    config: PreTrainedConfig, rows: list[OnGPU], training: Training, validation: Validation | None, reading: Reading
) -> Iterator[str]:
    """A line for what does not fit, for all GPUs of one size."""
    if training.checkpoint_offload and not training.gradient_checkpointing:
        yield "activation_offloading is planned to save nothing without checkpoints: set gradient_checkpointing: true"
    for gib in sorted({row.gib for row in rows}):
        same = [row for row in rows if row.gib == gib]
        names = " or ".join(row.card for row in same)
        if not same[0].fits:
            changes = advise(config, gib, training)
            if changes is not None and validation:
                known = {key: value for key, value in changes.items() if hasattr(validation, key)}
                further = advise(config, gib, replace(validation, **known))
                changes = None if further is None else changes | further
            yield f"training on {names}: {in_words(changes) or NOTHING_FITS}"
        if not same[0].evaluates_with:
            flags = as_flags(advise(config, gib, reading))
            yield f"evaluating on {names}: {f'cream-peft evaluate {flags}' if flags else NOTHING_FITS}"


def _terms_table(columns: dict[str, Terms], phases: Phases) -> str:
    marked = [term for phase in phases for term in phase]
    rows = [
        [term + " *" * (term in marked), *(f"{terms[term]:.2f}" for terms in columns.values())]
        for term in next(iter(columns.values()))
    ]
    larger = " and ".join(" + ".join(phase) for phase in phases)
    return f"{table(['GiB', *columns], rows, indent=2)}\n  * never together: total has the larger of {larger}"


def text_of(planned: Plan) -> str:
    """The plan as `cream-peft plan` prints it."""
    work, evaluation = planned.work, planned.evaluation
    steps, hours = work.max_steps or 1000, any(row.hours for row in planned.cards)
    yes = {True: "fits", False: "does not fit"}
    rows = [
        [row.card, f"{row.gib:.1f}", yes[row.fits], ", ".join(row.evaluates_with) or "none"]
        + [f"{row.hours:.1f}" if row.hours and row.fits else "-"] * hours
        for row in planned.cards
    ]
    columns = ["GPU", "GiB", "training", "evaluation with cache"] + ["hours"] * hours
    parts = [f"training, {work.tokens_at_once:,} tokens at once", ""]
    parts += [_terms_table({"peak": planned.terms}, Training.phases)]
    if planned.validation:
        parts += [f"  held-out loss, total {planned.validation['total']:.2f} GiB"]
    parts += ["", f"evaluation at {evaluation.length:,} tokens, {evaluation.chunk:,} at a time, by KV cache", ""]
    parts += [_terms_table(evaluation.terms, Reading.phases)]
    sixteen = ", ".join(f"{cache} {size:.2f}" for cache, size in evaluation.sixteen_bit_base.items())
    parts += [f"  total on a 16-bit base: {sixteen} GiB", "", table(columns, rows), "", *planned.advice]
    parts += ["Planned from the architecture, not measured. cuda_context is assumed."]
    if hours:
        parts += [
            f"Hours are those of {steps:,} steps of {work.tokens_per_step:,} tokens at an assumed "
            f"{UTILISATION:.0%} of the GPU's dense 16-bit peak, not measured."
        ]
    elif not work.utilisation:
        parts += ["No hours: with so few parameters a GPU mostly waits for Python."]
    return "\n".join(parts)
