"""Messages of a row as inference servers pass them to a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qwentune.data.formats.apis.anthropic import unfolded
from qwentune.data.formats.messages.calls import CALLERS, read_calls, read_only_calls
from qwentune.data.formats.messages.parts import packed_parts, read_parts, with_unpacked_contents
from qwentune.data.reading.faults import described
from qwentune.data.reading.loss import read_weight, refuse_loss
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json, Medium, Message
from qwentune.errors import nearest
from qwentune.row_formats import LOSS

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    **dict.fromkeys(CALLERS, "assistant"),
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = frozenset(("role", "content", *REASONING_KEYS, "tool_calls", "function_call", "refusal", *LOSS))
_OF_THE_ASSISTANT = (*REASONING_KEYS, "tool_calls", "function_call")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant", "bot": "assistant"}

ReadMessage = Callable[[Json, str, RowReader], Message | None]


def read_message(value: Json, path: str, reader: RowReader) -> Message | None:
    """One message in the form of the `chat` format; None where something is wrong with it."""
    if not isinstance(value, dict):
        reader.refuse(f"{path} is {described(value)}", "A message is an object with role and content.")
        return None
    num_problems = len(reader.problems)
    value = _with_refusal_as_content(value, path, reader)
    fields = {key: item for key, item in value.items() if item is not None}
    if fields.get("role") in CALLERS:
        fields = value = _as_calls(fields, path, reader)
    role = _read_role(fields, path, reader)
    calls = read_calls(fields, path, reader)
    may_be_null = bool(calls or fields.get("tool_calls") or fields.get("function_call")) and role in ("assistant", "")
    texts, media = _read_content(value, f"{path}.content", role, reader, may_be_null=may_be_null)
    reasoning = _read_reasoning(fields, path, reader)
    if role not in ("assistant", ""):
        for key in _OF_THE_ASSISTANT:
            if fields.get(key) not in (None, "", []):
                reader.refuse(f"{path} has {key}, but its role is {fields['role']!r}", "Only the assistant has it.")
        refuse_loss(fields, path, f"but its role is {fields['role']!r}", "Only the assistant has it.", reader)
        weight = 1.0
    else:
        weight = read_weight(fields, path, reader)
    others = reader.other_keys(fields, MESSAGE_KEYS, "message", path)
    reader.offer(others, role, path)
    if len(reader.problems) > num_problems:
        return None
    extra = {key: fields[key] for key in (*others, "refusal") if fields.get(key) != "" and key in fields}
    return Message(role, "".join(texts), reasoning, calls, weight, extra, max(1, len(texts)), media)


def read_messages(
    values: Sequence[Json], key: str, read: ReadMessage, reader: RowReader
) -> tuple[list[Message | None], list[int]]:
    """The messages of the list under `key`, each as `read` takes it, and their places in it.

    Calls in messages of their own belong to the assistant's message before them, as ms-swift joins them.
    """
    messages: list[Message | None] = []
    places: list[int] = []
    values = with_unpacked_contents(values)
    whole = ((i, one) for i, value in enumerate(values) for one in unfolded(value, f"{key}[{i}]", reader))
    for i, value in whole:
        message = read(value, f"{key}[{i}]", reader)
        before = messages[-1] if messages else None
        if message and before and _is_only_calls(value) and _goes_on(before, message):
            calls, extra = before.tool_calls + message.tool_calls, {**message.extra, **before.extra}
            messages[-1] = replace(before, tool_calls=calls, extra=extra)
        else:
            messages.append(message)
            places.append(i)
    return messages, places


def as_context(message: Message) -> Message:
    """The message without loss."""
    return replace(message, weight=0.0) if message.role == "assistant" else message


def _is_only_calls(value: Json) -> bool:
    return isinstance(value, dict) and (value.get("role") in CALLERS or value.get("from") in CALLERS)


def _goes_on(before: Message, message: Message) -> bool:
    """Whether a message of calls is of the same turn as the one before it."""
    return before.role == "assistant" and before.weight == message.weight and message.reasoning is None


def _as_calls(fields: Mapping[str, Json], path: str, reader: RowReader) -> dict[str, Json]:
    """A message whose content is calls, as one of the assistant that has them beside an empty content."""
    content = fields.get("content")
    calls, reasoning = list[Json](), None
    if content in (None, "", []):
        reader.refuse(f"{path} holds no call", "Its content is the call, with name and arguments, as JSON.")
    else:
        calls, reasoning = read_only_calls(content, f"{path}.content", reader)
    others = {key: item for key, item in fields.items() if key != "content"}
    found: dict[str, Json] = {"role": "assistant", "content": "", "tool_calls": calls}
    return {**others, **found, **({"reasoning_content": reasoning} if reasoning else {})}


def _read_role(fields: Mapping[str, Json], path: str, reader: RowReader) -> str:
    role = fields.get("role")
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    roles = f"Roles are {', '.join(ROLES)}."
    if role is None:
        reader.refuse(f"{path} has no role", roles)
    elif isinstance(role, str):
        meant = _OTHER_ROLES.get(role.lower(), role.lower())
        reader.refuse(f"{path} has the unknown role {role!r}", nearest(meant, ROLES).strip() or roles)
    else:
        reader.refuse(f"{path}.role is {described(role)}", roles)
    return ""


def _read_content(
    message: Mapping[str, Json], path: str, role: str, reader: RowReader, *, may_be_null: bool
) -> tuple[list[str], tuple[Medium, ...]]:
    """The text of a content, or the texts of its parts and the media between them."""
    content = message.get("content")
    if isinstance(content, str) and role != "assistant":
        content = packed_parts(content) or content
    if isinstance(content, str):
        return [content], ()
    if isinstance(content, list):
        return read_parts(content, path, role, reader)
    if content is not None:
        reader.refuse(f"{path} is {described(content)}", "A text or a list of parts is needed.")
    elif not may_be_null:
        what = f"{path} is null" if "content" in message else f"{path.removesuffix('.content')} has no content"
        reader.refuse(what, "Give its text; only an assistant message with tool_calls goes without.")
    return [""], ()


def _with_refusal_as_content(value: dict[str, Json], path: str, reader: RowReader) -> dict[str, Json]:
    """The message of which OpenAI's `refusal`, beside the content or as its part, is what was said."""
    content, refusal = value.get("content"), value.get("refusal")
    match content:
        case [{"type": "refusal", "refusal": refusal}]:
            content = None
        case _:
            pass
    if not refusal or not isinstance(refusal, str):
        return value
    if content:
        reader.refuse(f"{path} has both content and refusal", "Keep what was said.")
    return {**value, "content": refusal, "refusal": refusal}


def _read_reasoning(fields: Mapping[str, Json], path: str, reader: RowReader) -> str | None:
    given = {key: reader.read_text(fields, key, f"{path}.{key}") for key in REASONING_KEYS if key in fields}
    texts = {key: text for key, text in given.items() if text and text.strip()}
    if len(set(texts.values())) > 1:
        reader.refuse(f"{path} has different texts in {' and '.join(texts)}", "Keep one of them.")
    return next(iter(texts.values()), None)
