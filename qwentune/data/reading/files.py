"""Rows of data files, as a stream, each with the place it stands at."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from qwentune.bounded import kind_fault, name_fault
from qwentune.data.reading.faults import Unread
from qwentune.data.reading.hub import fetched, is_hub_dataset, kept_file
from qwentune.data.reading.json_rows import NumberedValue, read_json_rows
from qwentune.data.reading.misnamed import COMPRESSIONS, misnamed
from qwentune.data.reading.tables import read_csv_rows, read_parquet_rows
from qwentune.data.sample import Json, Source
from qwentune.errors import DataError, Problem, nearest
from qwentune.shipped import shipped

Reader = Callable[[io.BufferedReader, str, list[Problem]], Iterator[NumberedValue]]

READERS: dict[str, Reader] = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".parquet": read_parquet_rows,
}

BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: any JSON value, and where it stands."""

    source: Source
    value: Json


@dataclass(slots=True)
class RowCount:
    """How many rows of a file were read, how many of them refused as wrong, and whether its end was reached."""

    read: int = 0
    refused: int = 0
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: its length in bytes, and the SHA-256 of each block.

    A CRC-32 would not do: what gzip only stores ends in its own, so that files with other bytes have the same.
    """

    size: int
    blocks: tuple[bytes, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of all bytes, in hexadecimal."""
        return hashlib.sha256(b"".join(self.blocks)).hexdigest()


def read_rows(
    path: str, problems: list[Problem], *, content: Content | None = None, count: RowCount | None = None
) -> Iterator[Row]:
    """The rows of a file, one at a time; whatever cannot be read goes to `problems`, and reading goes on.

    Takes the endings of `READERS`, each also with one of `COMPRESSIONS`. A missing path under `data_templates/` falls
    back to the shipped file; another that looks like a hub dataset is fetched. Rows are counted into `count`. Raises
    DataError where the file does not hold `content`.
    """
    count = RowCount() if count is None else count
    try:
        file = _local(path)
        if problem := misnamed(path, file):
            raise DataError(problem)
    except DataError as error:
        problems.extend(Unread(one.where, one.what, one.fix) for one in error.problems)
        return
    first = start = len(problems)

    def count_refused() -> None:
        num_refused = sum(not isinstance(problem, Unread) for problem in problems[start:])
        count.read += num_refused
        count.refused += num_refused

    try:
        with ExitStack() as stack:
            stream = _open(file, path, content, stack)
            for number, value in READERS[_ending(file)](stream, path, problems):
                count_refused()
                count.read += 1
                yield Row(Source(path, number), value)
                start = len(problems)  # what others noted meanwhile is no row that the reader refused
    except (OSError, EOFError, zlib.error) as error:  # also what gzip and Arrow raise for broken compressed data
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Unread(path, f"the file cannot be read to its end: {reason}", "Download or write it again."))
    count_refused()
    if not count.read and len(problems) == first:
        problems.append(Unread(path, "the file holds no rows", "Write at least one row."))
    count.is_complete = True


def content_of(path: str) -> Content:
    """What the file of a path holds; DataError where there is no such file."""
    blocks, size = list[bytes](), 0
    file = _local(path)
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                blocks.append(hashlib.sha256(block).digest())
                size += len(block)
    except OSError as error:
        raise DataError(Problem(path, f"the file cannot be read: {error.strerror}")) from None
    return Content(size, tuple(blocks))


def is_at_hand(path: str) -> bool:
    """Whether the file of a path is here, and nothing has to be fetched to read it."""
    return (kept_file(path) if is_hub_dataset(path) else shipped(path)).is_file()


def refuse_missing(paths: Iterable[str]) -> None:
    """Raises DataError with every local path that names no file of rows; nothing is fetched or read."""
    local = (path for path in paths if not is_hub_dataset(path))
    problems = [problem for path in local if (problem := _unreadable(path, shipped(path)))]
    if problems:
        raise DataError(problems)


def _local(path: str) -> Path:
    """The file that holds the rows of a path; DataError where none does."""
    if is_hub_dataset(path):
        return fetched(path)
    file = shipped(path)
    problem = _unreadable(path, file)
    if problem is not None:
        raise DataError(problem)
    return file


def _ending(file: Path) -> str:
    """The ending that names the kind of file, without that of a compression."""
    return (file.with_suffix("") if file.suffix in COMPRESSIONS else file).suffix


class _Proved(io.RawIOBase):
    """A file of which only blocks are given out that hold what they held when its content was taken.

    So what is trained is what is named, whoever writes into the file or replaces it meanwhile.
    """

    def __init__(self, file: BinaryIO, path: str, content: Content) -> None:
        self._file, self._path, self._content = file, path, content
        self._position: int = 0
        self._number, self._block = -1, b""  # the block that was read last

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + (0, self._position, self._content.size)[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        number = self._position // BLOCK_BYTES
        if number != self._number:
            self._number, self._block = number, self._proved(number)
        start = self._position - number * BLOCK_BYTES
        part = self._block[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _proved(self, number: int) -> bytes:
        self._file.seek(number * BLOCK_BYTES)
        block, blocks = self._file.read(BLOCK_BYTES), self._content.blocks
        is_same = hashlib.sha256(block).digest() == blocks[number] if number < len(blocks) else not block
        if not is_same:
            what = "the file was changed while it was read"
            raise DataError(Problem(self._path, what, "Start again once it is written."))
        return block


def _open(file: Path, path: str, content: Content | None, stack: ExitStack) -> io.BufferedReader:
    stream: Any = stack.enter_context(file.open("rb"))
    if content is not None:
        stream = stack.enter_context(io.BufferedReader(_Proved(stream, path, content), BLOCK_BYTES))
    if file.suffix == ".gz":
        return io.BufferedReader(stack.enter_context(gzip.open(stream)))
    if file.suffix == ".zst":
        # Slow to import; unlike zstandard's reader it reports data that ends too early.
        arrow: Any = import_module("pyarrow")
        return stack.enter_context(io.BufferedReader(arrow.input_stream(stream, compression="zstd")))
    return stream


def _unreadable(path: str, file: Path) -> Problem | None:
    """What keeps the path from being read as rows; None where nothing does."""
    if fault := name_fault(path):
        return Problem(path, fault, "Name another file.")
    try:
        fault = kind_fault(file)
    except FileNotFoundError:
        return _missing(path, file)
    except OSError as error:
        return Problem(path, f"the file cannot be read: {error.strerror}")
    if file.is_dir():
        return Problem(path, fault, "Name a file; several files are several entries of data.train.")
    if fault:
        return Problem(path, fault, "Write the rows into a file first.")
    if _ending(file) not in READERS:
        endings = ", ".join(READERS)
        what = f"the ending {_ending(file)!r} names no kind of data file"
        return Problem(path, what, f"Files end in {endings}, each also with {' or '.join(COMPRESSIONS)}.")
    return None


def _missing(path: str, file: Path) -> Problem:
    if not os.access(file.parent, os.R_OK | os.X_OK):
        return Problem(path, f"there is no such file, and no folder {str(file.parent)!r}", "Check the path.")
    known = (entry.name for entry in os.scandir(file.parent) if entry.is_file())
    fix = nearest(file.name, known).strip() or "Paths are relative to the current directory."
    return Problem(path, "there is no such file", fix)
