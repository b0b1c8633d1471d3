"""Keys of rows and messages that nothing reads: which are refused, and which are known to say nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal

from qwentune.data.sample import Json
from qwentune.row_formats import MEDIA, MESSAGES

LONGEST_MISSPELT = 40  # characters: no key that is read has half as many

Holder = Literal["row", "message"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Keys that would change what is trained or shown, and that nothing here carries out.

    `of` says where they are refused, `when` of which values, `what` what such a row or message has.
    """

    keys: tuple[str, ...]
    of: tuple[Holder, ...]
    when: Callable[[Json], bool]
    what: str
    mend: str


def _is_false(value: Json) -> bool:
    return value is False


def _is_given(value: Json) -> bool:
    return value is not None


# In data_templates/README.md for the user. A misspelt key that is read otherwise is refused as well.
REFUSALS = (
    Refusal(
        MEDIA,
        ("row", "message"),
        bool,
        "{key}",
        "Media belong to dialogues: name them in parts of a content, or beside the messages.",
    ),
    Refusal(
        ("objects",),
        ("row", "message"),
        bool,
        "{key}",
        "Boxes and points are trained as the text says them: write them there, and remove the key.",
    ),
    Refusal(
        ("label", "kto_tag"),
        ("row",),
        _is_false,
        "{key} false: its answer was judged bad",
        "Leave the row out, or remove the key.",
    ),
    Refusal(("loss_weight", "loss_scale"), ("row", "message"), _is_given, "the unknown key {key!r}", "Use 'weight'."),
    Refusal(
        ("train_detail",),
        ("message",),
        bool,
        "{key}: parts of a text cannot be trained apart",
        "Switch whole messages with 'train'.",
    ),
)
REFUSED: dict[Holder, dict[str, Refusal]] = {
    "row": {key: refusal for refusal in REFUSALS if "row" in refusal.of for key in refusal.keys},
    "message": {key: refusal for refusal in REFUSALS if "message" in refusal.of for key in refusal.keys},
}
# Of rows and of messages: they are counted as unread like all others, but deserve no warning.
SAY_NOTHING = frozenset(
    (
        *("id", "_id", "idx", "index", "uid", "uuid", "hash", "key", "row_id", "sample_id", "conversation_id"),
        *("source", "dataset", "dataset_name", "data_source", "origin", "url", "license", "split", "version"),
        *("metadata", "meta", "extra_info", "category", "domain", "topic", "task", "language", "lang", "difficulty"),
        *("timestamp", "created", "created_at", "date", "time", "model", "usage", "object", "num_turns", "quality"),
        *("name", "tool_call_id", "type", "score", "extra"),
        *("headers", "status", "status_code", "method", "custom_id", "request_id", "endpoint", "latency", "duration"),
        "enable_thinking",  # where it contradicts a template that does not read it, that is said in its own words
    )
)
# What a key that nothing reads seems to be, by a word of it.
LOOKALIKES: dict[Holder, dict[str, tuple[str, ...]]] = {
    "row": {
        "tools": ("tool", "tools", "function", "functions", "api", "apis"),
        "system": ("system", "sys", "persona"),
        "train": ("train", "trainable", "mask", "loss", "ignore"),
        "enable_thinking": ("think", "thinking"),
    },
    "message": {
        "reasoning_content": ("reasoning", "thinking", "thinks", "thought", "thoughts", "cot", "rationale"),
        "tool_calls": ("tool", "tools", "function", "functions", "call", "calls"),
        "train": ("train", "trainable", "mask", "loss", "ignore"),
    },
}
# Words of keys that count or name what is elsewhere.
_ABOUT = frozenset(
    (
        *("id", "ids", "num", "n", "count", "counts", "name", "names", "len", "length", "tokens", "time", "hash"),
        *("choice", "parallel", "version", "source", "score", "effort", "model", "has", "is"),
    )
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def seems(path: str) -> tuple[str, str] | None:
    """The key that one at this path seems to be, and how its source says so; None where it seems to be none.

    `path` is that of a row (`available_tools`), or of a message in it (`messages[].thought`).
    """
    holder, _, key = path.rpartition(".")
    words = {word.lower() for word in _WORD.findall(key)}
    ours = LOOKALIKES["message" if holder.endswith("[]") else "row"]
    found = next((name for name, signs in ours.items() if words.intersection(signs)), None)
    if found is None or words & _ABOUT or (holder and holder.removesuffix("[]") not in MESSAGES):
        return None
    return found, f"{'tags' if holder else 'columns'}: {{{found}: {key}}}"


@lru_cache(maxsize=4096)
def meant(key: str, known: frozenset[str]) -> str | None:
    """The known key that this one is nearly; None where it is a key of its own."""
    if len(key) > LONGEST_MISSPELT or key in SAY_NOTHING:
        return None
    return next(iter(get_close_matches(key, known, n=1, cutoff=0.8)), None)
