"""The `sharegpt` format: `{"conversations": [{"from", "value"}], "system"?, "tools"?}`.

Turns with role and content are read as those of the format chat; `conversation` as a list of pairs
`{"human", "assistant"}`, as ms-swift writes it.
"""

from __future__ import annotations

from qwentune.data.formats.messages.calls import CALLERS, read_only_calls
from qwentune.data.formats.messages.conversation import read_conversation
from qwentune.data.formats.messages.normalise import read_message, read_messages
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem, nearest
from qwentune.row_formats import SPEAKERS


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    reader = RowReader(source)
    key = "conversation" if "conversation" in row and "conversations" not in row else "conversations"
    turns = _spoken(reader.read_list(row, key, required=True))
    messages, places = read_messages(turns, key, read_turn, reader)
    if key == "conversations" and row.get("conversation") is not None:
        reader.leave_unread(["conversation"])
    return read_conversation(row, "sharegpt", messages, places, key, reader)


def _spoken(turns: list[Json]) -> list[Json]:
    """The turns one by one, where the row gives them as pairs of a question and its answer."""
    spoken: list[Json] = []
    for turn in turns:
        if isinstance(turn, dict) and turn.keys() == {"human", "assistant"}:
            spoken += [{"from": speaker, "value": turn[speaker]} for speaker in ("human", "assistant")]
        else:
            spoken.append(turn)
    return spoken


def read_turn(turn: Json, path: str, reader: RowReader) -> Message | None:
    """One turn, `{"from", "value"}` or a message of the format chat; None where something is wrong with it."""
    if not isinstance(turn, dict):
        reader.refuse(f"{path} is {described(turn)}", "A turn is an object with from and value.")
        return None
    speaker = turn.get("from")
    if speaker is None and "role" in turn:
        return read_message(turn, path, reader)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        hint = nearest(speaker.lower(), SPEAKERS).strip() if isinstance(speaker, str) else ""
        reader.refuse(f"{path}.from is {described(speaker)}", hint or f"It is one of {', '.join(SPEAKERS)}.")
    fields: dict[str, Json] = {key: item for key, item in turn.items() if key not in ("from", "value")}
    message = {**fields, "role": SPEAKERS.get(speaker) if isinstance(speaker, str) else None}
    if speaker in CALLERS:
        calls, reasoning = read_only_calls(turn.get("value"), f"{path}.value", reader)
        message |= {"content": "" if calls else None, "tool_calls": calls}
        if reasoning:
            message["reasoning_content"] = reasoning
    else:
        message["content"] = reader.read_text(turn, "value", f"{path}.value", required=True)
    # What is wrong so far was said in the words of this format; the same fault in those of chat would only confuse.
    if message["role"] is None or message["content"] is None:
        return None
    return read_message(message, path, reader)
