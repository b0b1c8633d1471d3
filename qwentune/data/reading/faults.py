"""What is wrong with one row: all of it, in the words of the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json, Source
from qwentune.errors import Problem
from qwentune.redaction import redact

LONGEST_EXCERPT = 40  # characters
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios", "objects")  # of ms-swift, LLaMA-Factory, LLaVA
MOST_PROBLEMS = 250_000  # of a file: one of another kind may have a wrong row in each of its billion lines


@dataclass(frozen=True, slots=True)
class Unread(Problem):
    """What keeps a file, or the rest of one, from being read: nobody knows how many rows are lost by it."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Collects the problems of one row; `path` in its methods is the place inside the row (`messages[2].content`)."""

    source: Source
    problems: list[Problem] = field(default_factory=list[Problem])

    def add(self, what: str, fix: str = "") -> None:
        """Note one problem."""
        self.problems.append(Problem(str(self.source), what, fix))

    def text(self, row: Mapping[str, Json], key: str, path: str, *, required: bool = False) -> str | None:
        """The text under `key`; None where it is absent, null or no text, the latter noted as a problem."""
        value = row.get(key)
        if isinstance(value, str):
            return value
        if value is not None or required:
            self.add(f"{path} is {described(value) if key in row else 'missing'}", "A text is needed.")
        return None

    def listed(self, row: Mapping[str, Json], key: str, path: str, *, required: bool = False) -> list[Json]:
        """The list under `key`, or the one in a text of JSON there, as table files store it; [] where there is none."""
        value = row.get(key)
        if isinstance(value, str) and value:
            value = self.parsed(value, path)
            if value is None:
                return []
        if isinstance(value, list):
            return value
        if required or value not in (None, ""):
            self.add(f"{path} is {described(value) if key in row else 'missing'}", "A list is needed.")
        return []

    def parsed(self, text: str, path: str) -> Json:
        """The value of a text of JSON; None with a problem where it is none."""
        try:
            value = parse_json(text)
        except JsonFaultError as fault:
            fix = fault.fix or "Write it with json.dumps, or give the value itself."
            self.add(f"{path} is a text that is no JSON, at column {fault.column or 1}: {fault.what}", fix)
            return None
        if value is None:
            self.add(f"{path} is the text 'null'", "Leave it out instead.")
        return value

    def refuse_judged_bad(self, row: Mapping[str, Json]) -> None:
        """Note that a row is one of answers judged good or bad, and a bad one: trained as it is, it would be taught."""
        for key in ("label", "kto_tag"):
            if row.get(key) is False:
                self.add(f"the row has {key} false: its answer was judged bad", "Leave the row out, or remove the key.")

    def refuse_media(self, row: Mapping[str, Json]) -> None:
        """Note pictures, sound and boxes that a row names beside its texts: answers would be taught without them."""
        for key in MEDIA_KEYS:
            if row.get(key):
                self.add(f"the row has {key}", "Only text is trained on: leave the row out, or remove the key.")

    def misspelt(self, row: Mapping[str, Json], known: tuple[str, ...], allowed: tuple[str, ...], path: str) -> None:
        """Note keys that are nearly a known one: taken for unknown, they would silently change what is trained."""
        for key in row:
            if key in known or key in allowed:  # most are, and looking for the nearest is slow
                continue
            if near := get_close_matches(key, known, n=1, cutoff=0.8):
                self.add(f"{path}the unknown key {key!r}", f"Did you mean {near[0]!r}? Else rename it.")


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
