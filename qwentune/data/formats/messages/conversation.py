"""A dialogue as its row gives it: the messages, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qwentune.data.formats.messages.calls import read_tools
from qwentune.data.formats.messages.tags import with_media
from qwentune.data.reading.faults import described
from qwentune.data.reading.loss import read_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Conversation, Json, Message, Offered
from qwentune.errors import Problem
from qwentune.row_formats import ROW_FORMATS

# Arguments of the template that the walk itself gives.
_GIVEN_ANYWAY = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


def read_conversation(
    row: Mapping[str, Json],
    format: str,
    messages: Sequence[Message | None],
    places: Sequence[int],
    key: str,
    reader: RowReader,
) -> Conversation | list[Problem]:
    """The dialogue of the messages under `key`, or everything that is wrong with the row.

    Beside them may stand a system text, tools, arguments for the template, and how much of the row's loss counts.
    `places` are those of the messages among the turns of the row.
    """
    _refuse_untrained(messages, key, reader)
    system = read_system(row, messages, reader)
    tools = read_tools(row, reader)
    args = read_template_args(row, reader)
    weight = read_weight(row, "", reader)
    reader.leave_unread(reader.other_keys(row, ROW_FORMATS[format].keys, "row"))
    if reader.problems:
        return reader.problems
    said = [message for message in messages if message]
    if weight != 1:
        said = [replace(message, weight=weight * message.weight) for message in said]
    said = with_media(row, system + said, reader)
    if reader.problems:
        return reader.problems
    return Conversation(
        reader.source,
        tuple(said),
        tuple(tools),
        (*[-1] * len(system), *places),
        args,
        tuple(reader.unread),
        tuple(reader.offered),
    )


def read_system(row: Mapping[str, Json], messages: Sequence[Message | None], reader: RowReader) -> list[Message]:
    """The system text beside the messages, as the message before them."""
    text = reader.read_text(row, "system")
    if text and any(message and message.role == "system" for message in messages):
        reader.refuse("system stands both in the row and among its messages", "Keep one of them.")
    return [Message("system", text)] if text else []


def read_template_args(row: Mapping[str, Json], reader: RowReader) -> dict[str, Json]:
    """The arguments that the row gives to the chat template; `enable_thinking` may stand in the row itself."""
    args: dict[str, Json] = {}
    given, path = row.get("chat_template_kwargs"), "chat_template_kwargs"
    if isinstance(given, str) and given:
        given = reader.read_json(given, path)
    if isinstance(given, dict):
        args = {key: value for key, value in given.items() if value is not None}
    elif given not in (None, "", []):
        reader.refuse(f"{path} is {described(given)}", "It is an object of arguments by name.")
    for key, value in args.items():
        if key in _GIVEN_ANYWAY:
            reader.refuse(f"{path} has {key}", "The messages and their place in the dialogue decide it: leave it out.")
        elif isinstance(value, list | dict) or (isinstance(value, str) and "|" in value):
            reader.refuse(f"{path}.{key} is {described(value)}", "Give a text without '|', a number, true or false.")
    reader.offer(args, "argument", path)
    thinking = row.get("enable_thinking")
    if thinking is not None:
        if args.setdefault("enable_thinking", thinking) != thinking:
            reader.refuse(f"the row has enable_thinking and {path}.enable_thinking, which differ", "Keep one of them.")
        reader.offered.append(Offered("argument", "enable_thinking", "enable_thinking"))
    if not isinstance(args.get("enable_thinking", True), bool):
        reader.refuse(f"enable_thinking is {described(args['enable_thinking'])}", "It is true or false.")
    return args


def _refuse_untrained(messages: Sequence[Message | None], key: str, reader: RowReader) -> None:
    """Refuse a dialogue without an answer; silent where a message is wrong, for it might have been the answer."""
    if reader.problems:
        return
    if not messages:
        reader.refuse(f"{key} is empty", "Give at least a user and an assistant message.")
    elif not any(message and message.role == "assistant" for message in messages):
        reader.refuse(f"{key} has no assistant message", "Only what the assistant says is trained.")
