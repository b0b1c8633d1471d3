"""Files of media as they are read: what is decoded is what was hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwentune.data.sample import RowError


class DriftError(RowError):
    """A file that does not hold what it held when the data was rendered."""

    def __init__(self, path: str) -> None:
        fix = "Put the file back that was there, or start again with this one: the data is then rendered anew."
        super().__init__(f"{path!r} has changed since the data was rendered", fix)


@contextmanager
def hashed(path: Path) -> Generator[tuple[BinaryIO, str]]:
    """A file at its beginning, and the SHA-256 of all that it holds; RowError where it is written to meanwhile.

    Hashing takes about 0.6 s per GB, of bytes that are read anyhow.
    """
    with open(path, "rb") as file:
        before = _written(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        yield file, digest
        if _written(file) != before:
            raise RowError(f"{str(path)!r} was written while it was read", "Start again when it is whole.")


@contextmanager
def unchanged(path: Path, digest: str) -> Generator[BinaryIO]:
    """A file at its beginning; DriftError where its SHA-256 does not begin with `digest`."""
    with hashed(path) as (file, found):
        if not found.startswith(digest):
            raise DriftError(str(path))
        yield file


def digest_of(digests: Sequence[str]) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a file, or of those of several."""
    return (digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest())[:32]


def state_of(path: str) -> list[int] | None:
    """By what it is told that a file was written: its size, and when; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _written(file: BinaryIO) -> tuple[int, int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns
