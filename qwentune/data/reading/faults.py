"""What keeps a file from being read, and how the values of rows are told to people."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qwentune.data.sample import Json, RowError
from qwentune.errors import Problem
from qwentune.redaction import redact

LONGEST_EXCERPT = 40  # characters
MOST_PROBLEMS = 250_000  # of a file: one of another kind may have a wrong row in each of its billion lines


@dataclass(frozen=True, slots=True)
class Unread(Problem):
    """What keeps a file, or the rest of one, from being read: nobody knows how many rows are lost by it."""


@dataclass(frozen=True, slots=True)
class Waiting(Problem):
    """What is wrong with a row that may be mended while its file stays as it is: by what it `waits_for`."""

    waits_for: tuple[str, ...] = ()


def problem_of(error: RowError, where: str) -> Problem:
    """The problem that an error of a row is."""
    if error.waits_for:
        return Waiting(where, error.what, error.fix, error.waits_for)
    return Problem(where, error.what, error.fix)


def too_many(path: str, problems: list[Problem]) -> bool:
    """Whether a file has so many problems that the rest of it is not read, which is then said among them."""
    if len(problems) < MOST_PROBLEMS:
        return False
    what = f"{len(problems):,} problems are in the file up to here, and the rest is not read"
    problems.append(Unread(path, what, "Is it of the kind that its name says? Else leave the wrong rows out."))
    return True


def described(value: Json) -> str:
    """The kind of a value and how it begins: `the text 'abc'`, `the number 3`, `null`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {shortened(value)!r}"
        case int() | float():
            return f"the number {shortened(str(value))}"
        case list():
            return f"the list {shortened(json.dumps(value, ensure_ascii=False))}"
        case dict():
            return f"the object {shortened(json.dumps(value, ensure_ascii=False))}"


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis; without secrets, of which a part would not be known again."""
    text = redact(text)
    return text if len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT] + "…"
