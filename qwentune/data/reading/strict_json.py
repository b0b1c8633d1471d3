"""JSON as RFC 8259 has it, for rows that people and scripts wrote: nothing is guessed, every fault is explained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import cast

from qwentune.data.sample import Json

DEEPEST_NESTING = 200  # lists and objects inside each other; far from the interpreter's recursion limit

_PYTHON_WORDS = ("True", "False", "None")
_CUT_TOKEN = re.compile(r"-|t(ru?)?|f(a(ls?)?)?|n(ul?)?|\\?u[0-9a-fA-F]{0,4}|\.|[eE][+-]?")  # at the end of a text


class JsonFaultError(Exception):
    """A text that is no JSON: what is wrong, how to mend it, and the place in the text where that is known.

    `line` and `column` count from 1, in characters; `is_cut` says that the text ends before its value does,
    `is_of_rows` that the mend is one of a file of rows.
    """

    def __init__(
        self,
        what: str,
        fix: str = "",
        *,
        line: int = 1,
        column: int | None = None,
        is_cut: bool = False,
        is_of_rows: bool = False,
    ) -> None:
        self.what, self.fix, self.line, self.column, self.is_cut = what, fix, line, column, is_cut
        self.is_of_rows = is_of_rows
        super().__init__(what)


def parse_json(text: str) -> Json:
    """The one value that the text holds; JsonFaultError where it holds none, several, or one that is not portable.

    Refused beyond bad syntax: NaN and infinite numbers, duplicate keys, lone surrogates, deep nesting.
    """
    value, end = parse_first(text, 0)
    rest = text[end:].lstrip()
    if rest:
        raise _rest_fault(text, len(text) - len(rest))
    return value


def parse_first(text: str, start: int) -> tuple[Json, int]:
    """The value that begins at or after `start` and the index after it; JsonFaultError as in `parse_json`."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _syntax_fault(text, error) from None
    except RecursionError:
        raise _nesting_fault() from None
    except ValueError:  # the only one left: the interpreter's limit on the digits of a whole number
        raise JsonFaultError("a number has thousands of digits", "Write it as a text.") from None
    value = cast(Json, value)
    if text.count("[", start, end) + text.count("{", start, end) > DEEPEST_NESTING and _is_too_deep(value):
        raise _nesting_fault()
    if "\\u" in text[start:end]:
        _refuse_lone_surrogates(value)
    return value, end


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next((key for key, _ in pairs if key in seen or seen.add(key)), "")
        raise JsonFaultError(f"the key {twice!r} stands twice in one object", "Remove one: readers keep either.")
    return result


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise JsonFaultError(f"{number[:40]} is not a finite number", "Use a finite number, or null.")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)


def _syntax_fault(text: str, error: json.JSONDecodeError) -> JsonFaultError:
    at = text[error.pos :]
    if not at.strip() or error.msg.startswith("Unterminated string") or _CUT_TOKEN.fullmatch(at):
        return JsonFaultError(
            "the value ends before it is complete",
            line=error.lineno,
            column=error.colno,
            is_cut=True,
        )
    what, fix = error.msg[0].lower() + error.msg[1:], ""
    if at[0] == "'":
        what, fix = "a single quote where a double quote is needed", "Write rows with json.dumps, not with str or repr."
    elif at.startswith(_PYTHON_WORDS):
        word = next((word for word in _PYTHON_WORDS if at.startswith(word)), "")
        what, fix = f"{word} is Python, not JSON", "JSON writes true, false and null; json.dumps does."
    elif error.msg.startswith("Invalid control character"):
        what, fix = f"a raw control character {at[0]!r} inside a text", "Write it escaped (\\n, \\t); json.dumps does."
    elif at[0] in "]}" or "trailing comma" in error.msg:
        fix = "Is there a comma before the closing bracket? Remove it."
    return JsonFaultError(what, fix, line=error.lineno, column=error.colno)


def _rest_fault(text: str, position: int) -> JsonFaultError:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    rest = text[position:]
    if rest.strip() == ",":
        return JsonFaultError(
            "a comma after the row", "Rows have no comma between them.", line=line, column=column, is_of_rows=True
        )
    what = "something follows the first value" if rest[0] not in "[{," else "several values on one line"
    return JsonFaultError(what, "Put each row on a line of its own.", line=line, column=column, is_of_rows=True)


def _nesting_fault() -> JsonFaultError:
    what = f"lists and objects are nested more than {DEEPEST_NESTING} deep"
    return JsonFaultError(what, "Flatten the row, or store the nested part as a text of JSON.")


def _is_too_deep(value: Json) -> bool:
    level: list[Json] = [value]
    for _ in range(DEEPEST_NESTING):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return any(isinstance(value, list | dict) for value in level)


def _children(value: Json) -> Iterable[Json]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_lone_surrogates(value: Json) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        what = f"the escape {escape} is half of a character"
        raise JsonFaultError(what, "Write rows with json.dumps; it pairs such escapes.") from None
