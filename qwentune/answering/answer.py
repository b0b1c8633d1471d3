"""One answer, taught or given: its reasoning, what it says, the tools that it calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwentune.answering.call_syntax import WrittenCall, calls_in

OPENING, CLOSING = "<think>", "</think>"
MOST_AT_ONCE = 16  # prompts; half as many each time that memory does not suffice
MOST_TOGETHER = 8192  # tokens of several prompts and their answers, while training; each of more is answered alone
# Tokens that an answer may have: so many times those that are taught, and no fewer than these.
TIMES_TAUGHT, FEWEST_TOKENS = 2, 256
MOST_BEYOND = 1024


def most_answered(taught_tokens: int) -> int:
    """Tokens that an answer may have where so many are taught."""
    return max(FEWEST_TOKENS, TIMES_TAUGHT * taught_tokens)


def most_answered_in_training(taught_tokens: int) -> int:
    """As `most_answered`, but of long answers no more than so many beyond the taught ones."""
    return min(most_answered(taught_tokens), taught_tokens + MOST_BEYOND)


def most_cached(max_tokens: int) -> int:
    """Tokens of a prompt with its answer in training, where examples have at most so many."""
    return max_tokens + MOST_BEYOND


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
