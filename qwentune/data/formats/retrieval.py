"""The `retrieval` format: `{"query", "positive", "negatives"?, "instruction"?}` for embedding and reranker."""

from __future__ import annotations

from qwentune.data.reading.faults import Faults, described
from qwentune.data.sample import Json, Retrieval, Source
from qwentune.errors import Problem

KEYS = ("query", "positive", "negatives", "instruction")


def parse(row: dict[str, Json], source: Source) -> Retrieval | list[Problem]:
    """The query and its texts, or what is wrong with the row."""
    faults = Faults(source)
    query = faults.text(row, "query", "query", required=True)
    positive = faults.text(row, "positive", "positive", required=True)
    instruction = faults.text(row, "instruction", "instruction")
    negatives: list[str] = []
    for i, text in enumerate(faults.listed(row, "negatives", "negatives")):
        if isinstance(text, str):
            negatives.append(text)
        else:
            faults.add(f"negatives[{i}] is {described(text)}", "A text is needed.")
    for key, text in (("query", query), ("positive", positive)):
        if text is not None and not text.strip():
            faults.add(f"{key} is empty", "Give its text, or leave the row out.")
    if positive is not None and positive in negatives:
        faults.add("the positive stands among the negatives", "Remove it there.")
    faults.misspelt(row, KEYS, (), "the row has ")
    return faults.problems or Retrieval(source, query or "", positive or "", tuple(negatives), instruction or "")
