"""What is counted on the CUDA code path, and what must be found. No torch is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE, MISTRAL = "llama-2-7b/cream-4k-32k-qlora", "mistral-7b-v0.3/cream-32k-128k-qlora"
COUNTED = "counted without one: recipes/llama-2-7b/README.md"
TOLERANCE = 0.04
"""How far a peak may be from plan."""
FEW_LAYERS, BELOW = 2, 0.08
"""With so few layers, how far it may be below: plan adds a third product of the feed-forward to a weight in 16 bits,
which are not there at once. That is 0.08 GiB of a 7B, with two layers or with all."""
HOST_SYNCS = {
    "masking_utils.py _ignore_causal_mask_sdpa": 1,
    "utils.py _fused_forward": 2,
    "sft_trainer.py compute_loss": 5,
}
"""Function that makes Python wait for the GPU in a micro-batch -> how often: a mask that transformers looks at, and
TRL's metrics."""
OPTIMIZER_HOST_SYNCS = {"watch.py on_pre_optimizer_step": 1}
"""The same between two steps: are the gradients finite?"""


def cases() -> dict[str, dict[str, Any]]:
    """Name -> recipe, further arguments, generation of the GPU, and for reading the KV cache.

    Of the recipes those are counted whose header says so.
    """
    paths = [
        path for path in sorted(ROOT.glob("recipes/*/cream-*.yaml")) if COUNTED in path.read_text(encoding="utf-8")
    ]
    recipes = [str(path.relative_to(ROOT / "recipes"))[:-5] for path in paths]
    found: dict[str, dict[str, Any]] = {recipe: {"recipe": recipe} for recipe in recipes}

    def add(name: str, *arguments: str, recipe: str = BASE, **more: str) -> None:
        found[name] = {"recipe": recipe, "arguments": list(arguments)} | more

    thirteen = ("--model_name_or_path", "meta-llama/Llama-2-13b-hf")
    add("7B, memory: low", "--memory", "low")
    add("13B", *thirteen)
    add("13B, memory: low", *thirteen, "--memory", "low")
    add("7B, fp16 on Turing", card="turing")
    add("Mistral-7B, fp16 on Turing", recipe=MISTRAL, card="turing")
    add("7B on Hopper", card="hopper")
    add("7B, 16-bit base", "--load_in_4bit", "false")
    add("7B, all linears", "--lora_target_modules", "all-linear")
    add("7B, dropout", "--lora_dropout", "0.05")
    add("7B, batch 2", "--per_device_train_batch_size", "2")
    add("7B, without checkpoints", "--gradient_checkpointing", "false")
    add("7B, every weight", "--use_peft", "false", "--load_in_4bit", "false")
    for name, recipe in (("7B", BASE), ("Mistral-7B", MISTRAL)):
        for cache, bits in (("default", 16), ("quantized", 4)):
            add(f"{name} reads 32K, {bits}-bit cache", recipe=recipe, cache=cache)
    return found


def kernels(case: dict[str, Any]) -> set[str]:
    """The kernels of SDPA that the case must take, with their dtype: none of them holds the scores of all tokens."""
    if case.get("card") == "turing":
        return {"efficient float16"}
    # After the first chunk of a document there is a mask.
    return {"flash bfloat16", "efficient bfloat16"} if "cache" in case else {"flash bfloat16"}


def problems(case: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What of a case's result is not as it must be, a line each."""
    if "error" in result:
        return [result["error"]]
    found = []
    for what, part in (("", result), ("held-out loss: ", result.get("held_out"))):
        if part is None:
            continue
        if set(part["kernels"]) != kernels(case):
            found.append(f"{what}attention by {part['kernels']}, not by {sorted(kernels(case))}")
        least = 1 - (BELOW if result["layers"] <= FEW_LAYERS else TOLERANCE)
        if not least <= part["peak_gib"] / part["planned_gib"] <= 1 + TOLERANCE:
            found.append(f"{what}peak {part['peak_gib']:.2f} GiB, planned {part['planned_gib']:.2f}")
    for key, known in (("host_syncs", HOST_SYNCS), ("optimizer_host_syncs", OPTIMIZER_HOST_SYNCS)):
        for function, count in result.get(key, {}).items():
            if count > known.get(function, 0):
                found.append(f"{key}: {count} in {function}, {known.get(function, 0)} are known")
    return found


def table_of(whole: dict[str, Any], two_layers: dict[str, Any]) -> list[str]:
    """The lines of a table in Markdown, memory in GiB, of the results by case of whole bases and of two layers of each.
    A case that was not counted has an empty cell."""
    heads = ["case", "GPU", "counted", "planned", "off by", "held-out loss, counted", "planned"]
    heads += ["two layers, counted", "planned", "off by", "SDPA kernel"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, case in cases().items():
        base, two = whole.get(name), two_layers.get(name)
        held_out = base.get("held_out") if base else None
        cells = [name, case.get("card", "ampere"), *_sizes(base), *_sizes(held_out)[:2], *_sizes(two)]
        cells.append(", ".join((base or two or {}).get("kernels", [])))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _sizes(part: dict[str, Any] | None) -> list[str]:
    """Counted and planned GiB, and how far they are apart."""
    if part is None or "error" in part:
        return ["", "", ""]
    peak, planned = part["peak_gib"], part["planned_gib"]
    return [f"{peak:.2f}", f"{planned:.2f}", f"{peak / planned - 1:+.1%}"]
