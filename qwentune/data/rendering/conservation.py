"""Nothing of a row is lost: what its messages say must stand in the rendering, in its order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from qwentune.data.sample import Json, Message
from qwentune.redaction import redact


def first_lost(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Json]],
    rendering: str,
    context_length: int,
    *,
    has_reasoning: bool,
) -> str | None:
    """The first text, tool or argument that does not stand in the rendering in its order; None: all are conserved.

    Outer white space may go, and so may reasoning of turns before the last: templates strip both by design.
    `has_reasoning` says that the template has a notion of reasoning.
    """
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in rendering:
            return f"the tool {name!r}"
    position = 0
    for k, message in enumerate(messages):
        if k == len(messages) - 1:
            position = context_length
            if has_reasoning and message.reasoning is not None:
                found = rendering.find(message.reasoning.strip(), position)
                if found < 0:
                    return "the turn's reasoning"
                position = found + len(message.reasoning.strip())
        texts = (part for part in message.parts if isinstance(part, str)) if message.media else (message.content,)
        for text in map(str.strip, texts):
            found = rendering.find(text, position)
            if found < 0:
                return f"the text {_short(text)}, which the {message.role} says,"
            position = found + len(text)
        for call in message.tool_calls:
            found = rendering.find(call.name, position)
            if found < 0:
                return f"the call of {call.name!r}"
            position = end = found + len(call.name)
            for spelled in _leaves(call.arguments):
                places = [(rendering.find(form, position), len(form)) for form in spelled]
                ends = [place + size for place, size in places if place >= 0]
                if not ends:
                    return f"the argument {_short(spelled[0])} of the call of {call.name!r}"
                end = max(end, min(ends))
            position = end
    return None


def _leaves(value: Json) -> Iterator[tuple[str, ...]]:
    """Every key and scalar of the arguments, each in the spellings that a template may choose."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield _spellings(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield _spellings(value)


def _spellings(value: Json) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])
    return (json.dumps(value), str(value))  # true or True, null or None, by template


def _short(text: str) -> str:
    text = redact(text)
    return repr(text if len(text) <= 40 else text[:37] + "…")
