"""What to do with rows whose format is not recognised: how columns would be renamed, joined or taken out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from qwentune.data.formats import format_of
from qwentune.data.sample import Json
from qwentune.recipe.syntax import resolve

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
        return _renamed("request", {"request": holders["messages"], "response": holders["choices"]}, path)
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


def renaming(row: Mapping[str, Json]) -> tuple[str, dict[str, str]] | None:
    """The likeliest format of a row whose columns bear other names, and those names by ours; None: there is none."""
    for format, kind, columns in OTHER_NAMES:
        lowered = {key.lower(): key for key, value in row.items() if isinstance(value, kind | str)}
        found = {ours: [lowered[name] for name in (ours, *names) if name in lowered] for ours, names in columns.items()}
        if all(found.values()):
            return format, {ours: names[0] for ours, names in found.items() if names[0] != ours}
    return None


def _renaming(row: Mapping[str, Json], path: str) -> str:
    found = renaming(row)
    return _renamed(*found, path) if found else ""


def _renamed(format: str, columns: Mapping[str, str], path: str) -> str:
    """How columns become those that the format has, by our names for theirs."""
    renamed = ", ".join(f"{theirs!r} to {ours!r}" for ours, theirs in columns.items())
    names = ", ".join(f"{ours}: {_scalar(theirs)}" for ours, theirs in columns.items())
    source = f"{{path: {_scalar(path)}, columns: {{{names}}}}}"
    return f"As rows of the format {format}: rename {renamed}, in the recipe by `data: {{train: [{source}]}}`."


def _scalar(text: str) -> str:
    """A text as YAML takes it inside braces."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w./-]*", text) and isinstance(resolve(text), str)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _command(row: Mapping[str, Json], path: str, filter: str, endings: tuple[str, ...] = (".jsonl",)) -> str:
    """The command that does it, where a shell takes the names as they are."""
    can_run = path.endswith(endings) and all(key.isascii() and key.isidentifier() for key in row)
    return f" (jq -c '{filter}' {shlex.quote(path)} > renamed.jsonl)" if can_run else ""
