"""The row formats that a recipe can name. A new one is a line here and a file in `data/formats/`."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What is known of a format without reading a row.

    `signatures` are the sets of keys that its rows are recognised by, all keys of one of them. `has_turns` says
    whether its rows end turns; `is_trained`, whether there is an objective that trains them.
    """

    signatures: tuple[Set[str], ...]
    has_turns: bool = True
    is_trained: bool = True


# By the name of its file in data/formats/. The first whose signature fits a row counts, so a format stands before the
# others whose keys its own rows may have as well: rows with a text and more keys are no plain texts.
ROW_FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(({"chosen", "rejected"}, {"messages", "rejected_response"}), is_trained=False),
    "chat": RowFormat(({"messages"},)),
    "sharegpt": RowFormat(({"conversations"}, {"conversation"})),
    "instruction": RowFormat(({"instruction", "output"}, {"query", "response"})),
    "retrieval": RowFormat(({"query", "positive"},), is_trained=False),
    "fim": RowFormat(({"prefix", "suffix", "middle"}, {"repo", "files"}), has_turns=False),
    "text": RowFormat(({"text"},), has_turns=False),
}
