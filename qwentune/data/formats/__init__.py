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

# Column names that others give to the same, the likeliest format first.
OTHER_NAMES: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
    ("chat", {"messages": ("dialogue", "dialog", "chat", "turns", "message")}),
    ("sharegpt", {"conversations": ("items",)}),
    ("retrieval", {"query": ("anchor", "sentence1"), "positive": ("pos", "sentence2")}),
    (
        "instruction",
        {
            "instruction": ("prompt", "question", "query", "user", "human", "problem", "q"),
            "output": ("completion", "response", "answer", "assistant", "target", "solution", "a"),
        },
    ),
    ("text", {"text": ("content", "document", "body", "code")}),
)


def detect(rows: Sequence[Json]) -> str | None:
    """The format whose keys most of the rows have; None where no row has those of any."""
    found = [name for row in rows if isinstance(row, dict) and (name := format_of(row))]
    return max(found, key=found.count, default=None)


def suggestion(keys: Sequence[str], path: str) -> str:
    """How to rename columns that go by other names; empty where that is not clear."""
    lowered = {key.lower(): key for key in keys}
    for format, columns in OTHER_NAMES:
        found = {ours: [lowered[name] for name in (ours, *names) if name in lowered] for ours, names in columns.items()}
        if all(found.values()):
            pairs = ", ".join(f"{ours}: .{names[0]}" for ours, names in found.items())
            can_run = path.endswith(".jsonl") and all(map(str.isidentifier, keys))
            command = f" (jq -c '{{{pairs}}}' {path} > renamed.jsonl)" if can_run else ""
            renamed = ", ".join(f"{names[0]!r} to {ours!r}" for ours, names in found.items() if names[0] != ours)
            return f"As rows of the format {format}: rename {renamed}{command}."
    return ""


def format_of(row: dict[str, Json]) -> str | None:
    """The format whose keys a row has; None where it has those of none."""
    return next((name for name, keys in SIGNATURES if keys <= row.keys()), None)
