"""The `chat` format: `{"messages": [...], "tools"?: [...]}`, as in the OpenAI and Hugging Face conventions.

A logged request with its response, `{"messages": [...], "choices": [{"message": {...}}]}`, is the dialogue with its
answer, which alone is trained: earlier answers are trained where they were logged as such.
"""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.formats.apis.anthropic import unfolded, with_system_as_text
from qwentune.data.formats.apis.fingerprints import answers_of
from qwentune.data.formats.messages.conversation import read_conversation
from qwentune.data.formats.messages.normalise import as_context, read_message, read_messages
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

WHOLE = ("stop", "tool_calls", "function_call", None)  # why an answer ended that was not cut off
_OF_A_CHOICE = frozenset(
    ("message", "finish_reason", "index", "logprobs", "stop_reason", "content_filter_results", "matched_stop")
)


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    reader = RowReader(source)
    row = with_system_as_text(row, reader)
    values = reader.read_list(row, "messages", required=True)
    messages, places = read_messages(values, "messages", read_message, reader)
    if logged := _logged_answer(row, messages, reader):
        messages = [message and as_context(message) for message in messages] + logged
        places.append(len(values))
    conversation = read_conversation(row, "chat", messages, places, "messages", reader)
    if logged and not isinstance(conversation, list):
        return replace(conversation, answers=answers_of(conversation.messages))
    return conversation


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
                    others = (key for key, value in choices[0].items() if key not in _OF_A_CHOICE and value is not None)
                    reader.leave_unread(others, "choices[0]")
                    path = "choices[0].message"
                    return [read_message(one, path, reader) for one in unfolded(message, path, reader)]
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
