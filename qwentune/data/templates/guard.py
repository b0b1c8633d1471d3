"""Keeps texts of a row from becoming control tokens: while the template runs, their "|" is another character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from qwentune.data.sample import Json, Message, ToolCall

PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF900)))


def choose_guard(texts: str) -> str | None:
    """A private-use character that the texts do not hold, or "|" where they hold no "|"; None where they hold all."""
    if "|" not in texts:
        return "|"
    if PRIVATE_USE[0] not in texts:
        return PRIVATE_USE[0]
    held = set(texts)  # one walk through them, however many characters are taken
    return next((character for character in PRIVATE_USE if character not in held), None)


def message_texts(message: Message) -> Iterator[str]:
    """Every text of a message that a template may write out."""
    yield message.content
    yield message.reasoning or ""
    yield from texts_of(dict(message.extra))
    for call in message.tool_calls:
        yield call.name
        yield from texts_of(call.arguments)
        yield from texts_of(dict(call.extra))


def guarded_message(message: Message, guard: str) -> Message:
    """The message with every "|" in its texts replaced by the guard."""
    if guard == "|":
        return message
    return replace(
        message,
        content=message.content.replace("|", guard),
        reasoning=None if message.reasoning is None else message.reasoning.replace("|", guard),
        tool_calls=tuple(
            ToolCall(
                call.name.replace("|", guard),
                guarded_object(call.arguments, guard),
                guarded_object(dict(call.extra), guard),
            )
            for call in message.tool_calls
        ),
        extra=guarded_object(dict(message.extra), guard),
    )


def guarded_object(value: dict[str, Json], guard: str) -> dict[str, Json]:
    """The object with every "|" in its keys and texts replaced by the guard."""
    guarded = _replace_in_texts(value, "|", guard)
    assert isinstance(guarded, dict)
    return guarded


def texts_of(value: Json) -> Iterable[str]:
    """Every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)


def _replace_in_texts(value: Json, old: str, new: str) -> Json:
    """The same JSON value with `old` replaced in every text, keys included."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replace_in_texts(item, old, new) for item in value]
    if isinstance(value, dict):
        return {key.replace(old, new): _replace_in_texts(item, old, new) for key, item in value.items()}
    return value
