"""What computed a result: versions and machine."""

import importlib.metadata
import os
import platform

import torch

from . import __version__

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub")


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    return {"cream_peft": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def machine() -> str:
    """The device that computes: the GPU's name, or the CPU's kind and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def peak_gib() -> float | None:
    """The most that this process had allocated on the GPU, in GiB; None without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
