"""The `instruction` format: `{"instruction", "input"?, "output", "system"?, "history"?, "tools"?}`.

`query` and `response`, ms-swift's names, are read as `instruction` and `output`.
"""

from __future__ import annotations

from qwentune.data.formats.normalise import read_tools
from qwentune.data.reading.faults import Faults, described
from qwentune.data.sample import Conversation, Json, Message, Source
from qwentune.errors import Problem

KEYS = ("instruction", "input", "output", "system", "history", "tools")
NAMES = {"query": "instruction", "response": "output"}


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue: system text, earlier exchanges, the instruction with its input below, and the output."""
    faults = Faults(source)
    asked, answered = NAMES if "query" in row and "instruction" not in row else NAMES.values()
    instruction = faults.text(row, asked, asked, required=True)
    details = faults.text(row, "input", "input")
    output = faults.text(row, answered, answered, required=True)
    system = faults.text(row, "system", "system")
    messages = [Message("system", system)] if system else []
    for i, exchange in enumerate(faults.listed(row, "history", "history")):
        match exchange:
            case [str(question), str(answer)]:
                messages += [Message("user", question), Message("assistant", answer)]
            case _:
                faults.add(f"history[{i}] is {described(exchange)}", "It is a list of a question and its answer.")
    tools = tuple(read_tools(row, faults))
    faults.misspelt(row, KEYS, tuple(NAMES), "the row has ")
    faults.refuse_media(row)
    faults.refuse_judged_bad(row)
    if instruction is None or output is None or faults.problems:
        return faults.problems
    question = f"{instruction}\n{details}" if details else instruction
    messages += [Message("user", question), Message("assistant", output)]
    places = range(-1, len(messages) - 1) if system else range(len(messages))
    return Conversation(source, tuple(messages), tools, tuple(places))
