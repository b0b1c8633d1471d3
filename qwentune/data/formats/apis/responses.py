"""What OpenAI's responses API has otherwise: the items of `input` and `output` become messages of the format chat.

Items of one answer, its reasoning, text and calls, are one message. Reasoning is read where its text stands there; a
summary or a cipher of it is not what was thought, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json

TEXTS = ("input_text", "output_text", "text", "reasoning_text")
OF_AN_ANSWER = ("reasoning", "function_call")
ITEM_KEYS = frozenset(  # read, or known to say nothing to a model
    (
        *("type", "role", "content", "name", "arguments", "call_id", "output", "id", "status", "phase"),
        *("summary", "encrypted_content"),
    )
)
PART_KEYS = frozenset(("type", "text", "annotations", "logprobs"))


def chat_request(body: Mapping[str, Json], path: str, reader: RowReader) -> dict[str, Json]:
    """The body of a request as that of chat completions."""
    for key in ("previous_response_id", "conversation"):
        if body.get(key):
            fix = "Log the whole input with each request, or leave the row out: what stood before it is not in the row."
            reader.refuse(f"{path} has {key}", fix)
    given = body.get("input")
    items: Sequence[Json] = [{"role": "user", "content": given}] if isinstance(given, str) else []
    if isinstance(given, list):
        items = given
    rest = {key: value for key, value in body.items() if key not in ("input", "instructions")}
    system: list[Json] = []
    if body.get("instructions"):
        system = [{"role": "system", "content": body["instructions"]}]
    return {**rest, "messages": [*system, *messages_of(items, f"{path}.input", reader)]}


def messages_of(items: Sequence[Json], path: str, reader: RowReader) -> list[Json]:
    """The messages that the items are, in order."""
    messages: list[Json] = []
    answer: dict[str, Json] | None = None  # the message to which items of an answer are added
    for i, item in enumerate(items):
        place = f"{path}[{i}]"
        if not isinstance(item, dict):
            reader.refuse(f"{place} is {described(item)}", "An item is an object with type or role.")
            continue
        reader.leave_unread((key for key, value in item.items() if key not in ITEM_KEYS and value is not None), place)
        kind = item.get("type", "message")
        is_answer = kind in OF_AN_ANSWER or (kind == "message" and item.get("role") == "assistant")
        if is_answer and answer is None:
            answer = {"role": "assistant", "content": ""}
            messages.append(answer)
        if not is_answer:
            answer = None
        match kind:
            case "message" if answer is not None:
                _say(answer, item, place, reader)
            case "message":
                content = _shown(item.get("content"), f"{place}.content", reader)
                messages.append({"role": item.get("role"), "content": content})
            case "reasoning" if answer is not None:
                if thoughts := _plain(item.get("content") or [], f"{place}.content", reader):
                    answer["reasoning_content"] = f"{answer.get('reasoning_content', '')}{thoughts}"
            case "function_call" if answer is not None:
                function = {key: item.get(key) for key in ("name", "arguments")}
                calls = answer.setdefault("tool_calls", [])
                assert isinstance(calls, list)
                calls.append({"id": item.get("call_id"), "type": "function", "function": function})
            case "function_call_output":
                content = _shown(item.get("output"), f"{place}.output", reader)
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            case _:
                reader.refuse(f"{place} is of the type {kind!r}", "No chat template shows it: leave the row out.")
    return messages


def _say(answer: dict[str, Json], item: Mapping[str, Json], path: str, reader: RowReader) -> None:
    """Adds what an item says to the answer that it is of."""
    if answer.get("tool_calls"):
        reader.refuse(f"{path} is a text after a call", "Chat templates write calls last: leave the row out.")
    match item.get("content"):
        case [{"type": "refusal", "refusal": refusal}]:
            answer["refusal"] = refusal
        case content:
            answer["content"] = f"{answer['content']}{_plain(content, f'{path}.content', reader)}"


def _shown(content: Json, path: str, reader: RowReader) -> Json:
    """The text of a content; its parts as those of chat completions where there are images among them."""
    parts = content if isinstance(content, list) else []
    if not any(isinstance(part, dict) and part.get("type") == "input_image" for part in parts):
        return _plain(content, path, reader)
    return [
        part
        if isinstance(part, dict) and part.get("type") == "input_image"
        else {"type": "text", "text": _plain([part], path, reader)}
        for part in parts
    ]


def _plain(content: Json, path: str, reader: RowReader) -> str:
    """The text of a content, or of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        reader.refuse(f"{path} is {described(content)}", "A text or a list of parts is needed.")
        return ""
    texts: list[str] = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") in TEXTS and isinstance(part.get("text"), str):
            texts.append(str(part["text"]))
            reader.leave_unread((key for key in part if key not in PART_KEYS), f"{path}[{i}]")
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            reader.refuse(f"{path}[{i}] is of the type {kind!r}", "Texts and images are read: leave the row out.")
    return "".join(texts)
