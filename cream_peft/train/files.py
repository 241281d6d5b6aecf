"""Documents where they lie: a Hub data set, a folder, a file, a pattern of files."""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load

from ..errors import about
from ..tiny import TINY_ID
from .rows import DataError

logger = logging.getLogger(__name__)

MOST_TEXTS = 1000
"""Rows of a data set whose perplexity is measured."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
CARDS = ("readme", "license", "licence", "citation", "changelog", "contributing")
"""Names of texts that describe a folder, and are no documents of it."""


def load_documents(name: str, split: str = "train", /, **kwargs: Any) -> Dataset | IterableDataset:
    """Load one split of a Hub data set, a folder, a file or a pattern of files.

    Files, wherever they are found: .jsonl and .json (a row an object), .parquet, .txt and .md (a file a document). A
    folder that datasets saved, or that has the configuration of a Hub data set in its README.md, is loaded as such.
    Keyword arguments go to `datasets.load_dataset`.

    Raises:
        DataError: a path that does not exist, an unknown file type, a split that is not there.
    """
    if name == TINY_ID:
        return _embedded_documents(name, kwargs.get("name"))
    with about(f"data set {name}"):
        return _load(name, split, kwargs)


def first_texts(name: str, config: str | None, split: str) -> list[str]:
    """The column text of a data set's first MOST_TEXTS rows.

    Raises:
        DataError: as `load_documents`; no such column.
    """
    settings = {"streaming": True} | ({"name": config} if config else {})
    # Files have no splits here, but for those in a folder.
    split = "train" if Path(name).expanduser().is_file() or glob.has_magic(name) else split
    try:
        with decoding(name, split):
            rows = list(islice(load_documents(name, split, **settings), MOST_TEXTS + 1))
    except DataError as error:
        raise DataError(f"--text: {error}") from error
    if len(rows) > MOST_TEXTS:
        logger.warning("--text %s: its first %s rows are read, and no others", name, f"{MOST_TEXTS:,}")
    texts = [row["text"] for row in rows[:MOST_TEXTS] if "text" in row]
    if not texts:
        raise DataError(f"--text {name} has no column text: give a data set that has one, or text files")
    return texts


def _load(name: str, split: str, kwargs: dict[str, Any]) -> Dataset | IterableDataset:
    path = Path(name).expanduser()
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _split_of(load_from_disk(str(path)), name, split)
    found = data_files(name, split)
    if found is not None:
        return _load_files(found, name, streaming=bool(kwargs.get("streaming")))
    try:
        return load_dataset(str(path) if path.is_dir() else name, split=split, **kwargs)
    except ValueError as error:
        if "split" in str(error):
            raise DataError(f"{name}: {error}") from error
        raise


def data_files(name: str, split: str) -> list[Path] | None:
    """The files that a path or pattern names, of one kind after the other; None where `datasets` is to find them.

    Raises:
        DataError: no such file, or none of a known type.
    """
    path, kinds = Path(name).expanduser(), ", ".join(FILE_FORMATS)
    if path.is_dir():
        if _is_configured(path):
            return None
        paths = _files_of_split(path, name, split)
    elif path.is_file():
        if kind_of(path) is None:
            raise DataError(f"{name}: unknown file type {path.suffix!r}; use one of {kinds}")
        _refuse_other_split(name, split)
        paths = [path]
    elif glob.has_magic(name):
        matched = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        paths = [file for file in matched if kind_of(file)]
        if not paths:
            raise DataError(f"{name} matches no file of {kinds}")
        _refuse_other_split(name, split)
        _tell_unread(name, (file for file in matched if kind_of(file) is None))
    elif kind_of(path) or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"no such file or folder: {name}")
    else:
        return None
    order = list(FILE_FORMATS.values())
    return sorted(paths, key=lambda file: (order.index(str(kind_of(file))), file))


def _files_of_split(folder: Path, name: str, split: str) -> list[Path]:
    """The files of one split of a folder, as datasets tells splits by the names of files and folders."""
    visible = _visible(folder)
    try:
        by_split = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
    except EmptyDatasetError:
        by_split = {}
    found = {str(one): files for one, of_split in by_split.items() if (files := _readable(of_split))}
    if not found and (files := _readable(visible)):
        # A file that is not read, such as test.pdf, has the name of a split.
        found = {"train": files}
    if not found:
        raise DataError(f"{name} holds no data files: {', '.join(FILE_FORMATS)}")
    taken = {file.resolve() for files in found.values() for file in files}
    left = [file for file in visible if file.resolve() not in taken]
    _refuse_guess(folder, name, found, left)
    if split not in found:
        raise DataError(
            f"{name} has no split {split!r}; by the names of its files it has {', '.join(found)}. A pattern such "
            f"as '{folder / '*.*'}' takes all of them"
        )
    # A .json that is no document describes the others.
    _tell_unread(name, (file for file in left if file.suffix.lower() != ".json"))
    return found[split]


def kind_of(path: Path) -> str | None:
    """The kind of a file (json, parquet, text) by its suffix; None if it is not read."""
    return FILE_FORMATS.get(path.suffix.lower())


def _is_card(file: Path) -> bool:
    return file.stem.lower() in CARDS and kind_of(file) in (None, "text")


def _readable(files: Iterable[str | Path]) -> list[Path]:
    return [file for file in map(Path, files) if kind_of(file) and not _is_card(file)]


def _visible(folder: Path) -> list[Path]:
    """The files of a folder at which datasets looks."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in FILES_TO_IGNORE)
    return [file for file in files if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)]


def _tell_unread(name: str, files: Iterable[Path]) -> None:
    kinds = Counter(file.suffix.lower() for file in files if file.suffix and not _is_card(file))
    if kinds:
        count = sum(kinds.values())
        are = "file of another kind ({}) is" if count == 1 else "files of other kinds ({}) are"
        _warn_once(f"{name}: {count:,} {are.format(', '.join(kinds))} not read")


@cache
def _warn_once(line: str) -> None:
    """Once: files are looked for when they are read, and when one of their rows is named."""
    logger.warning(line)


def _refuse_guess(folder: Path, name: str, found: dict[str, list[Path]], left: list[Path]) -> None:
    """Refuse a folder where the name of a file, such as training-manual.txt, makes it a split, and would leave others
    of its kind out."""
    kinds = {file.suffix.lower() for files in found.values() for file in files}
    left = [file for file in left if file.suffix.lower() in kinds and not _is_card(file)]
    if left:
        some = {split: files[0].name for split, files in found.items()}
        told = ", ".join(f"{file} looks like the split {split!r}" for split, file in some.items())
        raise DataError(
            f"{name}: by its name {told}, and {len(left):,} files look like none, such as {left[0].name}: give a "
            f"pattern such as '{folder / '**' / ('*' + left[0].suffix)}' for all of them, or for those that you mean"
        )


def _is_configured(folder: Path) -> bool:
    """Whether the README.md of a folder says, as on the Hub, which files are which split."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        return "configs" in (metadata_load(folder / "README.md") or {})
    return False


def _load_files(paths: list[Path], name: str, streaming: bool) -> Dataset | IterableDataset:
    parts = []
    if not streaming:
        _refuse_other_encodings(paths)
    for kind in dict.fromkeys(FILE_FORMATS.values()):
        of_kind = [str(path) for path in paths if kind_of(path) == kind and path.stat().st_size]
        if not of_kind:
            continue
        options: dict[str, Any] = {"sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else {}
        try:
            parts.append(load_dataset(kind, data_files=of_kind, split="train", streaming=streaming, **options))
        except (ValueError, DatasetGenerationError) as error:
            # Blank lines, or an empty list.
            if "corresponds to no data" in str(error):
                continue
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"{name} cannot be read as {kind}: {reason}") from error
    if not parts:
        raise DataError(f"{name} is empty: it must hold documents, a row each")
    if len(parts) == 1:
        return parts[0]
    shared = set.intersection(*(set(part.column_names or next(iter(part), ())) for part in parts))
    if not shared:
        raise DataError(f"{name} mixes files that have no column in common: give each kind a folder of its own")
    parts = [_plain_texts(part.select_columns(sorted(shared))) for part in parts]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(
            f"{name} mixes files whose columns hold other kinds of values ({' '.join(str(error).split())[:200]}): give "
            "each kind a folder of its own, or write all as .jsonl"
        ) from error


def _refuse_other_encodings(paths: list[Path]) -> None:
    for path in (path for path in paths if kind_of(path) != "parquet"):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    found = f"byte {line[error.start]:#x} in line {number:,}"
                    raise DataError(f"{path} is not UTF-8 ({found}): save it as UTF-8") from error


@contextmanager
def decoding(name: str, split: str) -> Generator[None]:
    """Name the file of a stream that is not UTF-8, which datasets does not. What is not streamed is looked at before.

    Raises:
        DataError: in place of a UnicodeDecodeError.
    """
    try:
        yield
    except UnicodeDecodeError:
        _refuse_other_encodings(data_files(name, split) or [])
        raise


def _plain_texts(part: Any) -> Any:
    """Texts as one type: pandas and polars may write large_string."""
    features = part.features or {}
    large = [name for name, kind in features.items() if getattr(kind, "dtype", "") == "large_string"]
    for name in large:
        part = part.cast_column(name, Value("string"))
    return part


def place_of(row: int, name: str, split: str) -> str:
    """Where a row (from 0) stands: its number from 1, and its file where the data set has several."""
    try:
        paths = data_files(name, split) or []
    except DataError:
        paths = []
    if len(paths) < 2:
        return f"row {row + 1}"
    for path in (path for path in paths if path.stat().st_size):
        count = _rows_in(path)
        if row < count:
            return f"row {row + 1} of {path.name}" if kind_of(path) != "text" else path.name
        row -= count
    return f"row {row + 1}"


def _rows_in(path: Path) -> int:
    if kind_of(path) == "text":
        return 1
    if kind_of(path) == "parquet":
        return pq.read_metadata(path).num_rows
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    return len(load_dataset("json", data_files=str(path), split="train"))


def _refuse_other_split(name: str, split: str) -> None:
    if split != "train":
        raise DataError(
            f"{name} holds one set of documents, no split {split!r}: leave dataset_train_split out, and for evaluation "
            "name a file in dataset_test_split, or set held_out_documents"
        )


def _split_of(loaded: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    if isinstance(loaded, Dataset):
        _refuse_other_split(name, split)
        return loaded
    if split not in loaded:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(str, loaded))}")
    return loaded[split]


def _embedded_documents(name: str, config: str | None) -> Dataset:
    from ..tiny.documents import CONFIGURATIONS, training_rows

    if config is not None and config not in CONFIGURATIONS:
        raise DataError(f"{name} has no configuration {config!r}: set dataset_config to {' or '.join(CONFIGURATIONS)}")
    return Dataset.from_dict(training_rows(2500, 256, seed=1, **CONFIGURATIONS[config or "recall"]))
