"""The folder of a merged model: made aside, and put in its place once it is whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..locks import locked
from ..model.record import is_merge
from .files import PUBLISHED

logger = logging.getLogger(__name__)


class MergeError(ValueError):
    """An adapter, a base or a folder that cannot be merged as asked."""


def _beside(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}")


def _alone(output: Path) -> AbstractContextManager[None]:
    """While a merge takes its place: another one would delete or rename what this one is writing."""
    return locked(_beside(output, "lock"), f"{output}: another merge is writing there: wait until it has ended")


def refuse_output(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier merge; what a kill took out of its place is put back first.

    Raises:
        MergeError: saying what is there.
        LockedError: while another process merges into it.
    """
    old = _beside(output, "old")
    with _alone(output):
        if old.exists() and not output.exists():
            old.rename(output)
    if output.exists() and not output.is_dir():
        raise MergeError(f"{output} is a file: name a folder for the merged model")
    there = [path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()]
    if there and not is_merge(output):
        raise MergeError(f"{output} is neither empty nor an earlier merge: choose another output_dir (--output)")
    others = sorted(name for name in there if not PUBLISHED.fullmatch(name) or name.startswith("results/"))
    if others:
        raise MergeError(
            f"{output} is an earlier merge, but no merge wrote {others[0]}: move it out, or choose another"
        )


@contextmanager
def in_place_of(output: Path) -> Generator[Path]:
    """Yield a folder beside `output`, which takes its place at the end. A kill leaves what was there before, or between
    the two renames nothing, and then `refuse_output` puts it back.

    Raises:
        LockedError: while another process merges into it.
    """
    scratch, old = _beside(output, "part"), _beside(output, "old")
    with _alone(output):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            shutil.rmtree(old, ignore_errors=True)
            is_replaced = output.exists() and any(output.iterdir())
            if output.exists():
                output.rename(old)
            scratch.rename(output)
            if is_replaced:
                logger.info("the earlier merge in %s was replaced", output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not output.exists():
                old.rename(output)
            shutil.rmtree(scratch, ignore_errors=True)
