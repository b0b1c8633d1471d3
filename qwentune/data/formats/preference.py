"""The `preference` format: `{"prompt", "chosen", "rejected"}`, two ends of one dialogue.

Also read: `instruction` and `input`, `conversations` or `messages` in place of `prompt`; an end as one message or a
text; whole dialogues as ends; `messages` with a `rejected_response`.
"""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.formats.normalise import read_messages, read_tools
from qwentune.data.formats.sharegpt import read_turn
from qwentune.data.reading.faults import Faults
from qwentune.data.sample import Conversation, Json, Message, Pair, Source
from qwentune.errors import Problem

KEYS = ("prompt", "chosen", "rejected", "instruction", "input", "messages", "conversations", "system", "tools")
PROMPTS = ("prompt", "conversations", "messages")


def parse(row: dict[str, Json], source: Source) -> Pair | list[Problem]:
    """The two dialogues, of which only the ends would be trained; or what is wrong with the row."""
    faults = Faults(source)
    prompt = _prompt(row, faults)
    if "rejected_response" in row and prompt:  # the last message is the answer preferred to it
        *prompt, last = prompt
        chosen, rejected = [last], _messages(row, "rejected_response", "assistant", faults)
    else:
        chosen = _messages(row, "chosen", "assistant", faults)
        rejected = _messages(row, "rejected", "assistant", faults)
    system = faults.text(row, "system", "system")
    if system:
        prompt.insert(0, Message("system", system))
    tools = tuple(read_tools(row, faults))
    faults.misspelt(row, KEYS, ("rejected_response",), "the row has ")
    faults.refuse_media(row)
    if not prompt:  # both ends are whole dialogues
        num_same = next((k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:num_same], chosen[num_same:], rejected[num_same:]
    ends = {"chosen": chosen, "rejected": rejected}
    for name, end in ends.items():
        if not faults.problems and not any(message.role == "assistant" for message in end):
            faults.add(f"{name} has no assistant message of its own", "Give the answer that is compared.")
    if not faults.problems and chosen == rejected:
        faults.add("chosen and rejected are the same", "Give two answers that differ, or leave the row out.")
    context = [replace(message, weight=0.0) for message in prompt]
    num_beside = 1 if system else 0
    whole = (
        Conversation(source, (*context, *end), tools, tuple(range(-num_beside, len(context) + len(end) - num_beside)))
        for end in ends.values()
    )
    return faults.problems or Pair(source, *whole)


def _prompt(row: dict[str, Json], faults: Faults) -> list[Message]:
    for key in PROMPTS:
        if key in row:
            return _messages(row, key, "user", faults)
    texts = [text for key in ("instruction", "input") if (text := faults.text(row, key, key))]
    return [Message("user", "\n".join(texts))] if texts else []


def _messages(row: dict[str, Json], key: str, role: str, faults: Faults) -> list[Message]:
    """The messages under `key`: a list of them, one alone, or a text said by `role`."""
    value = row.get(key)
    if isinstance(value, str) and not value.lstrip().startswith("[{"):  # as tables store a list
        return [Message(role, value)]
    if isinstance(value, dict):
        read = [read_turn(value, key, faults)]
    else:
        listed = faults.listed(row, key, key, required=True)
        read, _ = read_messages(listed, key, read_turn, faults)
    return [message for message in read if message]
