"""What to do with rows whose format is not recognised: how columns would be renamed, joined or taken out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from qwentune.data.formats import format_of
from qwentune.data.sample import Json

# Column names that others give to the same and the kind of their values, the likeliest format first.
OTHER_NAMES: tuple[tuple[str, type, dict[str, tuple[str, ...]]], ...] = (
    ("chat", list, {"messages": ("dialogue", "dialog", "chat", "turns", "message")}),
    ("sharegpt", list, {"conversations": ("items",)}),
    ("retrieval", str, {"query": ("anchor", "sentence1"), "positive": ("pos", "sentence2")}),
    (
        "instruction",
        str,
        {
            "instruction": ("prompt", "question", "query", "user", "human", "problem", "q", "input"),
            "output": ("completion", "response", "answer", "assistant", "target", "solution", "a"),
        },
    ),
    ("text", str, {"text": ("content", "document", "body", "code")}),
)


def suggestion(rows: Sequence[Json], path: str) -> str:
    """How the rows of a file become those of a format, by the first of them; empty where that is not clear."""
    row: Mapping[str, Json] = next((row for row in rows if isinstance(row, dict)), dict[str, Json]())
    holders = {part: key for part in ("messages", "choices") for key, value in row.items() if _holds(value, part)}
    if len(holders) == 2:
        return _renamed("request", {"request": holders["messages"], "response": holders["choices"]}, row, path)
    for key, value in row.items():
        inner = value[0] if isinstance(value, list) and value else value
        format = format_of(inner) if isinstance(inner, dict) else None
        if format == "text":  # more likely a part of the row: a passage, the answers of a question
            continue
        if format and isinstance(value, list):
            each = "(arrays[], objects)" if path.endswith(".json") else ""
            command = _command(row, path, f"{each}.{key}[]", (".jsonl", ".json"))
            return f"The rows of {key!r} are rows of the format {format}: take them out{command}."
        if format:
            command = _command(row, path, f".{key}")
            return f"The {key!r} of each row is one of the format {format}: take it out{command}."
    return _renaming(row, path)


def _holds(value: Json, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _renaming(row: Mapping[str, Json], path: str) -> str:
    for format, kind, columns in OTHER_NAMES:
        lowered = {key.lower(): key for key, value in row.items() if isinstance(value, kind | str)}
        found = {ours: [lowered[name] for name in (ours, *names) if name in lowered] for ours, names in columns.items()}
        if all(found.values()):
            return _renamed(format, {ours: names[0] for ours, names in found.items()}, row, path)
    return ""


def _renamed(format: str, columns: Mapping[str, str], row: Mapping[str, Json], path: str) -> str:
    """How the columns, by the names that the format has for them, become those of it."""
    others = {ours: name for ours, name in columns.items() if name != ours}
    renamed = ", ".join(f"{name!r} to {ours!r}" for ours, name in others.items())
    pairs = ", ".join(f"{ours}: .{name}" for ours, name in others.items())
    old = ", ".join(f".{name}" for name in others.values())
    command = _command(row, path, f"del({old}) + {{{pairs}}}")
    return f"As rows of the format {format}: rename {renamed}{command}."


def _command(row: Mapping[str, Json], path: str, filter: str, endings: tuple[str, ...] = (".jsonl",)) -> str:
    """The command that does it, where a shell takes the names as they are."""
    can_run = path.endswith(endings) and all(key.isascii() and key.isidentifier() for key in row)
    return f" (jq -c '{filter}' {shlex.quote(path)} > renamed.jsonl)" if can_run else ""
