"""Documents for training: from the Hub or from disk, in the formats the field uses, short ones made to fit."""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ..errors import about
from ..tiny import TINY_ID

logger = logging.getLogger(__name__)

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
ROLES = {"system": "system"} | dict.fromkeys(("human", "user"), "user")
ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")
PROBE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


class DataError(ValueError):
    """A data set that cannot be found, or whose columns or rows cannot be used."""


def load_documents(name: str, split: str = "train", /, **kwargs: Any) -> Dataset | IterableDataset:
    """Load one split of a Hub data set, a folder (saved by datasets, or of data files) or a file.

    Files: .jsonl and .json (a row an object), .parquet, .txt (a file a document). Keyword arguments go to
    `datasets.load_dataset`.

    Raises:
        DataError: a path that does not exist, an unknown file type, a split that is not there.
    """
    if name == TINY_ID:
        return _embedded_documents()
    with about(f"data set {name}"):
        return _load(name, split, kwargs)


def _load(name: str, split: str, kwargs: dict[str, Any]) -> Dataset | IterableDataset:
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _split_of(load_from_disk(str(path)), name, split)
    if path.is_file():
        return _load_file(path, name, split, streaming=bool(kwargs.get("streaming")))
    if not path.is_dir() and (path.suffix in FILE_FORMATS or path.is_absolute() or name.startswith((".", "~"))):
        raise DataError(f"no such file or folder: {name}")
    try:
        return load_dataset(str(path) if path.is_dir() else name, split=split, **kwargs)
    except ValueError as error:
        if "split" in str(error):
            raise DataError(f"{name}: {error}") from error
        raise


def _load_file(path: Path, name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    if path.suffix not in FILE_FORMATS:
        raise DataError(f"{name}: unknown file type {path.suffix!r}; use one of {', '.join(FILE_FORMATS)}")
    _refuse_other_split(name, split)
    if not path.stat().st_size:
        raise DataError(f"{name} is empty: it must hold documents, a row each")
    kind = FILE_FORMATS[path.suffix]
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **options)
    except (ValueError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{name} cannot be read as {path.suffix[1:]}: {reason}") from error


def _refuse_other_split(name: str, split: str) -> None:
    if split != "train":
        raise DataError(
            f"{name} holds one set of documents, no split {split!r}: leave dataset_test_split out and set "
            "held_out_documents"
        )


def _split_of(loaded: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    if isinstance(loaded, Dataset):
        _refuse_other_split(name, split)
        return loaded
    if split not in loaded:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(str, loaded))}")
    return loaded[split]


def _embedded_documents() -> Dataset:
    from ..tiny import documents as recall

    return Dataset.from_dict(recall.training_rows(2500, 256, seed=1))


def prepare_columns(
    dataset: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> Dataset | IterableDataset:
    """Reduce a data set to the columns of its format: input_ids, messages, prompt and completion, or text.

    ShareGPT `conversations` (from, value) become `messages` (role, content). Conversations whose turns do not
    alternate are left out and counted.

    Raises:
        DataError: when no known format is found, or none of the rows can be used.
    """
    columns = list(dataset.column_names or next(iter(dataset), ()))
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"{name} is empty: it must hold documents, a row each")
    _check_types(dataset, name, text_field)
    if "input_ids" in columns:
        return dataset.select_columns([column for column in columns if column in TOKEN_COLUMNS])
    for column in ("messages", "conversations"):
        if column in columns:
            if not tokenizer.chat_template:
                raise DataError(
                    f"{name} holds conversations ({column}) but the tokenizer has no chat template: use a chat model, "
                    "or set chat_template_path to a .jinja file"
                )
            return _alternating(dataset, column, columns, name)
    if "prompt" in columns and "completion" in columns:
        return dataset.select_columns(["prompt", "completion"])
    if text_field in columns:
        return dataset.select_columns([text_field])
    raise DataError(
        f"{name} has the columns {', '.join(columns)}; one of these is needed: input_ids, messages, conversations, "
        f"prompt and completion, or {text_field} (dataset_text_field)"
    )


def _check_types(dataset: Dataset | IterableDataset, name: str, text_field: str) -> None:
    """Refuse text where a list belongs, and the reverse, before a tokenizer stumbles over it."""
    for column, feature in (dataset.features or {}).items():
        is_text = isinstance(feature, Value) and "string" in feature.dtype
        found = feature.dtype if isinstance(feature, Value) else "a list or a mapping"
        if column in ("input_ids", "messages", "conversations") and isinstance(feature, Value):
            raise DataError(f"{name}: the column {column} must hold a list in each row, it holds {found}")
        if column == text_field and "input_ids" not in (dataset.features or {}) and not is_text:
            raise DataError(f"{name}: the column {column} must hold text in each row, it holds {found}")


def to_messages(conversation: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One conversation as alternating messages, or [] when it cannot be one.

    Leading assistant turns and a trailing user turn are cut off; an unknown role, an empty turn or two turns of the
    same side in a row make it unusable.
    """
    messages = []
    for turn in conversation:
        role = ROLES.get(turn.get("role") or turn.get("from") or "")
        content = turn.get("content") or turn.get("value")
        if role is None or not content or not content.strip():
            return []
        messages.append({"role": role, "content": content})
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    expected = ["user", "assistant"] * (len(turns) // 2)
    return system + turns if turns and [turn["role"] for turn in turns] == expected else []


def _alternating(dataset: Any, column: str, columns: list[str], name: str) -> Any:
    converted = dataset.map(lambda row: {"messages": to_messages(row[column])}, remove_columns=columns)
    usable = converted.filter(lambda row: len(row["messages"]) > 0)
    if isinstance(dataset, Dataset):
        if not len(usable):
            raise DataError(f"{name}: none of the {len(dataset)} conversations alternates user and assistant turns")
        if len(usable) < len(dataset):
            logger.warning(
                "%s: %d of %d conversations left out: their turns do not alternate between user and assistant",
                name, len(dataset) - len(usable), len(dataset),
            )  # fmt: skip
    return usable


def training_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation marks that renders exactly what the tokenizer's own does, or None.

    TRL has training templates for many families; Llama-2 and SmolLM2 are not among them. One of ours is used only
    where the two render a probe conversation to the same string, so that the model is trained on the format it is
    served with.
    """
    if not tokenizer.chat_template or isinstance(tokenizer.chat_template, dict):
        return None
    for file in files("cream_peft").joinpath("train/chat_templates").iterdir():
        ours = file.read_text(encoding="utf-8")
        # A template may refuse the probe.
        with suppress(Exception):
            if all(
                tokenizer.apply_chat_template(probe, tokenize=False)
                == tokenizer.apply_chat_template(probe, tokenize=False, chat_template=ours)
                for probe in (PROBE, PROBE[1:])
            ):
                return ours
    return None


def fit_short_documents(dataset: Any, mode: str, context_length: int) -> Any:
    """Apply `short_documents` to tokenised documents (columns input_ids and labels).

    shrink leaves them to the sampler, skip drops those below `context_length` tokens, join concatenates neighbours
    until `context_length` is reached.

    Raises:
        DataError: when skip leaves nothing.
    """
    if mode == "skip":
        kept = dataset.filter(lambda row: len(row["input_ids"]) >= context_length)
        if isinstance(dataset, Dataset):
            if not len(kept):
                raise DataError(
                    f"short_documents=skip leaves none of {len(dataset)} documents: all are shorter than "
                    f"context_length={context_length}. Use join or shrink, or lower context_length"
                )
            logger.info("short_documents=skip: %d of %d documents kept", len(kept), len(dataset))
        return kept
    if mode == "join":
        columns = ["input_ids", "labels"]
        return dataset.select_columns(columns).map(_join, batched=True, fn_kwargs={"context_length": context_length})
    return dataset


def _join(batch: dict[str, list], context_length: int) -> dict[str, list]:
    joined: dict[str, list] = {column: [] for column in batch}
    length = context_length
    for index in range(len(batch["input_ids"])):
        for column, rows in joined.items():
            if length >= context_length:
                rows.append([])
            rows[-1].extend(batch[column][index])
        length = len(joined["input_ids"][-1])
    return joined
