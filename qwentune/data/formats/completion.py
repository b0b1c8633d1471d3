"""The `completion` format: `{"prompt", "completion"}`, two texts or two lists of messages, as TRL documents them.

Texts are trained as they are, the completion after the prompt, without a chat template: what a server makes of a plain
completion request. Messages are a dialogue, of which those of the completion are trained.
"""

from __future__ import annotations

from qwentune.data.formats.normalise import as_context, check_dialogue, read_message, read_messages, read_tools
from qwentune.data.reading.faults import Faults
from qwentune.data.sample import Completion, Conversation, Json, Message, Source
from qwentune.errors import Problem

KEYS = ("prompt", "completion", "tools")


def parse(row: dict[str, Json], source: Source) -> Completion | Conversation | list[Problem]:
    """The prompt and what follows it, or everything that is wrong with the row."""
    faults = Faults(source)
    faults.misspelt(row, KEYS, (), "the row has ")
    faults.refuse_media(row)
    faults.refuse_judged_bad(row)
    if not any(_holds_messages(row.get(key)) for key in ("prompt", "completion")):
        prompt = faults.text(row, "prompt", "prompt", required=True)
        completion = faults.text(row, "completion", "completion", required=True)
        if completion is not None and not completion.strip():
            faults.add("completion is empty", "Give its text, or leave the row out.")
        return faults.problems or Completion(source, prompt or "", completion or "")
    prompt, places = _messages(row, "prompt", "user", faults)
    ends, places_of_ends = _messages(row, "completion", "assistant", faults)
    check_dialogue(ends, "completion", faults)
    tools = tuple(read_tools(row, faults))
    if faults.problems:
        return faults.problems
    messages = (*(as_context(one) for one in prompt if one), *(one for one in ends if one))
    return Conversation(source, messages, tools, (*places, *(len(prompt) + place for place in places_of_ends)))


def _holds_messages(value: Json) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def _messages(row: dict[str, Json], key: str, role: str, faults: Faults) -> tuple[list[Message | None], list[int]]:
    """The messages under `key` with their places: a list of them, one alone, or a text said by `role`."""
    match row.get(key):
        case str() as text if not _holds_messages(text):
            return [Message(role, text)], [0]
        case dict() as message:
            return [read_message(message, key, faults)], [0]
        case _:
            pass
    return read_messages(faults.listed(row, key, key, required=True), key, read_message, faults)
