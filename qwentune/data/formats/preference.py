"""The `preference` format: `{"prompt", "chosen", "rejected"}`, two ends of one dialogue.

Also read: `instruction` and `input`, `conversations` or `messages` in place of `prompt`; an end as one message or a
text; whole dialogues as ends; `messages` with a `rejected_response`.
"""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.formats.messages.calls import read_tools
from qwentune.data.formats.messages.conversation import read_system, read_template_args
from qwentune.data.formats.messages.normalise import read_messages
from qwentune.data.formats.messages.tags import with_media
from qwentune.data.formats.sharegpt import read_turn
from qwentune.data.reading.loss import refuse_other_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Conversation, Json, Message, Pair, Source
from qwentune.errors import Problem
from qwentune.row_formats import PREFERENCE, ROW_FORMATS

PROMPTS = ("prompt", "conversations", "messages")


def parse(row: dict[str, Json], source: Source) -> Pair | list[Problem]:
    """The two dialogues, of which only the ends would be trained; or what is wrong with the row."""
    reader = RowReader(source)
    prompt, read = _prompt(row, reader)
    if "rejected_response" in row and prompt:  # the last message is the answer preferred to it
        *prompt, last = prompt
        chosen, rejected = [last], _messages(row, "rejected_response", "assistant", reader)
        read = (*read, "rejected_response")
    else:
        chosen = _messages(row, "chosen", "assistant", reader)
        rejected = _messages(row, "rejected", "assistant", reader)
        read = (*read, "chosen", "rejected")
    system = read_system(row, [*prompt, *chosen, *rejected], reader)
    prompt = [*system, *prompt]
    (tools, _), args = read_tools(row, reader), read_template_args(row, reader)
    refuse_other_weight(row, reader)
    reader.leave_unread(key for key in PREFERENCE if key not in read and row.get(key) is not None)
    reader.leave_unread(reader.other_keys(row, ROW_FORMATS["preference"].keys, "row"))
    if not prompt:  # both ends are whole dialogues
        num_same = next((k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:num_same], chosen[num_same:], rejected[num_same:]
    ends = {"chosen": chosen, "rejected": rejected}
    for name, end in ends.items():
        if not reader.problems and not any(message.role == "assistant" for message in end):
            reader.refuse(f"{name} has no assistant message of its own", "Give the answer that is compared.")
    if not reader.problems and chosen == rejected:
        reader.refuse("chosen and rejected are the same", "Give two answers that differ, or leave the row out.")
    context = [replace(message, weight=0.0) for message in prompt]
    places = tuple(range(-len(system), len(context) + max(len(chosen), len(rejected))))
    said = [with_media(row, [*context, *end], reader) for end in ends.values() if not reader.problems]
    if reader.problems:
        return reader.problems
    whole = [Conversation(source, tuple(one), tuple(tools), places[: len(one)], args) for one in said]
    preferred = replace(whole[0], unread=tuple(reader.unread), offered=tuple(reader.offered))
    return Pair(source, preferred, whole[1])


def _prompt(row: dict[str, Json], reader: RowReader) -> tuple[list[Message], tuple[str, ...]]:
    """What both ends answer, and the keys of the row that say it."""
    for key in PROMPTS:
        if key in row:
            return _messages(row, key, "user", reader), (key,)
    keys = ("instruction", "input")
    texts = [text for key in keys if (text := reader.read_text(row, key))]
    return [Message("user", "\n".join(texts))] if texts else [], keys


def _messages(row: dict[str, Json], key: str, role: str, reader: RowReader) -> list[Message]:
    """The messages under `key`: a list of them, one alone, or a text said by `role`."""
    value = row.get(key)
    if isinstance(value, str) and not value.lstrip().startswith("[{"):  # as tables store a list
        return [Message(role, value)]
    if isinstance(value, dict):
        read = [read_turn(value, key, reader)]
    else:
        listed = reader.read_list(row, key, required=True)
        read, _ = read_messages(listed, key, read_turn, reader)
    return [message for message in read if message]
