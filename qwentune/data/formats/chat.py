"""The `chat` format: `{"messages": [...], "tools"?: [...]}`, as in the OpenAI and Hugging Face conventions.

A logged request with its response, `{"messages": [...], "choices": [{"message": {...}}]}`, is the dialogue with its
answer, which alone is trained: earlier answers are trained where they were logged as such.
"""

from __future__ import annotations

from qwentune.data.formats.anthropic import unfolded, with_system_as_text
from qwentune.data.formats.fingerprints import answers_of
from qwentune.data.formats.normalise import as_context, check_dialogue, read_message, read_messages, read_tools
from qwentune.data.reading.faults import Faults, described
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

KEYS = ("messages", "tools", "system")
WHOLE = ("stop", "tool_calls", "function_call", None)  # why an answer ended that was not cut off


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    faults = Faults(source)
    row = with_system_as_text(row, faults)
    values = faults.listed(row, "messages", "messages", required=True)
    messages, places = read_messages(values, "messages", read_message, faults)
    if logged := _logged_answer(row, messages, faults):
        messages = [message and as_context(message) for message in messages] + logged
        places.append(len(values))
    check_dialogue(messages, "messages", faults)
    if system := faults.text(row, "system", "system"):
        if messages and messages[0] and messages[0].role == "system":
            faults.add("system stands both in the row and in its messages", "Keep one of them.")
        messages.insert(0, Message("system", system))
        places.insert(0, -1)
    tools = read_tools(row, faults)
    faults.misspelt(row, KEYS, (), "the row has ")
    faults.refuse_media(row)
    faults.refuse_judged_bad(row)
    if faults.problems:
        return faults.problems
    said = tuple(message for message in messages if message)
    return Conversation(source, said, tuple(tools), tuple(places), answers_of(said) if logged else ())


def _logged_answer(row: dict[str, Json], messages: list[Message | None], faults: Faults) -> list[Message | None]:
    """The one answer in the `choices` of a logged response; none where the row has no such choices."""
    given = row.get("choices")
    is_answered = bool(messages) and messages[-1] is not None and messages[-1].role == "assistant"
    may_be_answered = is_answered or (bool(messages) and messages[-1] is None)
    if may_be_answered and not _is_of_response(given):
        return []  # of a question in a test: its A to D
    choices = faults.listed(row, "choices", "choices")
    if is_answered and choices:
        faults.add("choices stands beside an answer in messages", "Keep one of them, or write both as messages.")
    elif len(choices) > 1:
        faults.add(f"choices has {len(choices)} answers", "Keep the one to be learnt.")
    elif choices:
        match choices[0]:
            case {"message": {"role": "assistant"} as message}:
                ended = choices[0].get("finish_reason")
                if ended in WHOLE:
                    path = "choices[0].message"
                    return [read_message(one, path, faults) for one in unfolded(message, path, faults)]
                fix = "The answer was cut off or filtered: leave the row out, or write the whole answer into messages."
                faults.add(f"choices[0].finish_reason is {described(ended)}", fix)
            case _:
                fix = 'It holds the answer as an object: {"message": {"role": "assistant", …}}.'
                faults.add(f"choices[0] is {described(choices[0])}", fix)
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
