"""Reads the fields of one row: what is wrong with any of them is noted, so that all of it is said at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from qwentune.data.reading.faults import described
from qwentune.data.reading.row_keys import REFUSED, Holder, meant
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json, Offered, Source
from qwentune.errors import Problem

_NUMBER_OF_ITEM = re.compile(r"\[\d+\]")


@dataclass(slots=True)
class RowReader:
    """What was found in one row so far; `path` in its methods is the place inside the row (`messages[2].content`).

    `unread` are the keys that nothing reads, without the numbers of items (`messages[].note`); `offered` are those
    that are given to the chat template, which may read them or not.
    """

    source: Source
    problems: list[Problem] = field(default_factory=list[Problem])
    unread: list[str] = field(default_factory=list[str])
    offered: list[Offered] = field(default_factory=list[Offered])

    def refuse(self, what: str, fix: str = "") -> None:
        """Note one problem: the row will not be trained."""
        self.problems.append(Problem(str(self.source), what, fix))

    def read_text(self, fields: Mapping[str, Json], key: str, path: str = "", *, required: bool = False) -> str | None:
        """The text under `key`; None where it is absent, null or no text, the last of which is refused."""
        value = fields.get(key)
        if isinstance(value, str):
            return value
        if value is not None or required:
            self.refuse(f"{path or key} is {described(value) if key in fields else 'missing'}", "A text is needed.")
        return None

    def read_list(self, fields: Mapping[str, Json], key: str, path: str = "", *, required: bool = False) -> list[Json]:
        """The list under `key`, or the one in a text of JSON there, as table files store it; [] where there is none."""
        value = fields.get(key)
        if isinstance(value, str) and value:
            value = self.read_json(value, path or key)
            if value is None:  # and refused
                return []
        if isinstance(value, list):
            return value
        if required or value not in (None, ""):
            self.refuse(f"{path or key} is {described(value) if key in fields else 'missing'}", "A list is needed.")
        return []

    def read_json(
        self, text: str, path: str, mend: str = "Write it with json.dumps, or give the value itself."
    ) -> Json:
        """The value of a text of JSON; None, and refused, where it is none."""
        try:
            value = parse_json(text)
        except JsonFaultError as fault:
            fix = mend if fault.is_of_rows else fault.fix or mend
            self.refuse(f"{path} is a text that is no JSON, at column {fault.column or 1}: {fault.what}", fix)
            return None
        if value is None:
            self.refuse(f"{path} is the text 'null'", "Leave it out instead.")
        return value

    def other_keys(self, fields: Mapping[str, Json], known: frozenset[str], of: Holder, path: str = "") -> list[str]:
        """The keys beyond the known ones; refused are those that would change what is trained, also misspelt ones."""
        if known.issuperset(fields):  # as nearly always
            return []
        head, others = f"{path or 'the row'} has", list[str]()
        for key, value in fields.items():
            if key in known:
                continue
            if refusal := REFUSED[of].get(key):
                if refusal.when(value):
                    self.refuse(f"{head} {refusal.what.format(key=key)}", refusal.mend)
            elif near := meant(key, known):
                self.refuse(f"{head} the unknown key {key!r}", f"Did you mean {near!r}? Else rename it.")
            elif value is not None:
                others.append(key)
        return others

    def leave_unread(self, keys: Iterable[str], path: str = "") -> None:
        """Note keys that nothing reads, of the row or of what stands at a path in it."""
        place = f"{_NUMBER_OF_ITEM.sub('[]', path)}." if path else ""
        self.unread += [f"{place}{key}" for key in keys]

    def offer(self, keys: Collection[str], reader: str, path: str) -> None:
        """Note keys that are given to the chat template; `reader` is the role of the message, or what else it is of."""
        if keys:
            place = _NUMBER_OF_ITEM.sub("[]", path)
            self.offered += [Offered(reader, key, f"{place}.{key}") for key in keys]
