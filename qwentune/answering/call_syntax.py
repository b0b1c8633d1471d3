"""The calls of tools in what a model writes, in both forms of Qwen's templates: JSON, and (Qwen3-Coder, 3.5) tags."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json, ToolCall

CALL_OPENING, CALL_CLOSING = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(r"(?s)<tool_call>(.*?)(?:</tool_call>|$)")
_FUNCTION = re.compile(r"(?s)<function=([^>\n]+)>(.*)</function>")
_PARAMETER = re.compile(r"(?s)<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>")


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as a server would read it; the name is empty and the arguments are None where it cannot be read."""

    name: str
    arguments: Json

    @property
    def taken(self) -> ToolCall | None:
        """The call as a message has it; None where a server could not read it."""
        return ToolCall(self.name, self.arguments) if self.name and isinstance(self.arguments, dict) else None


def calls_in(text: str) -> tuple[WrittenCall, ...]:
    """The calls of a text, in order; broken ones too."""
    return tuple(_call(block.strip()) for block in _BLOCK.findall(text))


def json_or_none(text: str) -> dict[str, Json] | list[Json] | None:
    """The object or list that the text is in JSON; None where it is none, or not portable."""
    try:
        value = parse_json(text)
    except JsonFaultError:
        return None
    return value if isinstance(value, dict | list) else None


def same_json(one: Json, other: Json) -> bool:
    """Whether two values of JSON are equal: the order of keys is free, true is not 1, 1 is 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _call(block: str) -> WrittenCall:
    if (found := _FUNCTION.fullmatch(block)) is not None:
        if _PARAMETER.sub("", found[2]).strip():
            return WrittenCall(found[1], None)
        return WrittenCall(found[1], {name: _value(text) for name, text in _PARAMETER.findall(found[2])})
    match json_or_none(block):
        case {"name": str(name), **rest}:
            return WrittenCall(name, rest.get("arguments"))
        case _:
            return WrittenCall("", None)


def _value(text: str) -> Json:
    """The value of a parameter: templates write texts as they are and all else as JSON."""
    try:
        return parse_json(text)
    except JsonFaultError:
        return text
