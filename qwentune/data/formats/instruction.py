"""The `instruction` format: `{"instruction", "input"?, "output", "system"?, "history"?, "tools"?}`.

`query` and `response`, ms-swift's names, are read as `instruction` and `output`.
"""

from __future__ import annotations

from qwentune.data.formats.messages.conversation import read_conversation
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

NAMES = (("instruction", "output"), ("query", "response"))  # of the question and of its answer


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue: system text, earlier exchanges, the instruction with its input below, and the output."""
    reader = RowReader(source)
    names, others = NAMES if "instruction" in row or "query" not in row else reversed(NAMES)
    reader.leave_unread(key for key in others if row.get(key) is not None)
    question, answer = (reader.read_text(row, key, required=True) or "" for key in names)
    if details := reader.read_text(row, "input"):
        question = f"{question}\n{details}"
    messages = [*_read_history(row, reader), Message("user", question), Message("assistant", answer)]
    return read_conversation(row, "instruction", messages, range(len(messages)), "messages", reader)


def _read_history(row: dict[str, Json], reader: RowReader) -> list[Message]:
    """The exchanges before the instruction."""
    messages: list[Message] = []
    for i, exchange in enumerate(reader.read_list(row, "history")):
        match exchange:
            case [str(question), str(answer)]:
                messages += [Message("user", question), Message("assistant", answer)]
            case _:
                reader.refuse(f"history[{i}] is {described(exchange)}", "It is a list of a question and its answer.")
    return messages
