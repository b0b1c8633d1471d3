"""The `chat` format: `{"messages": [...], "tools"?: [...]}`, as in the OpenAI and Hugging Face conventions."""

from __future__ import annotations

from qwentune.data.faults import Faults
from qwentune.data.normalise import check_dialogue, read_message, read_tools
from qwentune.data.sample import Conversation, Json, Source
from qwentune.errors import Problem

KEYS = ("messages", "tools")


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    faults = Faults(source)
    values = faults.listed(row, "messages", "messages", required=True)
    messages = [read_message(value, f"messages[{i}]", faults) for i, value in enumerate(values)]
    check_dialogue(messages, "messages", faults)
    tools = read_tools(row, faults)
    faults.misspelt(row, KEYS, (), "the row has ")
    faults.refuse_judged_bad(row)
    return faults.problems or Conversation(source, tuple(message for message in messages if message), tuple(tools))
