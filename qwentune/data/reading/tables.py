"""Rows of CSV and Parquet files, with nothing retyped and nothing filled in."""

from __future__ import annotations

import base64
import csv
import io
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO, cast

from qwentune.data.reading.faults import Unread, too_many
from qwentune.data.reading.json_rows import LARGEST_ROW_BYTES, MOST_EMPTY_LINES, NumberedValue, empty_lines
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json
from qwentune.errors import Problem

ROWS_PER_BATCH = 256
MOST_COLUMNS, LARGEST_HEADER_BYTES = 10_000, 2**20
LARGEST_BATCH_BYTES = 2**28  # of Parquet, in memory
MOST_TOO_LONG = 20  # rows of Parquet, of which a small file can hold billions
LARGEST_UNPACKED_BYTES, BLOCK_BYTES = 8 * 2**30, 2**20

_NO_JSON = (ValueError, KeyError, OverflowError)  # what Arrow raises for invalid text, repeated map keys, far dates


def read_csv_rows(stream: BinaryIO, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    """Objects of text by the names of the first line, numbered by the line they begin in.

    Every value stays the text it is (`007`, `NA`); an empty cell is an absent field.
    """
    csv.field_size_limit(LARGEST_ROW_BYTES)
    # Undecodable bytes become lone surrogates here, which only the row that holds them pays for.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _Lines(text)
    reader = csv.reader(lines, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if too_many(path, problems):
                return
            if lines.num_empty > MOST_EMPTY_LINES:
                problems.append(empty_lines(f"{path}:{line}"))
                return
            lines.begin(LARGEST_ROW_BYTES)
            if not _is_unicode(cells):
                kind = Problem if names else Unread
                problems.append(kind(f"{path}:{line}", "the row is not UTF-8", "Save the file as UTF-8."))
                if not names:
                    return
            elif not names:
                names = cells
                if len(names) > MOST_COLUMNS:
                    problems.append(_too_many_columns(f"{path}:{line}", len(names)))
                    return
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
    except _TooLongError:
        what = f"the row is longer than {lines.most // 2**20} MiB, and nothing behind it is read"
        fix = "Cut the row, or close a quote that is open." if names else "Name the columns in the first line."
        problems.append(Unread(f"{path}:{line}", what, fix))
    except csv.Error as error:
        problems.append(Unread(f"{path}:{line}", f"this is no CSV: {error}", "Write the file with a CSV library."))


class _TooLongError(Exception):
    """A row beyond its bound."""


class _Lines:
    """The lines of a text, counted row by row: `begin` starts the next row, of at most so many characters."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.num_empty = 0  # lines, one after the other
        self.begin(LARGEST_HEADER_BYTES)

    def begin(self, most: int) -> None:
        """A row begins."""
        self.most = self._left = most

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                raise _TooLongError
            self.num_empty = 0 if line.strip() else self.num_empty + 1
            yield line


def _too_many_columns(where: str, count: int) -> Problem:
    what = f"there are {count:,} columns, and at most {MOST_COLUMNS:,} are read"
    return Unread(where, what, "Leave those out that no row format has.")


def read_parquet_rows(stream: BinaryIO, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    """Objects by column name, numbered from 1; null fields are absent at every depth.

    An Arrow struct holds the fields of all rows, so a tool call would have the arguments of every tool as nulls; a null
    that was meant cannot be told from those. Data with meant nulls keeps its arguments as texts of JSON.
    """
    arrow: Any = import_module("pyarrow")  # slow to import, and few runs read Parquet
    parquet: Any = import_module("pyarrow.parquet")
    with tempfile.TemporaryFile() as whole:
        if not stream.seekable():  # decompressed on the way, while Parquet is read from its end
            for _ in range(LARGEST_UNPACKED_BYTES // BLOCK_BYTES):
                if not (block := stream.read(BLOCK_BYTES)):
                    break
                whole.write(block)
            else:
                what = f"it unpacks to more than {LARGEST_UNPACKED_BYTES // 2**30} GiB"
                problems.append(Unread(path, what, "Unpack it yourself: Parquet is compressed inside."))
                return
            stream = whole
        try:
            file: Any = parquet.ParquetFile(stream)
            if file.metadata.num_columns > MOST_COLUMNS:
                problems.append(_too_many_columns(path, file.metadata.num_columns))
                return
            names: list[str] = file.schema_arrow.names
            if len(set(names)) < len(names):
                problems.append(Unread(path, f"two columns have the same name: {names}", "Name each column once."))
                return
            size = _rows_per_batch(file.metadata, stream)
            rows = (row for batch in file.iter_batches(batch_size=size) for row in _batch_rows(batch))
            num_too_long = 0
            for number, row in enumerate(rows, start=1):
                num_too_long += isinstance(row, _TooLongError)
                if num_too_long > MOST_TOO_LONG or too_many(path, problems):
                    what = f"{num_too_long:,} rows up to here are too long, and the rest is not read"
                    problems.append(Unread(f"{path}:{number}", what, "Leave such rows out, or cut them."))
                    return
                if isinstance(row, Exception):
                    what = f"the row cannot be read: {row.args[0] if isinstance(row, KeyError) else row}"
                    fix = "Store texts, numbers, lists and structs, or leave the column out."
                    fix = "Cut the row, or leave it out." if isinstance(row, _TooLongError) else fix
                    problems.append(Problem(f"{path}:{number}", what, fix))
                else:
                    yield number, row
        except arrow.ArrowException as error:
            problems.append(Unread(path, f"this is no readable Parquet file: {error}", "Write the file again."))


def _rows_per_batch(metadata: Any, stream: BinaryIO) -> int:
    """So many rows that a batch takes less than `LARGEST_BATCH_BYTES`, also where all rows name one long cell.

    Such a cell stands once in a dictionary, whose size only its page says.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    most = 1
    for group in groups:
        chunks = [group.column(i) for i in range(group.num_columns)]
        dictionaries = sum(_page_bytes(stream, chunk.dictionary_page_offset) for chunk in chunks)
        most = max(most, dictionaries + group.total_byte_size // max(1, group.num_rows))
    return max(1, min(ROWS_PER_BATCH, LARGEST_BATCH_BYTES // most))


def _page_bytes(stream: BinaryIO, offset: int | None) -> int:
    """What the page at an offset unpacks to, by the second number of its header in Thrift's compact form; 0 if none."""
    if not offset or offset < 0:
        return 0
    stream.seek(offset)
    header = stream.read(16)
    numbers = [0, 0]
    position = 0
    for field in range(2):
        position += 1  # the number's own name and type
        for shift in range(0, 35, 7):
            byte = header[position] if position < len(header) else 0
            position += 1
            numbers[field] |= (byte & 127) << shift
            if byte < 128:
                break
    return numbers[1] >> 1  # zigzag: what is not negative is doubled


def _spelled_out(row: Any) -> Any:
    """A batch of one row without dictionaries, of which each would count whole for the one text that is taken."""
    arrow: Any = import_module("pyarrow")
    columns = [one.dictionary_decode() if arrow.types.is_dictionary(one.type) else one for one in row.columns]
    return arrow.RecordBatch.from_arrays(columns, names=row.schema.names)


def _batch_rows(batch: Any) -> Iterator[Json | Exception]:
    """The rows of an Arrow batch; in place of one that JSON has no form for, or that is too long, the reason."""
    if batch.nbytes > LARGEST_ROW_BYTES:
        if batch.num_rows == 1 and (batch := _spelled_out(batch)).nbytes > LARGEST_ROW_BYTES:
            yield _TooLongError(f"it takes {batch.nbytes:,} bytes, and at most {LARGEST_ROW_BYTES:,} are read")
            return
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _batch_rows(batch.slice(i, 1))
            return
    places = _json_places(batch.schema.names, batch.schema.types)
    try:
        for row in [json_row(row) for row in batch.to_pylist(maps_as_pydicts="strict")]:
            yield _unpacked(row, places) if places else row
    except _NO_JSON as error:
        if batch.num_rows == 1:
            yield error
        else:  # one row's fault is not that of the others
            for i in range(batch.num_rows):
                yield from _batch_rows(batch.slice(i, 1))


def _json_places(names: Sequence[str], types: Sequence[Any]) -> dict[str, Any]:
    """Where fields of these types hold Arrow's JSON, which `datasets` writes where types differ: True, or deeper."""
    arrow: Any = import_module("pyarrow")
    found: dict[str, Any] = {}
    for name, kind in zip(names, types, strict=True):
        inner = kind
        while arrow.types.is_list(inner) or arrow.types.is_large_list(inner):
            inner = inner.value_type
        if isinstance(inner, arrow.JsonType):
            found[name] = True
        elif arrow.types.is_struct(inner):
            fields = [inner.field(i) for i in range(inner.num_fields)]
            if places := _json_places([one.name for one in fields], [one.type for one in fields]):
                found[name] = places
    return found


def _unpacked(value: Json, places: Any) -> Json:
    """The value with what Arrow's JSON holds in the place of its text, where it is any."""
    if isinstance(value, list):
        return [_unpacked(item, places) for item in value]
    if isinstance(value, dict):
        return {key: _unpacked(item, places[key]) if key in places else item for key, item in value.items()}
    if isinstance(value, str):
        with suppress(JsonFaultError):
            return parse_json(value)
    return value


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
    """The value without null fields; ValueError where JSON has no such value.

    The bytes of a file, which `datasets` keeps as `{"bytes", "path"}`, become a text of base64.
    """
    if isinstance(value, dict):
        fields = cast(dict[Any, Any], value)
        if isinstance(data := fields.get("bytes"), bytes):
            fields = {**fields, "bytes": base64.b64encode(data).decode()}
        return {str(key): json_value(item) for key, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [json_value(item) for item in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a value of the type {type(value).__name__}")
