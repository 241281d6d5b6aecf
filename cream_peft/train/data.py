"""Documents for training, in the formats the field uses: rows that can be used, templates, short ones made to fit."""

from __future__ import annotations

import logging
import re
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset, Features, IterableDataset, Json, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .files import decoding, kind_of, load_documents, place_of
from .messages import BESIDE, beside_turns, not_seen, pair_of, to_messages
from .recipe import Recipe, RecipeError
from .rows import STREAM_SAMPLE, DataError, keep_usable, without_padding
from .templates import answer_spans, check_template, parts_not_written, template_options, written

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")
SPLITS = ("train", "test", "validation", "eval", "dev", "val")


def load_data(recipe: Recipe, tokenizer: Any, vocab_size: int) -> tuple[Any, Any]:
    """(training documents, evaluation documents or None), with the columns of their format only."""
    data, run, name = recipe.data, recipe.run, recipe.data.dataset_name
    if name is None:
        raise RecipeError("dataset_name is missing: a Hub id, a local folder or a file")
    options = {"streaming": data.dataset_streaming, "name": data.dataset_config, "revision": data.dataset_revision}
    options = {key: value for key, value in options.items() if value}

    def load(key: str, name: str, split: str) -> Any:
        try:
            with decoding(name, split):
                documents = load_documents(name, split, **options)
                if data.max_documents:
                    documents = documents.take(data.max_documents)
                settings: dict[str, Any] = {"vocab_size": vocab_size, "split": split, "eos_token": run.eos_token}
                return prepare_columns(documents, name, tokenizer, run.dataset_text_field, **settings)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error

    documents, test = load("dataset_name", name, data.dataset_train_split), data.dataset_test_split
    if test:
        # A folder of such a name may lie here by chance: ./test is meant for it.
        is_file = kind_of(Path(test)) or (Path(test).exists() and test not in SPLITS)
        key = "dataset_test_split"
        return documents, load(key, test, "train") if is_file else load(key, name, test)
    held_out = data.held_out_documents
    if not held_out:
        return documents, None
    if not isinstance(documents, Dataset):
        return documents.skip(held_out), documents.take(held_out)
    if held_out >= len(documents):
        raise DataError(f"held_out_documents={held_out} leaves nothing of {len(documents)} documents to train on")
    last = len(documents) - held_out
    return documents.select(range(last)), documents.select(range(last, len(documents)))


@cache
def _version() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return Hasher.hash([trl.__version__, transformers.__version__, *(file.read_bytes() for file in files)])


def fingerprinted(dataset: Any) -> Any:
    """The same documents, under a fingerprint that changes with the version: datasets tells a package's functions apart
    by their names alone, and would take from its cache what another version of them made."""
    if isinstance(dataset, Dataset):
        dataset = copy(dataset)
        dataset._fingerprint = Hasher.hash([dataset._fingerprint, _version()])
    return dataset


def prepare_columns(
    dataset: Dataset | IterableDataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    *,
    vocab_size: int | None = None,
    split: str = "train",
    eos_token: str | None = None,
    find_answers: bool = False,
) -> Dataset | IterableDataset:
    """Reduce a data set to the columns of its format, and to the rows that can be trained on.

    The formats: input_ids, messages, prompt and completion, or text. ShareGPT `conversations` (from, value) become
    `messages` (role, content), with a `system` column as their first turn. `vocab_size`, `eos_token`: where they are
    not the tokenizer's. `find_answers`: conversations of which `answer_spans` finds none are left out too.

    Raises:
        DataError: when no known format is found, or most rows cannot be used.
    """
    dataset = fingerprinted(dataset)
    sample = dataset if isinstance(dataset, Dataset) else _sample(dataset)
    columns = sample.column_names
    if not len(sample):
        raise DataError(f"{name} is empty: it must hold documents, a row each")
    _check_types(sample.features, name, text_field)

    differing: list[bool] = []
    unseen: set[str] = set()

    def differs_from(row: dict[str, Any], converted: dict[str, Any]) -> dict[str, Any]:
        """`converted`; whether it says something else than the row is noted once."""
        if not differing and any(row.get(key) != value for key, value in converted.items()):
            differing.append(True)
        return converted

    def changed() -> bool:
        """Whether any row differs, all having been looked at; of a stream more will come."""
        return bool(differing) or not isinstance(dataset, Dataset)

    def keep(column: str, convert: Any = None) -> Any:
        size = vocab_size or len(tokenizer)
        return keep_usable(dataset, sample, name, column, convert, size, lambda row: place_of(row, name, split))

    if "input_ids" in columns:
        dataset = without_padding(dataset, [column for column in columns if column in TOKEN_COLUMNS])
        return keep("input_ids")
    beside = [column for column in BESIDE if column in columns]
    # In other types Arrow gives each mapping the keys of all the others again.
    features = Features(dict.fromkeys(beside, Json()))

    def around(row: dict[str, Any]) -> dict[str, Any]:
        return {column: beside_turns(column, row[column]) for column in beside}

    def look_at(messages: list[dict[str, Any]], others: dict[str, Any], first: int = 0) -> None:
        """Note what the chat template leaves out; what it refuses would stop TRL, which writes all rows."""
        unseen.update(not_seen(messages, others, not_written))
        if find_answers:
            answer_spans(tokenizer, messages, first, **template_options(others))
        else:
            written(tokenizer, messages, **template_options(others))

    conversation = next((column for column in ("messages", "conversations") if column in columns), None)
    if conversation:
        check_template(tokenizer, f"{name} holds conversations ({conversation})")
        not_written = parts_not_written(tokenizer)

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return differs_from(row, {"messages": to_messages(row[conversation], row.get("system")), **around(row)})

        def check(row: dict[str, Any]) -> None:
            found = convert(row)
            look_at(found["messages"], found)

        read = [conversation, *(["system"] if "system" in columns else [])]
        dataset = dataset.select_columns([*read, *beside])
        usable = keep(conversation, check)
        _warn_of_unseen(frozenset(unseen))
        # What is as it should be already, such as what was prepared before, is not written again.
        if not changed():
            return usable.select_columns(["messages", *beside])
        return usable.map(convert, remove_columns=read, features=Features(messages=List(Json()), **features))
    if "prompt" in columns and "completion" in columns:
        is_text = isinstance(sample.features["prompt"], Value)
        if not is_text:
            check_template(tokenizer, f"{name} holds conversations (prompt, completion)")
        not_written = set() if is_text else parts_not_written(tokenizer)

        def pair(row: dict[str, Any]) -> dict[str, Any]:
            prompt, completion = pair_of(row["prompt"], row["completion"])
            return differs_from(row, {"prompt": prompt, "completion": completion, **around(row)})

        def check_pair(row: dict[str, Any]) -> None:
            found = pair(row)
            if not is_text:
                look_at([*found["prompt"], *found["completion"]], found, len(found["prompt"]))

        dataset = dataset.select_columns(["prompt", "completion", *beside])
        usable = keep("prompt", check_pair)
        _warn_of_unseen(frozenset(unseen))
        if not is_text:
            of_both = {"prompt": List(Json()), "completion": List(Json())}
            return usable.map(pair, features=Features(**of_both, **features)) if changed() else usable
        _check_reading(tokenizer, next(iter(usable))["completion"], name, eos_token)
        return usable
    if text_field in columns:
        dataset = dataset.select_columns([text_field])
        usable = keep(text_field)
        _check_reading(tokenizer, next(iter(usable))[text_field], name, eos_token)
        return usable
    raise DataError(
        f"{name} has the columns {', '.join(columns)}; one of these is needed: input_ids, messages, conversations, "
        f"prompt and completion, or {text_field} (dataset_text_field)"
    )


@cache
def _warn_of_unseen(parts: frozenset[str]) -> None:
    """Once: the data are prepared when they are read, and by the trainer."""
    if parts:
        told = ", ".join(sorted(parts))
        logger.warning(
            "the chat template does not write %s, which rows hold: the model will not see it. chat_template_path sets "
            "another template",
            told,
        )


def _sample(stream: IterableDataset) -> Dataset:
    """The first rows of a stream."""
    return Dataset.from_list(list(stream.take(STREAM_SAMPLE)), features=stream.features)


def _check_types(features: Features, name: str, text_field: str) -> None:
    """Refuse text where a list belongs, and the reverse, before a tokenizer stumbles over it."""
    for column, feature in features.items():
        found = feature.dtype if isinstance(feature, Value) else "values of another kind"
        if column in TOKEN_COLUMNS:
            inner = getattr(feature, "feature", None)
            kind = inner.dtype if isinstance(inner, Value) else "lists"
            if inner is None or not kind.startswith(("int", "uint", "bool", "null")):
                found = found if inner is None else f"lists of {kind}"
                raise DataError(
                    f"{name}: the column {column} must hold whole numbers in every row, and {found} were found"
                )
        elif column in ("messages", "conversations") and isinstance(feature, Value) and feature.dtype != "null":
            raise DataError(f"{name}: the column {column} must hold a list in every row, and {found} were found")
        elif column == text_field and "input_ids" not in features and not re.search("string|null", found):
            raise DataError(f"{name}: the column {column} must hold text in every row, and {found} were found")


def _check_reading(tokenizer: PreTrainedTokenizerBase, text: str, name: str, eos_token: str | None) -> None:
    """Refuse text for a tokenizer that reads none, or has no token to end it with."""
    try:
        tokenizer(text[:1000])
    except Exception as error:
        raise DataError(
            f"{name} holds text that the tokenizer cannot read ({error}): give token ids in input_ids"
        ) from error
    if not (tokenizer.eos_token or eos_token):
        raise DataError(
            f"{name} holds text and the tokenizer has no end token to close it with: set eos_token to one of its "
            "tokens, or give token ids in an input_ids column"
        )
