"""The `chat` format: `{"messages": [...], "tools"?: [...]}`, as in the OpenAI and Hugging Face conventions.

A logged request with its response, `{"messages": [...], "choices": [{"message": {...}}]}`, is the dialogue with its
answer.
"""

from __future__ import annotations

from qwentune.data.formats.conversation import read_conversation
from qwentune.data.formats.normalise import read_message, read_messages
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

WHOLE = ("stop", "tool_calls", "function_call", None)  # why an answer ended that was not cut off


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    reader = RowReader(source)
    values = reader.read_list(row, "messages", required=True)
    messages, places = read_messages(values, "messages", read_message, reader)
    if logged := _logged_answer(row, messages, reader):
        messages += logged
        places.append(len(values))
    return read_conversation(row, "chat", messages, places, "messages", reader)


def _logged_answer(row: dict[str, Json], messages: list[Message | None], reader: RowReader) -> list[Message | None]:
    """The one answer in the `choices` of a logged response; none where the row has no such choices."""
    given = row.get("choices")
    is_answered = bool(messages) and messages[-1] is not None and messages[-1].role == "assistant"
    may_be_answered = is_answered or (bool(messages) and messages[-1] is None)
    if may_be_answered and not _is_of_response(given):
        reader.leave_unread(["choices"] if given else [])  # of a question in a test: its A to D
        return []
    choices = reader.read_list(row, "choices")
    if is_answered and choices:
        reader.refuse("choices stands beside an answer in messages", "Keep one of them, or write both as messages.")
    elif len(choices) > 1:
        reader.refuse(f"choices has {len(choices)} answers", "Keep the one to be learnt.")
    elif choices:
        match choices[0]:
            case {"message": {"role": "assistant"} as message}:
                ended = choices[0].get("finish_reason")
                if ended in WHOLE:
                    return [read_message(message, "choices[0].message", reader)]
                fix = "The answer was cut off or filtered: leave the row out, or write the whole answer into messages."
                reader.refuse(f"choices[0].finish_reason is {described(ended)}", fix)
            case _:
                fix = 'It holds the answer as an object: {"message": {"role": "assistant", …}}.'
                reader.refuse(f"choices[0] is {described(choices[0])}", fix)
    return []


def _is_of_response(choices: Json) -> bool:
    """Whether these are, or a text of JSON holds, choices as servers log them."""
    if isinstance(choices, str):
        try:
            choices = parse_json(choices)
        except JsonFaultError:
            return False
    listed = choices if isinstance(choices, list) else []
    return any(isinstance(one, dict) and not one.keys().isdisjoint(("message", "finish_reason")) for one in listed)
