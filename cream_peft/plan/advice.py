"""What a recipe asks of a GPU: which cards hold it, how long they take, and what to change where one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..model.kv_cache import KV_CACHES, PREFILL_CHUNK
from .gpus import CARDS, TFLOPS
from .memory import (
    ATTENTION,
    CUDA_CONTEXT_GIB,
    READING_PHASES,
    TRAINING_PHASES,
    attention_widths,
    estimate,
    estimate_evaluation,
    estimate_validation,
    linear_parameters,
    target_linears,
    trained_parameters,
)

# Assumed, not measured here: the share of TFLOPS that training reaches, as LLaMA-Factory's published QLoRA speed on an
# A100 does (tests/test_plan.py).
UTILISATION = 0.4
# Below so many parameters a GPU mostly waits for Python, and that share means nothing.
SMALLEST_TIMED = 3e8

# A setting of the estimate -> the key of a recipe, where they differ.
RECIPE_KEYS = {"checkpoint_offload": "activation_offloading"}
MEMORY_LOW = {"checkpoint_offload": True, "optim": "paged_adamw_8bit"}
# And -> the flag of `cream-peft evaluate`.
EVALUATE_FLAGS = {"kv_cache": "--kv_cache", "length": "--lengths"}


def training_flops(
    config: PreTrainedConfig,
    *,
    context_length: int,
    lora_r: int = 16,
    target_modules: str | Sequence[str] = ATTENTION,
    gradient_checkpointing: bool = True,
    **_: Any,
) -> dict[str, float]:
    """Floating-point operations a token of a training step, by part.

    A forward pass takes 2 a parameter, and 4 x layers x width x context for attention (PaLM, arXiv 2204.02311, appendix
    B), of which a causal kernel does half. Every part runs forward, once more in the backward pass where it was not
    kept (the layers with gradient_checkpointing, the head's tiles always), and backward: once to the inputs of frozen
    weights, which have no gradient of their own, twice where weights are trained too, and twice in attention.
    Checkpointing stops when it has what was kept, which is before down_proj where that has no adapter.
    """
    again, linears = bool(gradient_checkpointing), 2 * linear_parameters(config)
    down_proj = 2 * config.num_hidden_layers * config.intermediate_size * config.hidden_size
    adapted = "down_proj" in target_linears(config, target_modules)
    attention = 4 * config.num_hidden_layers * attention_widths(config)[0] * context_length / 2
    return {
        "linears": 2 * linears + again * (linears - (0 if adapted else down_proj)),
        "attention": (3 + again) * attention,
        "adapter": (3 + again) * 2 * trained_parameters(config, lora_r, target_modules),
        "head": 3 * 2 * config.vocab_size * config.hidden_size,
    }


def _halved(name: str, tokens: int) -> Iterator[dict[str, Any]]:
    """Ever shorter lengths, down to 1,024 tokens."""
    for halvings in range(1, max(1, (tokens // 1024).bit_length())):
        yield {name: tokens >> halvings}


def _smallest_change(
    total: Callable[[dict[str, Any]], float], gib: float, savings: Iterable[dict[str, Any]]
) -> dict[str, Any] | None:
    """The changes, taken from `savings` in their order, with which `total(changes)` comes down to `gib`, without those
    that it does not need: {} if none is needed, None if all are not enough."""
    changes: dict[str, Any] = {}
    for saving in [{}, *savings]:
        changes |= saving
        if total(changes) <= gib:
            break
    else:
        return None
    for name in reversed(list(changes)):
        without = {key: value for key, value in changes.items() if key != name}
        if total(without) <= gib:
            changes = without
    return changes


def advise(config: PreTrainedConfig, gib: float, **settings: Any) -> dict[str, Any] | None:
    """The change of `estimate`'s settings with which training fits into `gib` GiB: {} if it does, None if none does."""
    # What costs least first.
    savings = [{"gradient_checkpointing": True}, {"per_device_train_batch_size": 1}, {"load_in_4bit": True}]
    savings += [{name: value} for name, value in MEMORY_LOW.items()]
    savings += [*_halved("context_length", settings["context_length"]), {"lora_r": min(8, settings.get("lora_r", 16))}]
    return _smallest_change(lambda changes: estimate(config, **settings | changes)["total"], gib, savings)


def advise_validation(config: PreTrainedConfig, gib: float, **settings: Any) -> dict[str, Any] | None:
    """The same for the loss of held-out documents, with `estimate_validation`'s settings."""
    savings = [{"per_device_eval_batch_size": 1}, *_halved("eval_length", settings["eval_length"])]
    return _smallest_change(lambda changes: estimate_validation(config, **settings | changes)["total"], gib, savings)


def advise_evaluation(config: PreTrainedConfig, gib: float, **settings: Any) -> dict[str, Any] | None:
    """The same for reading a long document, with `estimate_evaluation`'s settings."""
    # Offloading is exact, and slower; quantizing is not.
    savings = [{"load_in_4bit": True}, {"kv_cache": "offloaded"}, *_halved("length", settings["length"])]
    return _smallest_change(lambda changes: estimate_evaluation(config, **settings | changes)["total"], gib, savings)


def in_words(changes: dict[str, Any] | None) -> str:
    """`key: value` of a recipe, for each of the changes. `memory: low` would not change an `optim` that is set."""
    return ", ".join(f"{RECIPE_KEYS.get(key, key)}: {str(value).lower()}" for key, value in (changes or {}).items())


def to_set(changes: dict[str, Any] | None) -> str:
    """What to write into a recipe; nothing where no changes are enough."""
    return f"set {in_words(changes)}" if changes else ""


def as_flags(changes: dict[str, Any] | None) -> str:
    """The changes of reading a document as flags of `cream-peft evaluate`, whose bases are in 4 bits by default."""
    changes = changes or {}
    flags = " ".join(f"{flag} {changes[key]}" for key, flag in EVALUATE_FLAGS.items() if key in changes)
    return ", ".join(part for part in (flags, "without --no_4bit" if "load_in_4bit" in changes else "") if part)


def shortage(terms: dict[str, float], gib: float | None, advice: Callable[[float], str]) -> str:
    """What a plan's `terms` need against the `gib` GiB that a process may have (None: not known), CUDA's context not
    counted in either, and what `advice(GiB)` says to do; it is asked to save a tenth where the plan says it fits."""
    needed = terms["total"] - terms["cuda_context"]
    largest = max((name for name in terms if name not in ("total", "cuda_context")), key=terms.get)
    there = "" if gib is None else f", and the GPU has {gib:.1f} GiB for it"
    remedy = advice(min(0.9 * needed, needed if gib is None else gib) + CUDA_CONTEXT_GIB)
    if gib is not None and needed <= gib:
        less = f"; what takes less: {remedy}" if remedy else ""
        remedy = f"by plan it fits, so something else held memory (see nvidia-smi) or the plan is wrong{less}"
    remedy = remedy or "take a smaller base or a larger GPU, no settings are enough"
    return f"the plan is {needed:.1f} GiB, most for {largest} ({terms[largest]:.1f} GiB){there}: {remedy}"


def plan(
    config: PreTrainedConfig,
    training: dict[str, Any],
    validation: dict[str, Any] | None = None,
    *,
    target_length: int | None = None,
    gradient_accumulation_steps: int = 1,
    max_steps: int | None = None,
    cards: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Peak memory in GiB, hours on `cards` (name -> GiB; None: CARDS), and advice for those that do not fit.

    Args:
        training: settings of `estimate`.
        validation: settings of `estimate_validation`; None where a run computes no loss of held-out documents.
        target_length: tokens to evaluate at; None: the context length.
        max_steps: None where the recipe counts in epochs; hours are then those of 1,000 steps.

    Returns:
        {"terms", "validation": GiB by term or None, "evaluation": {"length", "chunk", "terms": {cache: GiB by term},
        "sixteen_bit_base": {cache: total}}, "work": tokens and FLOPs, "cards": rows, "advice": lines}.
    """
    reading = {key: training[key] for key in ("load_in_4bit", "lora_r", "target_modules") if key in training}
    reading["length"] = target_length or training["context_length"]
    tokens = training["context_length"] * training.get("per_device_train_batch_size", 1)
    flops = training_flops(config, **training)
    planned: dict[str, Any] = {
        "terms": estimate(config, **training),
        "validation": estimate_validation(config, **validation) if validation else None,
        "evaluation": _evaluation(config, reading),
        "work": {
            "tokens_at_once": tokens,
            "tokens_per_step": tokens * gradient_accumulation_steps,
            "max_steps": max_steps,
            "flops_per_token": flops,
            "utilisation": UTILISATION if linear_parameters(config) > SMALLEST_TIMED else None,
        },
    }
    planned["cards"] = [_on_card(card, gib, planned) for card, gib in (cards or CARDS).items()]
    planned["advice"] = list(_advice(config, planned["cards"], training, validation, reading))
    return planned


def _evaluation(config: PreTrainedConfig, reading: dict[str, Any]) -> dict[str, Any]:
    """What `plan` says of reading a document into each cache."""
    whole = reading | {"load_in_4bit": False}
    return {
        "length": reading["length"],
        "chunk": PREFILL_CHUNK,
        "terms": {cache: estimate_evaluation(config, kv_cache=cache, **reading) for cache in KV_CACHES},
        "sixteen_bit_base": {
            cache: estimate_evaluation(config, kv_cache=cache, **whole)["total"] for cache in KV_CACHES
        },
    }


def _on_card(card: str, gib: float, planned: dict[str, Any]) -> dict[str, Any]:
    """Whether training fits, its speed where the card's is known, and the caches with which evaluation fits."""
    peak = max(terms["total"] for terms in (planned["terms"], planned["validation"]) if terms)
    work = planned["work"]
    reached = TFLOPS.get(card, 0) * 1e12 * (work["utilisation"] or 0)
    speed = reached / sum(work["flops_per_token"].values()) or None
    return {
        "card": card,
        "gib": gib,
        "fits": peak <= gib,
        "tokens_per_second": speed,
        "hours": speed and (work["max_steps"] or 1000) * work["tokens_per_step"] / speed / 3600,
        "evaluates_with": [name for name, terms in planned["evaluation"]["terms"].items() if terms["total"] <= gib],
    }


def _advice(
    config: PreTrainedConfig,
    cards: list[dict[str, Any]],
    training: dict[str, Any],
    validation: dict[str, Any] | None,
    reading: dict[str, Any],
) -> Iterator[str]:
    """A line for what does not fit, for all cards of one size."""
    if training.get("checkpoint_offload") and not training.get("gradient_checkpointing", True):
        yield "activation_offloading is planned to save nothing without checkpoints: set gradient_checkpointing: true"
    for gib in sorted({card["gib"] for card in cards}):
        same = [card for card in cards if card["gib"] == gib]
        names = " or ".join(card["card"] for card in same)
        if not same[0]["fits"]:
            changes = advise(config, gib, **training)
            if changes is not None and validation:
                both = validation | {key: value for key, value in changes.items() if key in validation}
                further = advise_validation(config, gib, **both)
                changes = None if further is None else changes | further
            yield f"training on {names}: {in_words(changes) or 'no settings fit, a smaller base may'}"
        if not same[0]["evaluates_with"]:
            changes = advise_evaluation(config, gib, **reading)
            command = f"cream-peft evaluate {as_flags(changes)}" if changes else "no settings fit, a smaller base may"
            yield f"evaluating on {names}: {command}"


def _marked(term: str, phases: Sequence[Sequence[str]]) -> str:
    return f"{term} *" if any(term in phase for phase in phases) else term


def _never_together(phases: Sequence[Sequence[str]]) -> str:
    return f"  * never together: total has the larger of {' and '.join(' + '.join(phase) for phase in phases)}"


def lines_of(planned: dict[str, Any]) -> Iterator[str]:
    """The plan as `cream-peft plan` prints it."""
    work, evaluation = planned["work"], planned["evaluation"]
    yield f"training, {work['tokens_at_once']:,} tokens at once (GiB)"
    for term, size in planned["terms"].items():
        yield f"  {_marked(term, TRAINING_PHASES):<22}{size:8.2f}"
    yield _never_together(TRAINING_PHASES)
    if planned["validation"]:
        yield f"  {'held-out loss, total':<22}{planned['validation']['total']:8.2f}"
    caches = evaluation["terms"]
    yield ""
    yield f"evaluation at {evaluation['length']:,} tokens, {evaluation['chunk']:,} at a time, by cache (GiB)"
    yield " " * 24 + "".join(f"{cache:>11}" for cache in caches)
    for term in next(iter(caches.values())):
        sizes = "".join(f"{terms[term]:11.2f}" for terms in caches.values())
        yield f"  {_marked(term, READING_PHASES):<22}{sizes}"
    yield _never_together(READING_PHASES)
    yield f"  {'on a 16-bit base':<22}" + "".join(f"{size:11.2f}" for size in evaluation["sixteen_bit_base"].values())
    yield f"  offloaded puts {caches['default']['kv_cache']:.2f} GiB into main memory"
    steps, tokens = work["max_steps"] or 1000, work["tokens_per_step"]
    flops = sum(work["flops_per_token"].values()) / 1e9
    yield ""
    yield f"{tokens:,} tokens a step, {steps * tokens:,} in {steps:,} steps, {flops:.1f} GFLOP each"
    yield f"{'card':<20}{'GiB':>6}  {'training':<13}{'tokens/s':>9}{'hours':>8}  evaluation with cache"
    for card in planned["cards"]:
        known = card["fits"] and card["hours"] is not None
        speed = f"{card['tokens_per_second']:9,.0f}{card['hours']:8.1f}" if known else f"{'-':>9}{'-':>8}"
        fits = "fits" if card["fits"] else "does not fit"
        yield f"{card['card']:<20}{card['gib']:6.1f}  {fits:<13}{speed}  {', '.join(card['evaluates_with']) or 'none'}"
    yield from planned["advice"]
    yield "Planned from the architecture, not measured. cuda_context is assumed."
    if work["utilisation"]:
        share = f"{work['utilisation']:.0%} of the card's dense 16-bit peak, not measured"
        yield f"tokens/s and hours are of training steps alone, at an assumed {share}."
