"""The keys of a file's rows that nothing reads: how often each stands where, and the warning of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qwentune.data.reading.faults import shortened
from qwentune.data.reading.row_keys import SAY_NOTHING, seems
from qwentune.data.sample import Source
from qwentune.errors import counted

MOST_PATHS = 1000  # a row may name each of its values
NUM_PLACES, NUM_NAMED = 3, 8
OTHERS = "other keys"


@dataclass(slots=True)
class _Found:
    count: int = 0
    first: list[Source] = field(default_factory=list[Source])


@dataclass(slots=True)
class UnreadKeys:
    """Counts keys by their path in a row (`messages[].note`)."""

    found: dict[str, _Found] = field(default_factory=dict[str, _Found])

    def add(self, paths: Iterable[str], source: Source) -> None:
        """Counts the keys of one row in."""
        for path in paths:
            self._count(path if path in self.found else _shown(path), 1, [source])

    def merge(self, later: UnreadKeys) -> None:
        """Counts in the keys of rows that come after these."""
        for path, one in later.found.items():
            self._count(path, one.count, one.first)

    def _count(self, path: str, count: int, places: Iterable[Source]) -> None:
        if path not in self.found and len(self.found) >= MOST_PATHS:
            path = OTHERS
        one = self.found.setdefault(path, _Found())
        one.count += count
        one.first = list(dict.fromkeys((*one.first, *places)))[:NUM_PLACES]

    def report(self) -> dict[str, Any]:
        """Per path its count and first places."""
        return {
            path: {"count": one.count, "first": [{"file": s.file, "line": s.line} for s in one.first]}
            for path, one in sorted(self.found.items())
        }

    def warnings(self) -> list[str]:
        """One warning for all keys but those that are known to say nothing; none where there are no others."""
        odd = {path: one for path, one in self.found.items() if path.rpartition(".")[2] not in SAY_NOTHING}
        if not odd:
            return []
        named = sorted(odd.items(), key=lambda item: -item[1].count)[:NUM_NAMED]
        words = ", ".join(f"{path!r} ({one.count}, first: {one.first[0]})" for path, one in named)
        more = f", and {len(odd) - len(named)} more" if len(odd) > len(named) else ""
        keys = counted(sum(one.count for one in odd.values()), "key{|s} of rows {is|are} read by nothing")
        likely = [f"{path!r} seems to be {found[0]}: {found[1]}" for path, _ in named if (found := seems(path))]
        if likely:
            mend = f"{'; '.join(likely)}. Say so in the source if it is, where its values are as that key has them."
        else:
            mend = "Name what should count as the format does (`columns`, `tags` of the source), or leave it out."
        return [f"{keys}: {words}{more}. {mend}"]


def _shown(path: str) -> str:
    """The path with a key that is no secret and not too long."""
    *holders, key = path.split(".")
    return ".".join((*holders, shortened(key))) if len(path) < 200 else shortened(path)
