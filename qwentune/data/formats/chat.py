"""The `chat` format: `{"messages": [...], "tools"?: [...]}`, as in the OpenAI and Hugging Face conventions."""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.faults import Faults
from qwentune.data.normalise import check_dialogue, read_message, read_tools
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

KEYS = ("messages", "tools")


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    faults = Faults(source)
    values = faults.listed(row, "messages", "messages", required=True)
    messages: list[Message | None] = []
    for i, value in enumerate(values):
        message = read_message(value, f"messages[{i}]", faults)
        before = messages[-1] if messages else None
        if i and _is_call(value) and _is_call(values[i - 1]) and message and before and message.weight == before.weight:
            messages[-1] = replace(before, tool_calls=before.tool_calls + message.tool_calls)
        else:
            messages.append(message)
    check_dialogue(messages, "messages", faults)
    tools = read_tools(row, faults)
    faults.misspelt(row, KEYS, (), "the row has ")
    faults.refuse_media(row)
    faults.refuse_judged_bad(row)
    return faults.problems or Conversation(source, tuple(message for message in messages if message), tuple(tools))


def _is_call(value: Json) -> bool:
    """Whether this is one call in a message of its own: of ms-swift, where several in a row are parallel."""
    return isinstance(value, dict) and value.get("role") == "tool_call"
