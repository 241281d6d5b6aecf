"""A lock on what one process at a time may write."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)


class LockedError(ValueError):
    """Something that another process is writing to."""


@contextmanager
def locked(path: Path, refusal: str) -> Generator[None]:
    """Hold the lock file `path`, which goes at the end, and its folder with it if that was made here and is empty.

    The lock is the system's and ends with its process, however that ends; worker processes do not inherit it.

    Raises:
        LockedError: `refusal`, if another process holds it.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a") as file:
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (EACCES, EAGAIN):
                    raise LockedError(refusal) from error
                logger.warning("%s cannot be locked (%s): start no second run there", path.parent, error.strerror)
            # Whoever held it may have removed it after it was opened here.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise LockedError(refusal)
            try:
                yield
            finally:
                if not fcntl:  # Windows removes no file that is open
                    file.close()
                path.unlink(missing_ok=True)
    finally:
        if is_new:
            with suppress(OSError):
                path.parent.rmdir()
