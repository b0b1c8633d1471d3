"""Which keys of messages, calls and arguments a chat template reads: shown by renderings with and without the key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import meta

from qwentune.data.sample import Json
from qwentune.data.templates import sandbox

Render = Callable[..., list[str]]  # ChatTemplate.render
VALUES: tuple[Json, ...] = ("a word that no template has", True, False, 1)

_CALL: dict[str, Json] = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
_TOOL: dict[str, Json] = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
_CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]
# A template may refuse a role or a call: what it takes is enough.
_PROBES = (
    [{"role": "system", "content": "s"}, *_CALLING],
    _CALLING,
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)


def reads_argument(template: str, name: str) -> bool:
    """Whether the template has a variable of that name which it does not set itself."""
    return name in meta.find_undeclared_variables(sandbox.parsed(template))


def reads_key(render: Render, refusal: type[Exception], of: str, key: str) -> bool:
    """Whether some value of `key` changes what is rendered; `of` is the role of the message that has it, or `call`."""
    for probe in _PROBES:
        for tools in ([], [_TOOL]):
            for is_prompt in (False, True):
                try:
                    (plain,) = render([probe], tools, generation_prompt=is_prompt)
                except refusal:
                    continue
                try:
                    with_key = [list(_with_key(probe, of, key, value)) for value in VALUES]
                    if any(text != plain for text in render(with_key, tools, generation_prompt=is_prompt)):
                        return True
                except refusal:  # it makes a difference
                    return True
    return False


def _with_key(messages: list[dict[str, Any]], of: str, key: str, value: Json) -> Iterator[dict[str, Any]]:
    for message in copy.deepcopy(messages):
        for holder in message.get("tool_calls", []) if of == "call" else [message] if message["role"] == of else []:
            holder.setdefault(key, value)
        yield message
