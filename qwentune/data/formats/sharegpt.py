"""The `sharegpt` format: `{"conversations": [{"from", "value"}], "system"?, "tools"?}`.

Turns with role and content are read as those of the format chat; `conversation` as a list of pairs
`{"human", "assistant"}`, as ms-swift writes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.data.formats.normalise import CALLERS, check_dialogue, read_message, read_messages, read_tools
from qwentune.data.reading.faults import Faults, described
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem, nearest

KEYS = ("conversations", "conversation", "system", "tools")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue, or everything that is wrong with the row."""
    faults = Faults(source)
    key = "conversation" if "conversation" in row and "conversations" not in row else "conversations"
    turns = _spoken(faults.listed(row, key, key, required=True))
    messages, places = read_messages(turns, key, read_turn, faults)
    check_dialogue(messages, key, faults)
    system = faults.text(row, "system", "system")
    if system:
        if messages and messages[0] and messages[0].role == "system":
            faults.add("system stands both in the row and in its conversations", "Keep one of them.")
        messages.insert(0, Message("system", system))
        places.insert(0, -1)
    tools = read_tools(row, faults)
    faults.misspelt(row, KEYS, (), "the row has ")
    faults.refuse_media(row)
    faults.refuse_judged_bad(row)
    if faults.problems:
        return faults.problems
    return Conversation(source, tuple(message for message in messages if message), tuple(tools), tuple(places))


def _spoken(turns: list[Json]) -> list[Json]:
    """The turns one by one, where the row gives them as pairs of a question and its answer."""
    spoken: list[Json] = []
    for turn in turns:
        if isinstance(turn, dict) and turn.keys() == {"human", "assistant"}:
            spoken += [{"from": speaker, "value": turn[speaker]} for speaker in ("human", "assistant")]
        else:
            spoken.append(turn)
    return spoken


def read_turn(turn: Json, path: str, faults: Faults) -> Message | None:
    """One turn, `{"from", "value"}` or a message of the format chat; None where something is wrong with it."""
    if not isinstance(turn, dict):
        faults.add(f"{path} is {described(turn)}", "A turn is an object with from and value.")
        return None
    speaker = turn.get("from")
    if speaker is None and "role" in turn:
        return read_message(turn, path, faults)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        hint = nearest(speaker.lower(), SPEAKERS).strip() if isinstance(speaker, str) else ""
        faults.add(f"{path}.from is {described(speaker)}", hint or f"It is one of {', '.join(SPEAKERS)}.")
    fields: dict[str, Json] = {key: item for key, item in turn.items() if key not in ("from", "value")}
    message = {**fields, "role": SPEAKERS.get(speaker) if isinstance(speaker, str) else None}
    if speaker in CALLERS:
        calls = _read_calls(turn, f"{path}.value", faults)
        message |= {"content": "" if calls else None, "tool_calls": calls}
    else:
        message["content"] = faults.text(turn, "value", f"{path}.value", required=True)
    # What is wrong so far was said in the words of this format; the same fault in those of chat would only confuse.
    if message["role"] is None or message["content"] is None:
        return None
    return read_message(message, path, faults)


def _read_calls(turn: Mapping[str, Json], path: str, faults: Faults) -> list[Json]:
    """The tool calls of a turn, one or a list of them, as a value or as a text of JSON; [] where that is wrong."""
    value = turn.get("value")
    if isinstance(value, str):
        value = faults.parsed(value, path)
        if value is None:  # and said so
            return []
    if value is None or value == []:
        faults.add(f"{path} is {described(value) if 'value' in turn else 'missing'}", "A tool call is needed.")
        return []
    return value if isinstance(value, list) else [value]
