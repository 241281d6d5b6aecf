"""The folder that a run writes into: what it may replace there, and whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..model.record import FILE, TOKENIZER_FILES, is_merge

ASIDE = ".saving"
REPLACED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors")
REPLACED += ("model-*-of-*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)
"""What an earlier save may have left that the new one has not."""


def is_folder(name: str | None, folder: Path) -> bool:
    """Whether a base or an adapter is that folder, by whatever path."""
    return name is not None and Path(name).is_dir() and Path(name).resolve() == folder.resolve()


def _replaced(folder: Path) -> list[Path]:
    return [path for pattern in REPLACED for path in folder.glob(pattern)]


def refuse_output(folder: Path, base: str | None) -> None:
    """Refuse to save where the base is, or where a model or checkpoints lie that no run wrote: what a run saves takes
    their place.

    Raises:
        ValueError: saying what is there.
    """
    if is_folder(base, folder):
        raise ValueError(f"output_dir={folder} is the base, which would be overwritten: choose another")
    is_a_runs = any(
        path for name in (FILE, ASIDE) for path in (*folder.glob(name), *folder.glob(f"checkpoint-*/{name}"))
    )
    is_a_runs = is_a_runs and not is_merge(folder)
    # A folder that is empty was made by a run that was killed.
    checkpoints = [path for path in folder.glob("checkpoint-*") if any(path.glob("*"))]
    if not is_a_runs and (there := _replaced(folder) + checkpoints):
        raise ValueError(
            f"output_dir={folder} holds {there[0].name}, which no run wrote and a run would replace: choose another"
        )


@contextmanager
def saved_whole(folder: Path, is_writer: bool = True) -> Generator[Path]:
    """Yield a folder beside the files in `folder`; at the end what was written there takes their place.

    A kill leaves the old adapter whole, or no cream.json, which makes a folder complete, but never a mixture.
    """
    if not is_writer:
        yield folder
        return
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    (folder / FILE).unlink(missing_ok=True)
    for path in _replaced(folder):
        path.unlink()
    written = [path for path in aside.rglob("*") if path.is_file()]
    for path in sorted(written, key=lambda path: path.name == FILE):
        target = folder / path.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(aside)
