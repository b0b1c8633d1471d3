"""What Anthropic's messages have otherwise: blocks of a content become messages of the format chat, tools too.

Read are text, thinking, tool_use and tool_result, and images of the user and of results. A chat template has one place
each for reasoning, text and calls, in that order; blocks in another order are refused, as are those whose meaning is
lost on the way: redacted thinking and whatever runs on Anthropic's own servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json

BLOCKS = {"thinking": "assistant", "redacted_thinking": "assistant", "tool_use": "assistant", "tool_result": "user"}
BLOCK_KEYS = frozenset(  # read, or known to say nothing to a model
    (
        *("type", "text", "thinking", "signature", "id", "name", "input", "tool_use_id", "content", "is_error"),
        *("cache_control", "citations", "caller"),
    )
)
TOOL_KEYS = frozenset(("name", "description", "input_schema", "type", "cache_control"))
ORDER = ("thinking", "text", "tool_use")  # of an assistant's message, as templates write it


def unfolded(value: Json, path: str, reader: RowReader) -> Sequence[Json]:
    """The message as those of the format chat that it stands for, in order; itself where it has no such blocks.

    Empty where a block cannot be read.
    """
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(content, list):
        return (value,)
    blocks = [block for block in content if isinstance(block, dict)]
    if BLOCKS.keys().isdisjoint(kind for block in blocks if isinstance(kind := block.get("type"), str)):
        return (value,)
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            reader.refuse(f"{path}.content[{i}] is {described(block)}", "A block is an object with a type.")
            return ()
    num_problems, role = len(reader.problems), value.get("role")
    for i, block in enumerate(blocks):
        _check(block, role, f"{path}.content[{i}]", reader)
    if role == "assistant":
        messages: Sequence[Json] = (_answer(value, blocks, path, reader),)
    else:
        messages = _results_and_texts(value, blocks, path, reader)
    return () if len(reader.problems) > num_problems else messages


def with_system_as_text(row: dict[str, Json], reader: RowReader) -> dict[str, Json]:
    """The row with the text of the blocks that its `system` is given as, one after the other as servers join them."""
    system = row.get("system")
    return {**row, "system": _joined(_result(system, "system", reader))} if isinstance(system, list) else row


def read_tool(tool: dict[str, Json], path: str, reader: RowReader) -> dict[str, Json]:
    """A tool with an `input_schema` as OpenAI's API has it; any other as it is."""
    if "input_schema" in tool:
        reader.leave_unread((key for key in tool if key not in TOOL_KEYS), path)
        function = {key: tool[key] for key in ("name", "description") if key in tool}
        return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
    if "function" in tool:
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and isinstance(tool.get("name"), str) and kind[-8:].isdigit():  # web_search_20250305
        reader.refuse(
            f"{path} is Anthropic's own tool {kind}, without a schema", "Give its schema, or leave the row out."
        )
    elif kind not in (None, "function") or not isinstance(tool.get("name"), str):
        what = f"of the type {kind!r}, without a function" if kind not in (None, "function") else "without a name"
        fix = 'A tool is {"type": "function", "function": {"name", "description", "parameters"}}, or the inner object.'
        reader.refuse(f"{path} is {what}", fix)
    elif kind == "function":  # OpenAI's responses API
        return {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
    return tool


def _check(block: Mapping[str, Json], role: Json, path: str, reader: RowReader) -> None:
    """Notes what keeps a block from being read."""
    kind = block.get("type")
    if kind == "redacted_thinking" or (kind == "thinking" and block.get("thinking") == ""):
        what = "redacted thinking" if kind == "redacted_thinking" else "thinking without its text"
        fix = "Leave the row out: its answer rests on reasoning that nobody can read."
        reader.refuse(f"{path} is {what}", fix)
    elif kind == "image" and role != "assistant":
        pass  # of a content's parts, which read it
    elif isinstance(kind, str) and (kind == "text" or kind in BLOCKS):
        if others := [key for key in block if key not in BLOCK_KEYS]:
            reader.leave_unread(others, path)
        if kind in BLOCKS and role != BLOCKS[kind]:
            reader.refuse(f"{path} is a {kind} block, but its role is {role!r}", f"Only the {BLOCKS[kind]} has it.")
        if kind in ("text", "thinking"):
            reader.read_text(block, kind, f"{path}.{kind}", required=True)
        if kind == "tool_use" and not (isinstance(block.get("name"), str) and block.get("name")):
            reader.refuse(f"{path} has no name", "Name the tool called.")
        if kind == "tool_result" and block.get("is_error") and not block.get("content"):
            fix = "Give the text of the error: a chat template has no other place for it."
            reader.refuse(f"{path} is an error without a text", fix)
    else:
        reader.refuse(f"{path} is of the type {kind!r}", "Texts and the user's images are read: leave the row out.")


def _answer(value: dict[str, Json], blocks: Sequence[dict[str, Json]], path: str, reader: RowReader) -> Json:
    """An assistant's message: its reasoning, its text and its calls."""
    kinds = [kind for block in blocks if isinstance(kind := block.get("type"), str) and kind in ORDER]
    for before, kind in pairwise(kinds):
        if ORDER.index(kind) < ORDER.index(before):
            fix = "Chat templates write reasoning, text and calls, in this order: split the message, or leave it out."
            reader.refuse(f"{path}.content has a {kind} block after a {before} block", fix)
            break
    thoughts = [str(block.get("thinking")) for block in blocks if block.get("type") == "thinking"]
    calls: list[Json] = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {"name": block.get("name"), "arguments": block.get("input")},
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    message = {**value, "content": _text([block for block in blocks if block.get("type") == "text"])}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _results_and_texts(
    value: dict[str, Json], blocks: Sequence[dict[str, Json]], path: str, reader: RowReader
) -> Sequence[Json]:
    """A user's message in parts: each result as a message of the tool, texts between them as the user's."""
    messages: list[Json] = []
    texts: list[dict[str, Json]] = []
    for i, block in enumerate([*blocks, None]):
        if block is not None and block.get("type") in ("text", "image"):
            texts.append(block)
            continue
        if texts:
            messages.append({**value, "content": _text(texts)})
            texts = []
        if block is not None and block.get("type") == "tool_result":
            content = _result(block.get("content"), f"{path}.content[{i}].content", reader)
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
    return messages


def _result(content: Json, path: str, reader: RowReader) -> Json:
    """The text of a result, or its text parts; whether it is an error, its text says: templates know no other way."""
    if not isinstance(content, list):
        return "" if content is None else content
    texts: list[dict[str, Json]] = []
    for i, block in enumerate(content):
        if isinstance(block, dict) and block.get("type") == "image":
            texts.append(block)
        elif isinstance(block, dict) and block.get("type") == "text":
            texts.append(block)
            reader.leave_unread((key for key in block if key not in BLOCK_KEYS), path)
        else:
            kind = block.get("type") if isinstance(block, dict) else block
            reader.refuse(f"{path}[{i}] is of the type {kind!r}", "Texts and images are read: leave the row out.")
    return _text(texts)


def _joined(content: Json) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def _text(blocks: Sequence[dict[str, Json]]) -> Json:
    """The one text, or the parts where there are several; what else a block has, such as citations, says nothing."""
    if not blocks or (len(blocks) == 1 and blocks[0].get("type") == "text"):
        return blocks[0].get("text") if blocks else ""
    return [block if block["type"] != "text" else {"type": "text", "text": block.get("text")} for block in blocks]
