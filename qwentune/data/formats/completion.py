"""The `completion` format: `{"prompt", "completion"}`, two texts or two lists of messages, as TRL documents them.

Texts are trained as they are, the completion after the prompt, without a chat template: what a server makes of a plain
completion request. Messages are a dialogue, of which those of the completion are trained.
"""

from __future__ import annotations

from qwentune.data.formats.messages.conversation import read_conversation
from qwentune.data.formats.messages.normalise import as_context, read_message, read_messages
from qwentune.data.reading.loss import refuse_other_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Completion, Conversation, Json, Message, Source
from qwentune.errors import Problem
from qwentune.row_formats import LOSS

KEYS_OF_TEXTS = frozenset(("prompt", "completion", *LOSS))


def parse(row: dict[str, Json], source: Source) -> Completion | Conversation | list[Problem]:
    """The prompt and what follows it, or everything that is wrong with the row."""
    reader = RowReader(source)
    if not any(_holds_messages(row.get(key)) for key in ("prompt", "completion")):
        return _texts(row, reader)
    prompt, places = _messages(row, "prompt", "user", reader)
    ends, places_of_ends = _messages(row, "completion", "assistant", reader)
    if not any(message is None or message.role == "assistant" for message in ends) and not reader.problems:
        reader.refuse("completion has no assistant message", "Only what the assistant says is trained.")
    messages = [*(message and as_context(message) for message in prompt), *ends]
    places += [len(prompt) + place for place in places_of_ends]
    return read_conversation(row, "completion", messages, places, "completion", reader)


def _texts(row: dict[str, Json], reader: RowReader) -> Completion | list[Problem]:
    prompt = reader.read_text(row, "prompt", required=True)
    completion = reader.read_text(row, "completion", required=True)
    if completion is not None and not completion.strip():
        reader.refuse("completion is empty", "Give its text, or leave the row out.")
    refuse_other_weight(row, reader)
    reader.leave_unread(reader.other_keys(row, KEYS_OF_TEXTS, "row"))
    return reader.problems or Completion(reader.source, prompt or "", completion or "", tuple(reader.unread))


def _holds_messages(value: Json) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def _messages(row: dict[str, Json], key: str, role: str, reader: RowReader) -> tuple[list[Message | None], list[int]]:
    """The messages under `key` with their places: a list of them, one alone, or a text said by `role`."""
    match row.get(key):
        case str() as text if not _holds_messages(text):
            return [Message(role, text)], [0]
        case dict() as message:
            return [read_message(message, key, reader)], [0]
        case _:
            return read_messages(reader.read_list(row, key, required=True), key, read_message, reader)
