"""The folder of what can be made again: rendered data, hub rows, measured times; shared by every run of this user."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwentune.console import say
from qwentune.errors import FULL, DoesNotFitError, Problem, UsageError

PATIENCE_SECONDS = 20.0


def cache_folder() -> Path:
    """Where qwentune keeps what can be made again: `$QWENTUNE_CACHE`, else `~/.cache/qwentune`; it may not be there.

    Raises UsageError where this user has no home.
    """
    try:
        return Path(os.environ.get("QWENTUNE_CACHE") or Path.home() / ".cache" / "qwentune")
    except RuntimeError:
        what = "this user has no home to keep what is rendered in"
        raise UsageError(Problem("HOME", what, "Name a folder with the variable QWENTUNE_CACHE.")) from None


def writable_cache(*names: str) -> Path:
    """A folder of the cache that can be written into, made where it is not there.

    Raises UsageError where this user may not, DoesNotFitError on a full disk.
    """
    folder = cache_folder().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # an owner, a mode, a read-only disk: only trying tells
            return folder
    except OSError as error:
        what = f"the cache folder cannot be written: {error.strerror}"
        problem = Problem(str(folder), what, "Make room, or name another one with the variable QWENTUNE_CACHE.")
        raise (DoesNotFitError if error.errno in FULL else UsageError)(problem) from None


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Keeps other processes from writing the same place of the cache; says so where one does for long."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        say(f"waiting for another process, which is writing {path}; it may be stopped or slow")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
