"""Rows of JSON Lines and of JSON arrays, read as a stream; a wrong row is reported and reading goes on behind it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

from qwentune.data.reading.faults import Unread, too_many
from qwentune.data.reading.strict_json import JsonFaultError, parse_first, parse_json
from qwentune.data.sample import Json
from qwentune.errors import Problem

NumberedValue: TypeAlias = tuple[int, Json]  # the line or, in files without lines, the row, counted from 1

# Three million tokens, beyond any model's window, which are encoded in 4 GB. It bounds the memory that one line, or a
# small compressed file, can take.
LARGEST_ROW_BYTES = 12 * 2**20
MOST_EMPTY_LINES = 1_000_000  # in a row: a small compressed file can hold billions
CHUNK_CHARACTERS = 2**20
LONGEST_BEGINNING = 200  # of a row, through its first key

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SAVE_AS_UTF_8 = "Save the file as UTF-8."
_CUT = "the file ends in the middle of this row"
_WRITE_AGAIN = "Write the file again: an interrupted write or copy leaves half a row at its end."
_LENIENT = json.JSONDecoder(parse_int=str)  # finds where a value ends, also one that is refused
_LONGEST_CUT_EXPONENT = len("e+")  # a number may stand complete before these and go on behind them


def read_json_rows(stream: io.BufferedReader, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    """The rows of a file of JSON Lines or of one JSON array, whichever its first character says.

    A row of JSON Lines is numbered by its line, one of an array by its place in it. Wrong rows go to `problems`.
    """
    beginning = stream.peek(1)[:4096]
    if beginning.startswith(_UTF_16_MARKS):
        problems.append(Unread(path, "the file is UTF-16", _SAVE_AS_UTF_8))
    elif beginning.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
        yield from _read_array(stream, path, problems)
    else:
        yield from _read_lines(stream, path, problems)


def _read_lines(stream: io.BufferedReader, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    num_empty = 0
    for number, line in _lines(stream):
        where = f"{path}:{number}"
        if too_many(path, problems):
            return
        num_empty = 0 if line.strip() else num_empty + 1
        if num_empty > MOST_EMPTY_LINES:
            problems.append(empty_lines(where))
            return
        if len(line) > LARGEST_ROW_BYTES:
            what = f"the line is longer than {LARGEST_ROW_BYTES // 2**20} MiB"
            problems.append(Problem(where, what, "Put each row on a line of its own; cut a row that is longer."))
            continue
        try:
            text = line.decode().rstrip("\r\n")  # a value that is cut ends in this line
            if text.strip():
                yield number, parse_json(text)
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.end == len(line):
                problems.append(Problem(f"{where}:{error.start + 1}", _CUT, _WRITE_AGAIN))
                continue
            what = f"the byte 0x{line[error.start]:02x} is not UTF-8"
            problems.append(Problem(f"{where}:{error.start + 1}", what, _SAVE_AS_UTF_8))
        except JsonFaultError as fault:
            if fault.is_cut and line.strip() == b"{" and line.endswith(b"\n"):
                what = "an object begins here and goes on in the next line"
                fix = "Put each row on one line (jq -c . FILE), or all rows into one JSON array."
                problems.append(Unread(where, what, fix))
                return  # every further line would be reported for the same reason
            is_last = not line.endswith(b"\n")
            next_begins = stream.peek(1)[:1] in (b"{", b"")
            problems.append(
                _cut_row(line.decode().rstrip("\r\n"), where) or _line_problem(fault, where, is_last, next_begins)
            )


def empty_lines(where: str) -> Problem:
    """That no row is looked for behind so many empty lines."""
    what = f"more than {MOST_EMPTY_LINES:,} empty lines follow each other, and nothing behind them is read"
    return Unread(where, what, "Write the file again, without them.")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines by number from 1; of a line that is too large only its beginning, one byte above the limit."""
    number = 0
    while line := stream.readline(LARGEST_ROW_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > LARGEST_ROW_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(LARGEST_ROW_BYTES + 1)
        yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _cut_row(text: str, where: str) -> Problem | None:
    """That a line is half a row with a whole one behind it, as where two programs write one file; None where not."""
    begins = text.rfind(text[:LONGEST_BEGINNING].partition(":")[0])
    if begins <= 0 or _is_json(text[:begins]) or not _is_json(text[begins:]):
        return None
    what = "the row is cut, and the next one begins in the same line"
    return Problem(f"{where}:{begins + 1}", what, "Delete what stands before this column, or write both rows again.")


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except JsonFaultError:
        return False
    return True


def _line_problem(fault: JsonFaultError, where: str, is_last: bool, next_begins: bool) -> Problem:
    """A fault of a line in words; `next_begins`: the next line is a row, so that this one does not go on there."""
    line = where.rpartition(":")[2]
    if fault.column is not None:
        where = f"{where}:{fault.column}"
    if not fault.is_cut:
        return Problem(where, fault.what, fault.fix or f"Write the row again with json.dumps, or delete line {line}.")
    if is_last:
        return Problem(where, _CUT, _WRITE_AGAIN)
    if next_begins:
        return Problem(where, f"{fault.what}: the row is cut", f"Write it again as a whole, or delete line {line}.")
    return Problem(where, fault.what, "Write each row on one line, line breaks inside a text as \\n.")


def _read_array(stream: BinaryIO, path: str, problems: list[Problem]) -> Iterator[NumberedValue]:
    # Undecodable bytes become lone surrogates here, which only the row that holds them pays for.
    window = _Window(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    number = 0
    try:
        window.take("[")
        while number or window.next_character() != "]":
            if too_many(path, problems):
                return
            number += 1
            row = window.take_value()
            try:
                if len(row) > LARGEST_ROW_BYTES:
                    raise JsonFaultError(f"the row is longer than {LARGEST_ROW_BYTES // 2**20} MiB", "Cut the row.")
                row.encode()
                yield number, parse_json(row)
            except UnicodeEncodeError:
                problems.append(Problem(f"{path}:{number}", "the row is not UTF-8", _SAVE_AS_UTF_8))
            except JsonFaultError as fault:
                problems.append(Problem(f"{path}:{number}", fault.what, fault.fix))
            if not window.take(","):
                break
        if not window.take("]"):
            raise window.fault_here("a comma or the closing bracket of the array is missing")
        if window.next_character():
            raise window.fault_here("something follows the array", "Keep one array per file, or one row per line.")
    except JsonFaultError as fault:
        where = f"{path}:{fault.line}:{fault.column}"
        fix = fault.fix or "Mend that row, or delete it; json.dump writes whole arrays."
        problems.append(Unread(where, f"the array is broken at its row {max(number, 1)}: {fault.what}", fix))


@dataclass(slots=True)
class _Window:
    """A stretch of a long text, grown at its end and forgotten at its beginning: one row and a chunk at most."""

    stream: io.TextIOWrapper
    text: str = ""
    position: int = 0  # what comes before it is done with
    line: int = 1  # of text[0] in the file, as is column
    column: int = 1

    def take(self, character: str) -> bool:
        """Whether the next character that is no white space is this one, which is then done with."""
        if self.next_character() != character:
            return False
        self.position += 1
        return True

    def next_character(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        num_skipped = 0
        while True:
            rest = self.text[self.position : self.position + CHUNK_CHARACTERS]
            num_blank = len(rest) - len(rest.lstrip())
            self.position += num_blank
            num_skipped += num_blank
            if num_blank < len(rest):
                return self.text[self.position]
            if num_skipped > LARGEST_ROW_BYTES:
                raise self.fault_here(f"nothing but white space stands in {LARGEST_ROW_BYTES // 2**20} MiB")
            if not rest and not self._grow():
                return ""

    def take_value(self) -> str:
        """The text of the next value, which is then done with; JsonFaultError with its place where there is none."""
        self.next_character()
        while True:
            try:
                _, end = _LENIENT.raw_decode(self.text, self.position)
                if end + _LONGEST_CUT_EXPONENT < len(self.text) or not self._grow():
                    taken, self.position = self.text[self.position : end], end
                    return taken
            except (ValueError, RecursionError):
                if len(self.text) - self.position > LARGEST_ROW_BYTES:
                    raise self.fault_here(f"no value ends within {LARGEST_ROW_BYTES // 2**20} MiB") from None
                if not self._grow():
                    raise self._fault_of_value() from None

    def fault_here(self, what: str, fix: str = "") -> JsonFaultError:
        """The fault, at the place in the file where the window stands."""
        line, column = self._place(self.position)
        return JsonFaultError(what, fix, line=line, column=column)

    def _fault_of_value(self) -> JsonFaultError:
        try:
            parse_first(self.text, self.position)
        except JsonFaultError as fault:
            if fault.column is None:
                return self.fault_here(fault.what, fault.fix)
            column = fault.column + (self.column - 1 if fault.line == 1 else 0)
            return JsonFaultError(fault.what, fault.fix, line=self.line + fault.line - 1, column=column)
        raise AssertionError("what the lenient decoder refuses, the strict one refuses too")

    def _grow(self) -> bool:
        """Whether there was more to read; where not, nothing has moved."""
        num_left = len(self.text) - self.position
        chunk = self.stream.read(max(CHUNK_CHARACTERS, num_left))  # doubled: a long row is not parsed over and over
        if not chunk:
            return False
        self.line, self.column = self._place(self.position)
        self.text, self.position = self.text[self.position :] + chunk, 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        line_start = self.text.rfind("\n", 0, position) + 1
        column = position - line_start + (1 if line_start else self.column)
        return self.line + self.text.count("\n", 0, position), column
