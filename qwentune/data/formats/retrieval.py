"""The `retrieval` format: `{"query", "positive", "negatives"?, "instruction"?}` for embedding and reranker."""

from __future__ import annotations

from qwentune.data.reading.faults import described
from qwentune.data.reading.loss import refuse_other_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json, Retrieval, Source
from qwentune.errors import Problem
from qwentune.row_formats import ROW_FORMATS


def parse(row: dict[str, Json], source: Source) -> Retrieval | list[Problem]:
    """The query and its texts, or what is wrong with the row."""
    reader = RowReader(source)
    query = reader.read_text(row, "query", required=True)
    positive = reader.read_text(row, "positive", required=True)
    instruction = reader.read_text(row, "instruction")
    negatives: list[str] = []
    for i, text in enumerate(reader.read_list(row, "negatives")):
        if isinstance(text, str):
            negatives.append(text)
        else:
            reader.refuse(f"negatives[{i}] is {described(text)}", "A text is needed.")
    for key, text in (("query", query), ("positive", positive)):
        if text is not None and not text.strip():
            reader.refuse(f"{key} is empty", "Give its text, or leave the row out.")
    if positive is not None and positive in negatives:
        reader.refuse("the positive stands among the negatives", "Remove it there.")
    refuse_other_weight(row, reader)
    reader.leave_unread(reader.other_keys(row, ROW_FORMATS["retrieval"].keys, "row"))
    unread = tuple(reader.unread)
    return reader.problems or Retrieval(
        source, query or "", positive or "", tuple(negatives), instruction or "", unread
    )
