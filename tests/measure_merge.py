"""Measures the memory and the time of merging an adapter: merge_adapter against PEFT's merge_and_unload.

python tests/measure_merge.py --folder SCRATCH [--layers 24] [--hidden_size 2048] [--max_shard_size 1GB]

Writes a random Llama and a random adapter on all of its linear layers to SCRATCH, merges them once each way in a
process of its own, prints what that took as JSON and removes what it wrote. Bytes are GiB (2**30).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cream_peft import rope
from cream_peft.model.record import machine, versions
from cream_peft.tiny import base_folder

GIB = 2**30
WINDOW, TARGET = 4096, 32768


def make_base(folder: Path, config: LlamaConfig, dtype: torch.dtype, max_shard_size: str = "2GB", **lora) -> int:
    """Write a random Llama of `config` to folder/base and an adapter of it to folder/adapter; the base's bytes.

    `lora` are settings of LoraConfig. One file is in memory at a time.
    """
    (folder / "base").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    like = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: (torch.randn(like[name].shape, generator=generator) * 0.02).to(dtype) for name in names}
        save_file(tensors, folder / "base" / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder / "base")

    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    adapted = get_peft_model(model, LoraConfig(**settings), low_cpu_mem_usage=True)
    adapted.peft_config["default"].save_pretrained(folder / "adapter")
    like = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in like.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    rope.save_base_config(rope.scaled_config(config, TARGET, "yarn"), folder / "adapter")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(folder / "adapter")
    window = config.max_position_embeddings
    note = {"base_model": "base", "pretrained_window": window, "target_length": TARGET, "rope_scaling_type": "yarn"}
    note |= {"positions": {"strategy": "cream", "context_length": window}, "recipe": {}, "steps": 0, "seed": 0}
    note |= {"machine": machine(), "versions": versions()}
    (folder / "adapter" / "cream.json").write_text(json.dumps(note))
    return split.metadata["total_size"]


def memory(field: str) -> float:
    """VmHWM (the most resident so far), VmRSS (resident), RssAnon (thereof not mapped files) of this process, GiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / GIB


def merge_ours(folder: Path, max_shard_size: str) -> None:
    from cream_peft.publish.merge import merge_adapter

    merge_adapter(folder / "adapter", folder / "ours", base_model=str(folder / "base"), max_shard_size=max_shard_size)


def merge_plain(folder: Path, max_shard_size: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder / "adapter", subfolder="base_config")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", config=config, dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "plain", max_shard_size=max_shard_size)


MERGES = {"merge_adapter": merge_ours, "merge_and_unload": merge_plain}


def measure_here(name: str, folder: Path, max_shard_size: str) -> dict[str, float]:
    """Merge in this process; what it took, in seconds and GiB."""
    import cream_peft.publish.merge  # noqa: F401  (its imports belong to the start, not to the merge)

    anonymous, done = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            anonymous.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        MERGES[name](folder, max_shard_size)
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    taken = {"seconds": seconds, "start_gib": before, "peak_gib": memory("VmHWM")}
    taken |= {"start_anonymous_gib": anonymous[0], "peak_anonymous_gib": max(anonymous)}
    return {key: round(value, 3) for key, value in taken.items()}


def measure(name: str, folder: Path, max_shard_size: str) -> dict[str, float]:
    """`measure_here` in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--folder", folder, "--max_shard_size", max_shard_size]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder on a disk with room for 3 models")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max_shard_size", default="1GB")
    parser.add_argument("--child", choices=list(MERGES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure_here(given.child, given.folder, given.max_shard_size)))
        return
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=given.hidden_size,
        intermediate_size=given.hidden_size * 11 // 4,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden_size // 128,
        max_position_embeddings=WINDOW,
    )
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        size = make_base(Path(scratch), config, getattr(torch, given.dtype))
        results = {name: measure(name, Path(scratch), given.max_shard_size) for name in MERGES}
    settings = {key: str(value) for key, value in vars(given).items() if key not in ("child", "folder")}
    header = {"machine": machine(), "versions": versions(), "settings": settings, "model_gib": round(size / GIB, 3)}
    print(json.dumps(header | results, indent=1))


if __name__ == "__main__":
    main()
