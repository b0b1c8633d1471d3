"""Rows of CSV and Parquet files, with nothing retyped and nothing filled in."""

from __future__ import annotations

import csv
import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, BinaryIO, cast

from qwentune.data.faults import Unread
from qwentune.data.json_rows import LARGEST_ROW_BYTES, NumberedValue
from qwentune.data.sample import Json
from qwentune.errors import Problem

ROWS_PER_BATCH = 256

_NO_JSON = (ValueError, KeyError, OverflowError)  # what Arrow raises for invalid text, repeated map keys, far dates


def read_csv_rows(stream: BinaryIO, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    """Objects of text by the names of the first line, numbered by the line they begin in.

    Every value stays the text it is (`007`, `NA`); an empty cell is an absent field.
    """
    csv.field_size_limit(LARGEST_ROW_BYTES)
    # Undecodable bytes become lone surrogates here, which only the row that holds them pays for.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not _is_unicode(cells):
                kind = Problem if names else Unread
                problems.append(kind(f"{path}:{line}", "the row is not UTF-8", "Save the file as UTF-8."))
                if not names:
                    return
            elif not names:
                names = cells
                if "" in names or len(set(names)) < len(names):
                    what = f"the first line must name each column once; it has {names}"
                    problems.append(Unread(f"{path}:{line}", what, "Name the columns as the row format does."))
                    return
                if len(names) == 1 and (separator := next((mark for mark in ";\t|" if mark in names[0]), "")):
                    what = f"its columns are separated by {separator!r}, not by commas"
                    problems.append(Unread(f"{path}:{line}", what, "Save the file with commas."))
                    return
            elif len(cells) == len(names):
                yield line, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            elif cells:
                what = f"{len(cells)} cells stand under {len(names)} column names"
                problems.append(Problem(f"{path}:{line}", what, "Quote cells that hold a comma or a line break."))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(Unread(f"{path}:{line}", f"this is no CSV: {error}", "Write the file with a CSV library."))


def read_parquet_rows(stream: BinaryIO, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    """Objects by column name, numbered from 1; null fields are absent at every depth.

    An Arrow struct holds the fields of all rows, so a tool call would have the arguments of every tool as nulls; a null
    that was meant cannot be told from those. Data with meant nulls keeps its arguments as texts of JSON.
    """
    arrow: Any = import_module("pyarrow")  # slow to import, and few runs read Parquet
    parquet: Any = import_module("pyarrow.parquet")
    with tempfile.TemporaryFile() as whole:
        if not stream.seekable():  # decompressed on the way, while Parquet is read from its end
            shutil.copyfileobj(stream, whole)
            stream = whole
        try:
            file: Any = parquet.ParquetFile(stream)
            names: list[str] = file.schema_arrow.names
            if len(set(names)) < len(names):
                problems.append(Unread(path, f"two columns have the same name: {names}", "Name each column once."))
                return
            rows = (row for batch in file.iter_batches(batch_size=ROWS_PER_BATCH) for row in _batch_rows(batch))
            for number, row in enumerate(rows, start=1):
                if isinstance(row, Exception):
                    what = f"the row cannot be read: {row.args[0] if isinstance(row, KeyError) else row}"
                    fix = "Store texts, numbers, lists and structs, or leave the column out."
                    problems.append(Problem(f"{path}:{number}", what, fix))
                else:
                    yield number, row
        except arrow.ArrowException as error:
            problems.append(Unread(path, f"this is no readable Parquet file: {error}", "Write the file again."))


def _batch_rows(batch: Any) -> Iterator[Json | Exception]:
    """The rows of an Arrow batch; in place of one that JSON has no form for, the reason."""
    try:
        yield from [json_row(row) for row in batch.to_pylist(maps_as_pydicts="strict")]
    except _NO_JSON as error:
        if batch.num_rows == 1:
            yield error
        else:  # one row's fault is not that of the others
            for i in range(batch.num_rows):
                yield from _batch_rows(batch.slice(i, 1))


def _is_unicode(cells: list[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def json_row(row: Mapping[str, Any]) -> Json:
    """The row without null fields; ValueError, with the column, where JSON has no such value."""
    fields: dict[str, Json] = {}
    for name, value in row.items():
        try:
            if value is not None:
                fields[name] = json_value(value)
        except ValueError as error:
            raise ValueError(f"its column {name!r} holds {error}") from None
    return fields


def json_value(value: Any) -> Json:
    """The value without null fields; ValueError where JSON has no such value."""
    if isinstance(value, dict):
        fields = cast(dict[Any, Any], value)
        return {str(key): json_value(item) for key, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [json_value(item) for item in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a value of the type {type(value).__name__}")
