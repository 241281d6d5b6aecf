"""A trained adapter: found, checked against its base, and loaded with the RoPE it was trained with."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .. import rope
from ..errors import about, explain, missing_folder
from ..tiny import TINY_ID
from .base import load_base, local_snapshot, read_config, resolve_base
from .fields import shown
from .fingerprint import Read, differing, from_files, from_model, weight_files
from .misfit import RIGHT_BASE, read_peft_config, read_scaled_config, refuse_misfit
from .record import BASE_FOLDER, REQUIRED_FILES, TOKENIZER_FILES, AdapterError, Record
from .tokenizer import extended_max_length, load_tokenizer

logger = logging.getLogger(__name__)

ADAPTER_FILES = [*REQUIRED_FILES, "config.json", *TOKENIZER_FILES, "*.jinja"]
CHECKPOINTS = ["last-checkpoint/*", "checkpoint-*/*"]
HUB_OPTIONS = ("token", "cache_dir", "trust_remote_code")


@contextmanager
def _in_one_line(thing: str) -> Generator[None]:
    """Make an AdapterError, without a chain of others, of any error that is not of this package."""
    try:
        with about(thing):
            yield
    except (AdapterError, rope.RopeError):
        raise
    except Exception as error:
        raise AdapterError(explain(error)) from None


def end_token_ids(found: int | list[int] | None, tokenizer: Any) -> list[int]:
    """The ids that end a text: those of a config's eos_token_id, and the tokenizer's, which training may have set."""
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def eos_token_id(found: int | list[int] | None, tokenizer: Any) -> int | list[int] | None:
    """The same as a config says it: one id, several, or none."""
    ids = end_token_ids(found, tokenizer)
    return ids if len(ids) > 1 else ids[0] if ids else None


@dataclass
class Adapter:
    """A trained adapter, opened but not loaded, and the base that it belongs to."""

    folder: Path
    """Its files on this disk."""
    record: Record
    base_name: str
    """Hub id or folder of the base."""
    base_options: dict[str, Any]
    """revision, token, ... to open the base with."""
    base_config: PreTrainedConfig
    """The base's own config, unscaled, as found at base_name."""
    scaled_config: PreTrainedConfig
    """The config of the base that the adapter was trained on, its RoPE scaled."""
    peft_config: PeftConfig
    """adapter_config.json, whose tensors are those in the adapter's file."""

    def refuse_other_weights(self, read: Read) -> None:
        """Refuse a base with other weights than those trained on, such as a chat model in place of its base model.

        Args:
            read: the base's values, see `fingerprint.Read`.

        Raises:
            AdapterError: if its fingerprint differs by more than rounding; the tensor is named.
        """
        other = differing(self.record.base_fingerprint, read)
        if other:
            raise AdapterError(
                f"{self.base_name} has other weights than the base this adapter was trained on "
                f"({self.record.base_model}): its {other} differs. {RIGHT_BASE}"
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's tokenizer, which truncates at the target length.

        Raises:
            AdapterError: if it cannot be loaded, or its chat template does not come to an end.
        """
        trusted = self.base_options["trust_remote_code"]
        with _in_one_line(str(self.folder)):
            tokenizer = load_tokenizer(str(self.folder), trust_remote_code=trusted)
        tokenizer.model_max_length = extended_max_length(tokenizer.model_max_length, self.record.target_length)
        return tokenizer

    def load(
        self, load_in_4bit: bool = True, is_trainable: bool = False, **model_kwargs: Any
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The adapter on its base, and its tokenizer, see `load_adapter`."""
        tokenizer = self.tokenizer()
        model = load_base(
            self.base_name,
            target_length=self.record.target_length,
            rope_scaling_type=self.record.rope_scaling_type,
            load_in_4bit=load_in_4bit,
            quantization=self.record.quantization,
            config=copy.deepcopy(self.base_config),
            **self.base_options,
            **model_kwargs,
        )
        self.refuse_other_weights(from_model(model, self.base_files()))
        config = copy.deepcopy(self.peft_config)
        if is_trainable:
            # When it is saved, PEFT looks there for the size of the vocabulary.
            config.base_model_name_or_path = resolve_base(self.base_name)
        adapted = PeftModel.from_pretrained(model, str(self.folder), is_trainable=is_trainable, config=config)
        # What a trainer that trains it further needs to know.
        adapted.trained_record = self.record  # ty: ignore[invalid-assignment] - no tensor, no module
        adapted.trained_folder = str(self.folder)  # ty: ignore[invalid-assignment]
        generation = model.generation_config
        generation.eos_token_id = eos_token_id(generation.eos_token_id, tokenizer)
        return adapted.train(is_trainable), tokenizer

    def base_files(self) -> dict[str, tuple[Path, str]]:
        """`weight_files` of the base, as far as its files are on this disk and are safetensors."""
        folder = local_snapshot(self.base_name, self.base_options.get("revision"), self.base_options.get("cache_dir"))
        return weight_files(folder) if folder else {}


def adapter_folder(repo_or_dir: str | Path, **hub_kwargs: Any) -> Path:
    """The local folder of an adapter: itself, or the snapshot of a Hub repository.

    Raises:
        AdapterError: if there is none.
    """
    name = str(repo_or_dir)
    if Path(name).is_dir():
        return Path(name)
    if name == TINY_ID:
        raise AdapterError(f"{name} is a base, not an adapter: `cream-peft train` makes an adapter of it")
    missing = missing_folder(name) or ("no such folder, and a Hub id is owner/name" if "/" not in name else None)
    if missing:
        raise AdapterError(f"{name}: {missing}")
    hub_kwargs |= {"allow_patterns": ADAPTER_FILES, "ignore_patterns": CHECKPOINTS}
    with _in_one_line(name):
        return Path(snapshot_download(name, **hub_kwargs))


def _refuse_other_base(found: PreTrainedConfig, trained: PreTrainedConfig, record: Record, name: str) -> None:
    scaled = rope.scaled_config(found, record.target_length, record.rope_scaling_type)
    window, said = rope.pretrained_window(found), trained.max_position_embeddings
    if window == record.pretrained_window and scaled.max_position_embeddings != said:
        raise AdapterError(
            f"cream.json says target_length {record.target_length}, and base_config/config.json beside it "
            f"max_position_embeddings {said}: get the adapter again"
        )
    pairs: list[tuple[str, Any, Any]] = [
        ("max_position_embeddings", window, record.pretrained_window),
        ("rope_parameters", scaled.rope_parameters, trained.rope_parameters),
    ]
    for field, got, wanted in pairs:
        if got != wanted:
            raise AdapterError(
                f"{name} is not the base this adapter was trained on: its {field} is {got}, trained with {wanted}. "
                + RIGHT_BASE
            )


def _find_base(record: Record, folder: Path, name: str) -> str:
    """The base that an adapter names: a Hub id, or the folder that it was trained on, if that is here."""
    if record.base_is_local:
        remembered = folder / BASE_FOLDER
        base = remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else ""
        if base and Path(base).is_dir():
            return base
        gone = f", no longer at {base}" if base else ""
        raise AdapterError(
            f"{name} was trained on a local base, the folder {record.base_model!r}{gone}: say where it lies with "
            "base_model (on a command line --base_model, in a recipe model_name_or_path), or train with base_model_id, "
            "its Hub id"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", record.base_model) or ".." in record.base_model:
        raise AdapterError(
            f"cream.json of {name}: base_model is {shown(record.base_model)}, which is no Hub id: say where the base "
            "is with base_model (on a command line --base_model)"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", record.base_revision or "main") or ".." in (record.base_revision or ""):
        raise AdapterError(f"cream.json of {name}: base_revision is {shown(record.base_revision)}, which is no commit")
    return record.base_model


def open_adapter(
    repo_or_dir: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Adapter:
    """Find an adapter and its base, and make sure that they belong together. Every command opens adapters here. Of the
    base's weights no more than some values are read, where they are on this disk.

    Args:
        repo_or_dir: Hub id or local folder of the adapter.
        base_model: Hub id or folder to take the base from, instead of the one that the adapter names.
        revision: branch, tag or commit of the adapter's repository. The base's is the one trained on.
        trust_remote_code: whether code that the base's repository brings may run.
        hub_kwargs: token, cache_dir.

    Raises:
        AdapterError: when files are missing, damaged or do not fit one another, or when the base differs in a field or
            tensor that matters; it is named.
    """
    adapter = str(repo_or_dir)
    folder = adapter_folder(adapter, revision=revision, **hub_kwargs)
    record = Record.read(folder, adapter)
    if record.merged:
        raise AdapterError(
            f"{adapter} is a {'fully trained' if record.full else 'merged'} model, not an adapter: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    missing = missing_folder(base_model) if base_model else None
    if missing:
        raise AdapterError(f"base_model {base_model}: {missing}")
    name = base_model or _find_base(record, folder, adapter)
    options: dict[str, Any] = hub_kwargs | {"trust_remote_code": trust_remote_code}
    if base_model is None and record.base_revision:
        options["revision"] = record.base_revision
    with _in_one_line(name):
        base_config = read_config(name, **options)
    trained = read_scaled_config(folder, adapter, base_config, name)
    _refuse_other_base(base_config, trained, record, name)
    opened = Adapter(folder, record, name, options, base_config, trained, read_peft_config(folder, adapter))
    refuse_misfit(opened, adapter)
    opened.refuse_other_weights(from_files(opened.base_files()))
    return opened


def warn_of_fewer_bits(record: Record, name: str | Path, load_in_4bit: bool) -> None:
    """Say that what was trained on a base of 16 bits is loaded on one of 4."""
    if load_in_4bit and not record.load_in_4bit:
        logger.warning(
            "%s was trained on a base of 16 bits and is loaded in 4: see load_in_4bit=False, --no_4bit of a command",
            name,
        )


def load_adapter(
    repo_or_dir: str | Path,
    *,
    base_model: str | None = None,
    load_in_4bit: bool = True,
    is_trainable: bool = False,
    revision: str | None = None,
    **model_kwargs: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter on its base with the RoPE it was trained with.

    Args:
        repo_or_dir, base_model, revision: see `open_adapter`.
        load_in_4bit: a base quantized as in training, else to NF4; or one in `dtype`.
        is_trainable: train the adapter further, with a CREAMTrainer; else it is frozen.
        model_kwargs: for `load_base` (dtype, attn_implementation, token, device_map, ...).

    Raises:
        AdapterError: when files are missing, or when the base differs in a field that matters; the field is named.
    """
    hub_kwargs = {key: model_kwargs.pop(key) for key in HUB_OPTIONS if key in model_kwargs}
    adapter = open_adapter(repo_or_dir, base_model=base_model, revision=revision, **hub_kwargs)
    warn_of_fewer_bits(adapter.record, repo_or_dir, load_in_4bit)
    return adapter.load(load_in_4bit, is_trainable, **model_kwargs)
