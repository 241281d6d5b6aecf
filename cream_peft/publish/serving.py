"""The lines with which llama.cpp and vLLM serve an adapter on its base, the RoPE scaled as in training."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from .. import rope
from ..families import family_of, far_parameters
from ..model.record import Record

LLAMA_CPP = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> the architecture that llama.cpp runs it as."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


def gguf_architecture(folder: Path) -> str:
    """The name that begins the keys of the model's GGUF; of a model that is not in LLAMA_CPP transformers' name."""
    path = folder / "base_config" / "config.json"
    config = json.loads((path if path.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    return LLAMA_CPP.get(config["model_type"], config["model_type"].removesuffix("_text"))


class ServingError(ValueError):
    """An adapter that llama.cpp does not take as a GGUF LoRA, or a file that is none."""


def vllm_command(folder: Path, record: Record, name: str) -> str:
    """The vLLM line that serves the adapter on its base, the RoPE scaled as in training."""
    config = json.loads((folder / "base_config" / "config.json").read_text(encoding="utf-8"))
    overrides = {key: config[key] for key in ("max_position_embeddings", "rope_parameters")}
    scaled = [] if record.is_within_window else [f"--hf-overrides {shlex.quote(json.dumps(overrides))}"]
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # Of the last two it takes no notice, and scales all layers alike.
    unknown = ("modules_to_save", "use_dora", "alpha_pattern", "rank_pattern")
    refused = [field for field in unknown if adapter.get(field)]
    if adapter["peft_type"] != "LORA":
        return f"# vLLM takes LoRA adapters alone, and this one is {adapter['peft_type']}"
    if refused:
        served = f"vllm serve merged --max-model-len {record.target_length}"
        return f"# vLLM takes no adapter with {refused[0]}: merge it, see below\n{served}"
    if family_of(config["model_type"]).whole:
        # vLLM would read the overrides of an image and text base from its text_config, and pass over these.
        return f"# merge it first, see below\nvllm serve merged --max-model-len {record.target_length}"
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter["r"]), adapter["r"])
    return " \\\n  ".join(
        [
            f"vllm serve {shlex.quote(record.base_model)}"
            + (f" --revision {shlex.quote(record.base_revision)}" if record.base_revision else ""),
            *scaled,
            # The adapter's, with the chat template and end token that were trained; unasked, of the base's commit.
            f"--tokenizer {name}" + (" --tokenizer-revision main" if record.base_revision else ""),
            f"--max-model-len {record.target_length}",
            f"--enable-lora --max-lora-rank {rank} --lora-modules {name.split('/')[-1]}={name}",
        ]
    )


def llama_cpp_command(folder: Path, record: Record, lora: str = "adapter.gguf") -> str:
    """The llama-server line for the base's own GGUF and the adapter as the GGUF `lora`, the RoPE scaled as in training.
    A GGUF of a LoRA cannot say how its base is scaled. llama-server stops at the length that the base's says, and
    --override-kv raises that; --yarn-orig-ctx keeps YaRN from taking the raised one for the base's window.

    Args:
        folder: holds adapter_config.json and base_config/.

    Raises:
        ServingError: why llama.cpp cannot serve this adapter without merging it.
    """
    config = rope.load_base_config(folder)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    architecture, far = LLAMA_CPP.get(config.model_type), far_parameters(config)
    scaling = None if record.is_within_window else record.rope_scaling_type
    remedy = "merge it into the base instead (--output)"
    if architecture is None:
        known = ", ".join(LLAMA_CPP)
        raise ServingError(f"a GGUF LoRA is written for {known}, and the base is {config.model_type!r}: {remedy}")
    if record.has_own_scaling:
        raise ServingError(f"llama.cpp has no flags for the RoPE scaling {scaling!r} of your own: {remedy}")
    if adapter["peft_type"] != "LORA":
        raise ServingError(f"llama.cpp takes LoRA adapters alone, and this one is {adapter['peft_type']}")
    for field, kind in (("use_dora", "DoRA"), ("modules_to_save", "modules that were trained whole")):
        if adapter.get(field):
            raise ServingError(f"llama.cpp's LoRA has no {kind} ({field} in adapter_config.json): {remedy}")
    if scaling == "ntk" and far.get("rope_type") == "llama3":
        raise ServingError(
            "llama.cpp reads llama3's factors of the frequencies from the base's GGUF, where they are those of the "
            f"base's own theta, and a flag for another theta would not change them: {remedy}"
        )
    lines = [f"llama-server -m base.gguf --lora {shlex.quote(lora)} -c {record.target_length}"]
    if scaling == "ntk":
        lines.append(f"--rope-freq-base {far['rope_theta']:.10g}")
    elif scaling:
        lines.append(f"--rope-scaling {scaling} --rope-scale {far['factor']:.10g}")
    if scaling == "yarn":
        lines[-1] += f" --yarn-orig-ctx {far['original_max_position_embeddings']}"
    if not record.is_within_window:
        lines.append(f"--override-kv {architecture}.context_length=int:{record.target_length}")
    return " \\\n  ".join(lines)
