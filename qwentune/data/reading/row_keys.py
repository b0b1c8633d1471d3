"""Keys of rows and messages that nothing reads: which are refused, and which are known to say nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal

from qwentune.data.sample import Json
from qwentune.row_formats import MEDIA

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
    )
)


@lru_cache(maxsize=4096)
def meant(key: str, known: frozenset[str]) -> str | None:
    """The known key that this one is nearly; None where it is a key of its own."""
    if len(key) > LONGEST_MISSPELT or key in SAY_NOTHING:
        return None
    return next(iter(get_close_matches(key, known, n=1, cutoff=0.8)), None)
