"""Rows of data files, as a stream, each with the place it stands at."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qwentune.bounded import kind_fault, name_fault
from qwentune.data.hub import fetched, is_hub_dataset, kept_file
from qwentune.data.json_rows import NumberedValue, read_json_rows
from qwentune.data.misnamed import COMPRESSIONS, misnamed
from qwentune.data.sample import Json, Source
from qwentune.data.tables import read_csv_rows, read_parquet_rows
from qwentune.errors import DataError, Problem, nearest
from qwentune.shipped import shipped

Reader = Callable[[io.BufferedReader, str, list[Problem]], Iterator[NumberedValue]]

READERS: dict[str, Reader] = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".parquet": read_parquet_rows,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: any JSON value, and where it stands."""

    source: Source
    value: Json


def read_rows(path: str, problems: list[Problem]) -> Iterator[Row]:
    """The rows of a file, one at a time; whatever cannot be read goes to `problems`, and reading goes on.

    Takes the endings of `READERS`, each also with one of `COMPRESSIONS`. A missing path under `data_templates/` falls
    back to the shipped file; another that looks like a hub dataset is fetched.
    """
    try:
        file = _local(path)
    except DataError as error:
        problems.extend(error.problems)
        return
    if problem := misnamed(path, file):
        problems.append(problem)
        return
    num_problems = len(problems)
    is_empty = True
    try:
        with closing(_open(file)) as stream:
            for number, value in READERS[_ending(file)](stream, path, problems):
                is_empty = False
                yield Row(Source(path, number), value)
    except (OSError, EOFError, zlib.error) as error:  # also what gzip and Arrow raise for broken compressed data
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem(path, f"the file cannot be read to its end: {reason}", "Download or write it again."))
    if is_empty and len(problems) == num_problems:
        problems.append(Problem(path, "the file holds no rows", "Write at least one row."))


def content_sha256(path: str) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal; DataError where there is no such file."""
    file = _local(path)
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(Problem(path, f"the file cannot be read: {error.strerror}")) from None


def is_at_hand(path: str) -> bool:
    """Whether nothing has to be fetched to read the path."""
    return not is_hub_dataset(path) or kept_file(path).exists()


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


def _open(file: Path) -> io.BufferedReader:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file))
    if file.suffix == ".zst":
        # Slow to import; unlike zstandard's reader it reports data that ends too early.
        arrow: Any = import_module("pyarrow")
        return io.BufferedReader(arrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


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
