"""cream.json: what an adapter or a merged model says of itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..scalings import ROPE_SCALING_TYPES
from .fields import known_fields, shown, too_deep
from .secrets import without_secrets

FORMAT = 2
FILE = "cream.json"
REQUIRED_FILES = ["adapter_config.json", "adapter_model.safetensors", "base_config/config.json", FILE]
BASE_FOLDER = "base_folder.txt"
"""Beside an adapter of a local base: where that lies on this machine. Never published."""
MERGED_FILES = ["config.json", FILE]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tekken.json"]
TOKENIZER_FILES += ["vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"]
NEEDED = ("base_model", "pretrained_window", "target_length", "rope_scaling_type")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub")
LARGEST_FILE = 2**20
"""Bytes of a JSON file that describes an adapter."""


class AdapterError(ValueError):
    """An adapter folder that is incomplete or damaged, or a base that is not the one it was trained on."""


@dataclass(frozen=True)
class Positions:
    """How the positions of the training examples were drawn."""

    strategy: str = "unknown"
    context_length: int | None = None
    """Tokens fed per training example."""
    factor: float | None = None
    """Target length over context length."""
    options: dict[str, Any] = field(default_factory=dict)
    """Those of the strategy, sigma in half windows, and those that go with any."""
    seed: int | None = None
    short_documents: str | None = None
    redrawn: int = 0
    """Draws thrown away because they held no label."""
    unlabelled: int = 0
    """Examples that went out without any label."""


@dataclass(frozen=True)
class Best:
    """With load_best_model_at_end: whose weights these are, chosen by the value of a metric on held-out documents."""

    step: int = 0
    metric: str = "unknown"
    value: float = 0.0
    eval_length: int = 0
    """Tokens of such a document at most, at plain positions."""


@dataclass(frozen=True)
class Record:
    """The content of cream.json, format 2."""

    base_model: str
    """Hub id of the base, or the name of its folder; never a path."""
    pretrained_window: int
    """Tokens that the base was pretrained for."""
    target_length: int
    """Tokens that it was trained for: those that it was extended to, or a part of the window."""
    rope_scaling_type: str | None
    base_is_local: bool = False
    """Whether base_model is the name of a folder, which nobody else has."""
    base_revision: str | None = None
    base_fingerprint: dict[str, list[float]] = field(default_factory=dict)
    """See `fingerprint`."""
    positions: Positions = field(default_factory=Positions)
    distillation_weight: float = 0.0
    """Of the loss that held the adapter to its base, on the first so many tokens of a window; 0: there was none."""
    distillation_length: int | None = None
    load_in_4bit: bool = False
    quantization: dict[str, Any] = field(default_factory=dict)
    """Of a base in 4 bits, see `base.quantization_of`."""
    license: str | None = None
    steps: int = 0
    best: Best | None = None
    first_step: int = 0
    """The step at which this run began, above 0 if it was resumed."""
    seconds: float | None = None
    peak_gib: float | None = None
    machine: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    """position_strategy, rope_scaling_type: where those that are not of cream-peft come from."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The keys that the recipe and the command line set."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What optimizer and schedule were made with, which a run keeps that is resumed."""
    merged: bool = False
    """Whether the folder holds a whole model: base and adapter in one, or with `full` one trained as a whole."""
    stages: list[Any] = field(default_factory=list)
    """Of an adapter that was trained further: what each earlier stage was, oldest first, see `as_stage`."""
    full: bool = False
    """Whether every weight was trained (use_peft: false)."""
    dtype: str | None = None
    """Of a whole model's weights."""
    adapter_sha256: str | None = None
    """Of the adapter's weights; of a merged model, of those that it is made of; of all weights that were trained."""
    run_id: str | None = None
    """The same in all that one training run saved, also when it was resumed."""
    data: str | None = None
    """What tells the training documents from others: their number and a digest, or a name."""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path, name: str, with_weights: bool = True) -> Record:
        """The record in `folder`, once all files of its adapter or merged model are there; `name` is for errors. Those
        of a merged model on the Hub may be on their way: not `with_weights`.

        Raises:
            AdapterError: a file that is missing or damaged, a record that lacks a needed key or is of a later format.
        """
        is_merged = (folder / "config.json").is_file() and not is_adapter(folder)
        if is_merged and not (folder / FILE).is_file():
            raise AdapterError(f"{name} is a base, not an adapter: `cream-peft train` makes an adapter of it")
        for required in MERGED_FILES if is_merged else REQUIRED_FILES:
            if not (folder / required).is_file():
                raise AdapterError(
                    f"{name} has no {required}: it is not a complete adapter of cream-peft. A plain PEFT adapter, as "
                    "save_pretrained writes it, does not say how its base was scaled: use the folder that `cream-peft "
                    "train` left (`cream-peft push` publishes it whole), or train again"
                )
        if not is_merged or with_weights:
            refuse_damaged(folder, name)
        content = read_json(folder, FILE, name)
        missing = [key for key in NEEDED if key not in content]
        if missing:
            raise AdapterError(f"{FILE} of {name} does not say {', '.join(missing)}: get the adapter again")
        try:
            known = known_fields(cls, content)
            if known.get("format", 1) > FORMAT:
                raise AdapterError(f"{FILE} of {name} has format {known['format']}: upgrade cream-peft to read it")
            known["positions"] = Positions(**known_fields(Positions, known.get("positions", {}), "positions."))
            if "best" in known:
                known["best"] = Best(**known_fields(Best, known["best"], "best."))
            known["format"] = FORMAT
            package, scaling = known.get("packages", {}).get("rope_scaling_type"), known.get("rope_scaling_type")
            # A merged model holds the numbers, and is loaded as it is.
            if package and scaling not in ROPE_SCALING_TYPES and not is_merged:
                raise AdapterError(
                    f"{name} was trained with the RoPE scaling {shown(scaling)} of {shown(package)}, which is not "
                    "installed here (or was not imported): install that if you trust it"
                )
            return cls(**known)
        except AdapterError:
            raise
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{FILE} of {name}: {error}: get the adapter again") from None

    def __post_init__(self) -> None:
        for key in ("pretrained_window", "target_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, and must be at least 1 token")
        kind, is_double = (self.quantization.get(key) for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant"))
        if kind not in (None, "nf4", "fp4") or is_double not in (None, True, False):
            raise ValueError(f"quantization is {shown(self.quantization)}, and must be of nf4 or fp4, nested or not")
        is_known = self.rope_scaling_type in (None, *ROPE_SCALING_TYPES)
        if not is_known and not (self.merged and self.has_own_scaling):
            wrong, allowed = shown(self.rope_scaling_type), ", ".join(ROPE_SCALING_TYPES)
            raise ValueError(f"rope_scaling_type is {wrong}, and must be null or one of {allowed}")

    @property
    def has_own_scaling(self) -> bool:
        """Whether its RoPE scaling is of a package of the user's."""
        return "rope_scaling_type" in self.packages

    @property
    def is_within_window(self) -> bool:
        """Whether it was taught something over the window that its base has, and not extended."""
        return self.target_length <= self.pretrained_window

    def as_stage(self) -> dict[str, Any]:
        """What the record of a later stage says of this one."""
        kept = ("adapter_sha256", "steps", "target_length", "rope_scaling_type", "data")
        return {key: getattr(self, key) for key in kept} | {"position_strategy": self.positions.strategy}

    def is_of(self, folder: Path) -> bool:
        """Whether it was written for the weights in `folder`, as far as it says."""
        if self.merged and not self.full:
            return True
        return self.adapter_sha256 in (None, model_sha256(folder) if self.full else adapter_sha256(folder))

    def write(self, folder: Path) -> None:
        """Write it to <folder>/cream.json, without tokens and local paths."""
        write_json(folder / FILE, asdict(replace(self, recipe=without_secrets(self.recipe))))

    def name_base_in(self, folder: Path) -> None:
        """Put the base's public name into <folder>/adapter_config.json, if there is one."""
        file = folder / "adapter_config.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            content |= {"base_model_name_or_path": self.base_model, "revision": self.base_revision}
            write_json(file, dict(sorted(content.items())))


def read_json(folder: Path, file: str, name: str) -> dict[str, Any]:
    """The JSON object in a file that describes the adapter or model `name`.

    Raises:
        AdapterError: a file that is missing, damaged, far too large or deep, or holds something else.
    """
    try:
        if (folder / file).stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes")
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or too_deep(content):
            raise ValueError("it holds no JSON object, or one that is too deep")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} of {name} is missing or damaged ({error}): get it again") from None
    return content


def write_json(file: Path, content: Any) -> None:
    """Write `content` to a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_adapter(repo_or_dir: str | Path) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(repo_or_dir) / "adapter_config.json").is_file()


def is_merge(folder: Path) -> bool:
    """Whether a merge wrote the model in a local folder, and no run."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return record["merged"] is True and not record.get("full")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def adapter_sha256(folder: Path) -> str | None:
    """The digest by which results name the adapter they were measured on."""
    path = folder / "adapter_model.safetensors"
    return _sha256([path]) if path.is_file() else None


def model_sha256(folder: Path) -> str:
    """The same of a whole model, over all of its weight files."""
    return _sha256(sorted(folder.glob("model*.safetensors")))


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda digest=digest: digest)
    return digest.hexdigest()


def refuse_damaged(folder: Path, name: str) -> None:
    """Raise an AdapterError for a file of an adapter or merged model that cannot be read, or is missing a part."""
    index = folder / "model.safetensors.index.json"
    try:
        for file in sorted(path for path in folder.glob("*.json") if path != folder / "trainer_state.json"):
            json.loads(file.read_text(encoding="utf-8"))
        weights = list(folder.glob("*.safetensors"))
        if index.is_file():
            file = index
            weights += [folder / part for part in set(json.loads(index.read_text())["weight_map"].values())]
        for file in weights:
            # The header is held against the file's length.
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise AdapterError(f"{file.name} of {name} is missing or damaged ({error}): get it again") from None


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    return {"cream_peft": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def machine(use_cpu: bool = False) -> str:
    """The device that computes: the GPU's name, or the CPU's kind and number of cores."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def peak_gib() -> float | None:
    """The most that this process had allocated on the GPU, in GiB; None without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
