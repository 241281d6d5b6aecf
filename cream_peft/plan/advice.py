"""What a recipe needs of a GPU: which ones hold it, how long they take, and what to change where one does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..model.kv_cache import kv_caches
from ..terminal import table
from .gpus import GPUS, SHOWN
from .layers import attention_widths, inner_width, linear_parameters, target_linears, used_parameters
from .memory import LM_HEAD_TILE, Phases, Reading, Settings, Terms, Training, Validation
from .parameters import Base, base_of

# Assumed: the shares of a GPU's peak between which training stays, where none was measured on that GPU.
UTILISATION = (0.25, 0.5)
# Below so many parameters a GPU mostly waits for Python, and that share means nothing.
SMALLEST_TIMED = 3e8
NOTHING_FITS = "no settings fit, a smaller base may"
EXPLAINED = {
    "adapter": "LoRA, in fp32",
    "optimizer": "state of the trained parameters",
    "weight_copies": "fp32 weights in 16 bits, as autocast computes with them",
    "checkpoints": "what the forward pass leaves for the backward pass",
    "recomputation": "one layer, run again in the backward pass",
    "kv_cache": "keys and values of the document",
    "attention": "one layer adds to its cache and attends to it",
    "activations": "one linear layer with its adapter",
    "logits": f"LM head, in tiles of {LM_HEAD_TILE[0]:,} tokens by {LM_HEAD_TILE[1]:,} words at most",
    "quantization": "the largest 4-bit weight, in 16 bits while it is used",
    "cuda_context": "assumed: CUDA, cuBLAS, fragmentation",
}
"""Term of an estimate -> what it is, where its name does not say it."""


def training_flops(config: PreTrainedConfig, training: Training) -> dict[str, float]:
    """Floating-point operations a token of a training step, by part.

    A forward pass takes 2 a parameter, and 4 x layers x width x context for attention (PaLM, arXiv 2204.02311, appendix
    B), of which a causal kernel does half. Every part runs forward, once more in the backward pass where it was not
    kept (the layers with gradient_checkpointing, the head's tiles always), and backward: once to the inputs of frozen
    weights, which have no gradient of their own, twice where weights are trained too, and twice in attention.
    Checkpointing stops when it has what was kept, which is before down_proj where that has no adapter.
    Self-distillation trains on the first part of each window again, without the head, after a forward pass of the base.
    """
    again, linears = int(training.gradient_checkpointing), 2 * used_parameters(config)
    down_proj = 2 * config.num_hidden_layers * inner_width(config) * config.hidden_size
    adapted = "down_proj" in target_linears(config, training.target_modules)
    attention = _attention_flops(config, training.context_length)
    if not training.use_peft:
        # Backward to the inputs and to the weights.
        passes = {"linears": (3 + again) * linears, "attention": (3 + again) * attention}
        return passes | {"adapter": 0, "head": 4 * 2 * config.vocab_size * config.hidden_size}
    flops = {
        "linears": 2 * linears + again * (linears - (0 if adapted else down_proj)),
        "attention": (3 + again) * attention,
        "adapter": (3 + again) * 2 * training.trained_parameters(config),
        "head": 3 * 2 * config.vocab_size * config.hidden_size,
    }
    if training.distillation_length:
        share = training.distillation_length / training.context_length
        # Attention's part of a token grows with the tokens before it.
        flops["distillation"] = share * (
            flops["linears"] + flops["adapter"] + linears + share * (flops["attention"] + attention)
        )
    return flops


def held_out_flops(config: PreTrainedConfig, length: int) -> float:
    """Floating-point operations a token of the loss of held-out documents of `length` tokens: a forward pass."""
    head = 2 * config.vocab_size * config.hidden_size
    return 2 * used_parameters(config) + _attention_flops(config, length) + head


def _attention_flops(config: PreTrainedConfig, length: int) -> float:
    return 4 * config.num_hidden_layers * attention_widths(config)[0] * length / 2


def advise(config: PreTrainedConfig, gib: float, settings: Settings) -> dict[str, Any] | None:
    """The changes, in the order of `settings.savings(config)`, with which they fit into `gib` GiB, without those
    that are not needed: {} if none is needed, None if all are not enough."""

    def fits(changes: Mapping[str, Any]) -> bool:
        return replace(settings, **changes).terms(config)["total"] <= gib

    changes: dict[str, Any] = {}
    for saving in [{}, *settings.savings(config)]:
        changes |= saving
        if fits(changes):
            break
    else:
        return None
    for name in reversed(list(changes)):
        without = {key: value for key, value in changes.items() if key != name}
        if fits(without):
            changes = without
    return changes


def in_words(changes: Mapping[str, Any] | None) -> str:
    """The changes as `key: value` of a recipe. `memory: low` would not change an `optim` that is set."""
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in (changes or {}).items())


def as_flags(changes: Mapping[str, Any] | None) -> str:
    """The changes of reading a document as flags of `cream-peft evaluate`, whose bases are in 4 bits by default."""
    names = {"kv_cache": "--kv_cache", "length": "--lengths"}
    flags = " ".join(f"{names[key]} {value}" for key, value in (changes or {}).items() if key in names)
    return ", ".join(part for part in (flags, "without --no_4bit" if "load_in_4bit" in (changes or {}) else "") if part)


def out_of_memory_note(config: PreTrainedConfig, settings: Settings, gib: float | None) -> str:
    """What the settings need against the `gib` GiB that this process may have (None: not known), CUDA's context not
    counted in either, and what to change: where the plan says it fits, so that a tenth is saved."""
    terms = settings.terms(config)
    context = terms.pop("cuda_context")
    needed = terms.pop("total") - context
    largest = max(terms, key=lambda name: terms[name])
    there = "" if gib is None else f", and the GPU has {gib:.1f} GiB for it"
    changes = advise(config, min(0.9 * needed, needed if gib is None else gib) + context, settings)
    remedy = as_flags(changes) if isinstance(settings, Reading) else changes and f"set {in_words(changes)}"
    if gib is not None and needed <= gib:
        less = f"; what takes less: {remedy}" if remedy else ""
        remedy = f"by plan it fits, so something else held memory (see nvidia-smi) or the plan is wrong{less}"
    remedy = remedy or "take a smaller base or a larger GPU, no settings are enough"
    return f"the plan is {needed:.1f} GiB, most for {largest} ({terms[largest]:.1f} GiB){there}: {remedy}"


@dataclass(frozen=True)
class Evaluation:
    """Reading a document into each KV cache, `chunk` tokens at a time: GiB by term, and in all on a 16-bit base."""

    length: int
    chunk: int
    terms: dict[str, Terms]
    sixteen_bit_base: dict[str, float]


@dataclass(frozen=True)
class Work:
    """Tokens and FLOPs of training; the shares of a GPU's peak that are assumed, None where the base is too small."""

    tokens_at_once: int
    tokens_per_step: int
    max_steps: int | None
    flops_per_token: dict[str, float]
    utilisation: tuple[float, float] | None


@dataclass(frozen=True)
class Fit:
    """Whether training fits a GPU, its least and greatest speed and hours (the same where its speed was measured, None
    where nothing is known), and the caches with which evaluation fits."""

    card: str
    gib: float
    fits: bool
    tokens_per_second: tuple[float, float] | None
    hours: tuple[float, float] | None
    evaluates_with: list[str]


@dataclass(frozen=True)
class Plan:
    """What `cream-peft plan --json` writes: the base, GiB of a training step, of the held-out loss and its tokens at
    once (None: none is computed), evaluation, the GPUs under the name of today's files, and what to change."""

    base: Base
    terms: Terms
    validation: Terms | None
    validation_tokens: int | None
    evaluation: Evaluation
    work: Work
    cards: list[Fit]
    advice: list[str]


def plan_gpus(
    config: PreTrainedConfig,
    training: Training,
    validation: Validation | None = None,
    target_length: int | None = None,
    gpus: Mapping[str, float] | None = None,
) -> Plan:
    """The plan for `gpus` (name -> GiB; None: SHOWN), and for evaluation at `target_length` tokens (None: the context
    length). validation is None where a run computes no loss of held-out documents."""
    loading = {name: getattr(training, name) for name in ("load_in_4bit", "lora_r", "target_modules")}
    reading = Reading(length=target_length or training.context_length, **loading)
    caches = {cache: replace(reading, kv_cache=cache) for cache in kv_caches(config)}
    whole = {name: replace(cache, load_in_4bit=False).terms(config)["total"] for name, cache in caches.items()}
    read = {name: cache.terms(config) for name, cache in caches.items()}
    flops, tokens = training_flops(config, training), training.context_length * training.per_device_train_batch_size
    shares = UTILISATION if linear_parameters(config) > SMALLEST_TIMED else None
    work = Work(tokens, tokens * training.gradient_accumulation_steps, training.max_steps, flops, shares)
    terms, held_out = training.terms(config), validation.terms(config) if validation else None
    at_once = validation.eval_length * validation.per_device_eval_batch_size if validation else None

    def fit(name: str, gib: float) -> Fit:
        peak = max(each["total"] for each in (terms, held_out) if each)
        speed = hours = None
        if shares and name in GPUS:
            slow, fast = (GPUS[name].share or share for share in shares)
            fastest = GPUS[name].tflops * 1e12 / sum(flops.values())
            speed = (slow * fastest, fast * fastest)
            seconds = (work.max_steps or 1000) * work.tokens_per_step / fastest
            hours = (seconds / fast / 3600, seconds / slow / 3600)
        return Fit(name, gib, peak <= gib, speed, hours, [name for name in read if read[name]["total"] <= gib])

    fits = [fit(name, gib) for name, gib in (gpus or {name: GPUS[name].gib for name in SHOWN}).items()]
    advice = list(_advice(config, fits, training, validation, reading))
    return Plan(
        base_of(config, training),
        terms,
        held_out,
        at_once,
        Evaluation(reading.length, reading.chunk_length, read, whole),
        work,
        fits,
        advice,
    )


def _advice(
    config: PreTrainedConfig, fits: list[Fit], training: Training, validation: Validation | None, reading: Reading
) -> Iterator[str]:
    """A line for what does not fit, for all GPUs that one remedy is for."""
    if training.activation_offloading and not training.gradient_checkpointing:
        yield "activation_offloading is planned to save nothing without checkpoints: set gradient_checkpointing: true"
    told: dict[str, dict[str, list[str]]] = {"training": {}, "evaluating": {}}
    for gib in sorted({fit.gib for fit in fits}):
        same = [fit for fit in fits if fit.gib == gib]
        names = [fit.card for fit in same]
        if not same[0].fits:
            changes = advise(config, gib, training)
            if changes is not None and validation:
                shared = {key: value for key, value in changes.items() if hasattr(validation, key)}
                further = advise(config, gib, replace(validation, **shared))
                changes = None if further is None else changes | further
            told["training"].setdefault(in_words(changes) or NOTHING_FITS, []).extend(names)
        if not same[0].evaluates_with:
            told["evaluating"].setdefault(as_flags(advise(config, gib, reading)) or NOTHING_FITS, []).extend(names)
    for what, remedies in told.items():
        for remedy, names in remedies.items():
            yield f"{what} on {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}: {remedy}"


def _terms_table(columns: Mapping[str, Terms], phases: Phases, *more: Sequence[str]) -> str:
    """A row a term and a column an estimate, then the rows of `more`."""
    marked = {term for phase in phases for term in phase}
    explained = EXPLAINED | {
        "total": f"of those with * the larger of {' and '.join(' + '.join(phase) for phase in phases)}"
    }
    rows = [
        (term + " *" * (term in marked), *(f"{terms[term]:.2f}" for terms in columns.values()), explained.get(term, ""))
        for term in next(iter(columns.values()))
        if any(terms[term] for terms in columns.values())
    ]
    return table(["GiB", *columns, ""], [*rows, *more], indent=2)


def _hours(fit: Fit) -> str:
    if not fit.hours or not fit.fits:
        return "-"
    least, most = fit.hours
    if GPUS[fit.card].share:
        return f"{least:.1f} (at a published {GPUS[fit.card].share:.0%})"
    return f"{least:.1f} to {most:.1f}"


def text_of(plan: Plan) -> str:
    """The plan as `cream-peft plan` prints it."""
    work, evaluation, steps = plan.work, plan.evaluation, plan.work.max_steps or 1000
    held_out = []
    if plan.validation:
        said = f"total, {plan.validation_tokens:,} tokens at once"
        held_out = [("held-out loss", f"{plan.validation['total']:.2f}", said)]
    whole = ("16-bit base", *(f"{size:.2f}" for size in evaluation.sixteen_bit_base.values()), "total, with --no_4bit")
    rows = [
        (
            fit.card,
            f"{fit.gib:.1f}",
            "fits" if fit.fits else "does not fit",
            ", ".join(fit.evaluates_with) or "none",
            _hours(fit),
        )
        for fit in plan.cards
    ]
    timed = (
        f"hours: {work.tokens_per_step:,} tokens a step, {steps * work.tokens_per_step:,} in {steps:,} steps, assuming "
        f"{UTILISATION[0]:.0%} to {UTILISATION[1]:.0%} of the GPU's dense 16-bit peak, or the share published for it"
    )
    timed += "; the held-out loss adds to it, train says how much" if plan.validation else ""
    if not work.utilisation:
        timed = f"no hours: below {SMALLEST_TIMED / 1e9:.1f} billion parameters a GPU mostly waits for Python"
    elif not any(fit.hours for fit in plan.cards):
        timed = "no hours: a GPU given by its memory has no known speed"
    return "\n".join(
        [
            f"{plan.base.line()}\n",
            table(["GPU", "GiB", "training", "evaluation with cache", "hours"], rows),
            f"{timed}.",
            "Planned from the architecture, not measured.",
            *plan.advice,
            f"\ntraining, {work.tokens_at_once:,} tokens at once",
            _terms_table({"peak": plan.terms}, Training.phases, *held_out),
            f"\nevaluation at {evaluation.length:,} tokens, {evaluation.chunk:,} at a time, by KV cache "
            "(default: 16 bits, quantized: 4)",
            _terms_table(evaluation.terms, Reading.phases, whole),
        ]
    )
