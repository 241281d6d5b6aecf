"""CREAM context extension as a PEFT/LoRA recipe package (arXiv 2406.07138)."""

import logging
from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "POSITION_STRATEGIES": "cream_peft.positions",
    "CREAMConfig": "cream_peft.train.config",
    "CREAMDataCollator": "cream_peft.train.collator",
    "CREAMTrainer": "cream_peft.train.trainer",
    "cream": "cream_peft.positions",
    "evaluate": "cream_peft.evals.rows",
    "load_adapter": "cream_peft.model.adapter",
    "pose": "cream_peft.positions",
    "register_scaling": "cream_peft.scalings",
    "register_strategy": "cream_peft.positions",
    "register_task": "cream_peft.evals.tasks",
}
__all__ = sorted(_EXPORTS)

# On a CPU it speaks of a faster kernel when it is imported; what is installed does.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    # Imported on first use: torch, transformers and TRL take seconds, and `cream-peft --help` needs none of them.
    if name in _EXPORTS:
        from .plugins import load_plugins

        load_plugins()
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'cream_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
