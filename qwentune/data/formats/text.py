"""The `text` format: `{"text"}`, a document for continued pre-training."""

from __future__ import annotations

from qwentune.data.reading.faults import Faults
from qwentune.data.sample import Json, Source, Text
from qwentune.errors import Problem


def parse(row: dict[str, Json], source: Source) -> Text | list[Problem]:
    """The document, or what is wrong with it."""
    faults = Faults(source)
    text = faults.text(row, "text", "text", required=True)
    if text is not None and not text.strip():
        faults.add("text is empty", "Give the document's text, or leave the row out.")
    return faults.problems or Text(source, text or "")
