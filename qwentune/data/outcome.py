"""What became of one sample."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwentune.data.example import Example
from qwentune.data.fim import Order
from qwentune.data.sample import Source
from qwentune.data.template import Mode
from qwentune.errors import Problem


@dataclass(frozen=True, slots=True)
class Dropped:
    """A turn (None: the whole row) that is not trained, and why."""

    source: Source
    turn: int | None
    reason: str
    num_tokens: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of one sample: its examples, and everything that a report has to say about it."""

    source: Source
    examples: list[Example] = field(default_factory=list[Example])
    problems: list[Problem] = field(default_factory=list[Problem])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    modes: list[Mode] = field(default_factory=list[Mode])  # one per trained turn
    turns_with_reasoning: int = 0
    unreachable_turns: int = 0
    forged_control_tokens: int = 0  # control tokens spelled by texts of the row, encoded as plain text
    rendering_tokens: int = 0  # of one rendering of the dialogue: what a naive trainer would process
    orders: list[Order] = field(default_factory=list[Order])  # of code, one per example of the first epoch
    remarks: list[str] = field(default_factory=list[str])  # what deserves a second look
    identity: int = 0  # a hash, the same for samples that train the same
    checked_turns: int = 0  # turns read off one rendering that the rule confirmed
