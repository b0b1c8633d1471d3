"""Row formats: how a row of each kind becomes a sample, and how a kind is recognised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from qwentune.data.formats import chat, fim, instruction, preference, retrieval, sharegpt, text
from qwentune.data.sample import Json, Sample, Source
from qwentune.errors import Problem

Parse: TypeAlias = Callable[[dict[str, Json], Source], Sample | list[Problem]]

FORMATS: dict[str, Parse] = {
    "chat": chat.parse,
    "sharegpt": sharegpt.parse,
    "instruction": instruction.parse,
    "fim": fim.parse,
    "text": text.parse,
    "preference": preference.parse,
    "retrieval": retrieval.parse,
}
NOT_TRAINED = frozenset({"preference", "retrieval"})  # rendered and previewed only

# The keys that a row of a format must have; the first match counts, so that texts with more keys are no plain texts.
SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("preference", frozenset({"chosen", "rejected"})),
    ("preference", frozenset({"messages", "rejected_response"})),
    ("chat", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("sharegpt", frozenset({"conversation"})),
    ("instruction", frozenset({"instruction", "output"})),
    ("instruction", frozenset({"query", "response"})),
    ("retrieval", frozenset({"query", "positive"})),
    ("fim", frozenset({"prefix", "suffix", "middle"})),
    ("fim", frozenset({"repo", "files"})),
    ("text", frozenset({"text"})),
)


def detect(rows: Sequence[Json]) -> str | None:
    """The format whose keys most of the rows have; None where no row has those of any."""
    found = [name for row in rows if isinstance(row, dict) and (name := format_of(row))]
    return max(found, key=found.count, default=None)


def format_of(row: dict[str, Json]) -> str | None:
    """The format whose keys a row has; None where it has those of none."""
    return next((name for name, keys in SIGNATURES if keys <= row.keys()), None)
