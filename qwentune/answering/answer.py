"""One answer, taught or given: its reasoning, what it says, the tools that it calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwentune.answering.call_syntax import WrittenCall, calls_in

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class Answer:
    """A reply without the token that ended it; `stopped` is false where the length limit did.

    `tokens` counts that token too. `opened`: the prompt ended inside a block of reasoning.
    """

    text: str
    stopped: bool
    tokens: int
    opened: bool = False

    @cached_property
    def _parts(self) -> tuple[str, str]:
        begun = self.text.lstrip()
        if not (self.opened or begun.startswith(OPENING)):
            return "", self.text
        text = begun.removeprefix(OPENING) if begun.startswith(OPENING) else self.text
        reasoning, _, answer = text.partition(CLOSING)  # without the tag it was cut while it reasoned
        return reasoning.strip("\n"), answer.lstrip("\n")

    @property
    def reasoning(self) -> str:
        """What was thought before the answer; empty where nothing was."""
        return self._parts[0]

    @property
    def answer(self) -> str:
        """What stands after the reasoning, calls of tools among it."""
        return self._parts[1]

    @cached_property
    def calls(self) -> tuple[WrittenCall, ...]:
        """The tools that the answer calls."""
        return calls_in(self.answer)
