"""By what logged calls of one dialogue are known as such, however many there are: eight bytes for each answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

from qwentune.data.sample import Message


def answers_of(messages: Sequence[Message]) -> tuple[int, ...]:
    """A fingerprint of the dialogue up to and with each of the assistant's messages, in order.

    Reasoning is left out: clients do not send it back. So is white space around a text, which some of them take off.
    """
    digest, found = blake2b(digest_size=8), list[int]()
    for message in messages:
        calls = [[call.name, call.arguments] for call in message.tool_calls]
        said = json.dumps([message.role, message.content.strip(), calls], sort_keys=True)
        digest.update(f"{said}\n".encode())
        if message.role == "assistant":
            found.append(int.from_bytes(digest.copy().digest(), "big"))
    return tuple(found)
