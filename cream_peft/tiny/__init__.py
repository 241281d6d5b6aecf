"""The embedded default: a tiny Llama that runs on any CPU, the task it was trained on, and how it was made."""

from pathlib import Path

TINY_ID = "cream-peft-tiny"
TINY_LICENSE = "apache-2.0"


def base_folder() -> Path:
    """The folder of the shipped checkpoint: config, weights, tokenizer and `origin.json`."""
    return Path(__file__).parent / "base"
