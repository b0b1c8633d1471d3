"""The `text` format: `{"text"}`, a document for continued pre-training."""

from __future__ import annotations

from qwentune.data.reading.loss import refuse_other_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json, Source, Text
from qwentune.errors import Problem
from qwentune.row_formats import ROW_FORMATS


def parse(row: dict[str, Json], source: Source) -> Text | list[Problem]:
    """The document, or what is wrong with it."""
    reader = RowReader(source)
    text = reader.read_text(row, "text", required=True)
    if text is not None and not text.strip():
        reader.refuse("text is empty", "Give the document's text, or leave the row out.")
    refuse_other_weight(row, reader)
    reader.leave_unread(reader.other_keys(row, ROW_FORMATS["text"].keys, "row"))
    return reader.problems or Text(source, text or "", tuple(reader.unread))
