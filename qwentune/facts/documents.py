"""The small files of a checkpoint or adapter folder, read within bounds: what is wrong with one is said by its name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from qwentune.bounded import UnreadableError, read_bytes
from qwentune.errors import Problem, UsageError

T = TypeVar("T")

LARGEST_BYTES = 16 * 2**20  # of a configuration; indices of the largest checkpoints have some 5 MB
LARGEST_TOKENIZER_BYTES = 64 * 2**20  # three times the largest of Qwen's
LARGEST_TEMPLATE_BYTES = 2**20
DEEPEST_NESTING = 64
MEND = "Copy it again from the hub, or from where the folder came."
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NUM_SHOWN = 60  # characters of a value
# pydantic's words end in the middle of a sentence of ours, and some are those of programmers.
_NEEDED = {"Field required": "it is missing", "Input should be ": "", "should be ": "", "should have ": "has "}


def read_text(path: Path, largest_bytes: int = LARGEST_BYTES) -> str:
    """The text of a regular file; UsageError where it is none, is too large, is no UTF-8 or cannot be read."""
    if not os.path.lexists(path):
        raise UsageError(Problem(str(path), "The file is missing.", "A checkpoint folder holds one."))
    try:
        return read_bytes(path, largest_bytes).decode()
    except UnreadableError as error:
        raise UsageError(Problem(str(path), f"{str(error)[0].upper()}{str(error)[1:]}.", MEND)) from None
    except UnicodeDecodeError as error:
        raise UsageError(Problem(str(path), f"The file is no UTF-8: byte {error.start}.", MEND)) from None


def read_object(path: Path, *, optional: bool = False, largest_bytes: int = LARGEST_BYTES) -> dict[str, Any]:
    """The JSON object in a file; empty where an `optional` one is missing.

    Raises UsageError with file, line and column: bad syntax, no object, NaN, half characters, deep nesting.
    """
    if optional and not path.exists() and not path.is_symlink():
        return {}
    text = read_text(path, largest_bytes)
    try:
        value: Any = json.loads(text, parse_constant=_no_number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        what = f"The file cannot be read: {error.msg}." if text.strip() else "The file is empty."
        raise UsageError(Problem(f"{path}:{error.lineno}:{error.colno}", what, MEND)) from None
    except UnicodeEncodeError:
        raise UsageError(Problem(str(path), "A text in it holds half a character (a lone surrogate).", MEND)) from None
    except RecursionError:
        value = None
    except ValueError as error:  # NaN, and whole numbers of thousands of digits
        raise UsageError(Problem(str(path), f"The file cannot be read: {str(error)[:_NUM_SHOWN]}.", MEND)) from None
    else:
        if not isinstance(value, dict):
            raise UsageError(Problem(str(path), "The file holds no JSON object.", MEND))
    if value is None or is_too_deep(cast("object", value)):
        what = f"lists and objects stand more than {DEEPEST_NESTING} deep in each other."
        raise UsageError(Problem(str(path), what, MEND))
    return cast("dict[str, Any]", value)


def checked(value: object, kind: TypeAdapter[T], path: Path, fix: str = MEND) -> T:
    """The value as `kind` describes it; UsageError with the file and every key that is of another kind."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        found: dict[str, Problem] = {}
        for fault in error.errors(include_url=False, include_context=False):
            key = ".".join(str(part) for part in fault["loc"] if not _is_a_branch(part)) or "the file"
            given = "" if fault["type"] == "missing" else f" is {shown(fault['input'])}:"
            needed = fault["msg"]
            for words, better in _NEEDED.items():
                needed = needed.replace(words, better)
            found.setdefault(key, Problem(f"{path}: {key[:200]}", f"{key[:200]}{given} {needed}"[:400], fix))
        raise UsageError([*found.values()]) from None


def shown(value: object) -> str:
    """A value of a file as a message shows it, at most a line of it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _NUM_SHOWN else text[: _NUM_SHOWN - 1] + "…"


def _is_a_branch(part: object) -> bool:
    """Whether part of a place is pydantic's name for one of several kinds, and no key."""
    return isinstance(part, str) and (part.endswith("]") or part in ("str", "int", "float", "bool", "_Content"))


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def is_too_deep(value: object) -> bool:
    """Whether lists and objects stand more than DEEPEST_NESTING deep in each other."""
    level: Sequence[Any] = [value]
    for _ in range(DEEPEST_NESTING):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(cast("Mapping[str, Any]", item).values())
            elif isinstance(item, list):
                inner.extend(cast("list[Any]", item))
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list) for item in level)
