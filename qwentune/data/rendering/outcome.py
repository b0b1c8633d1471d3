"""What became of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwentune.data.media.pads import Shown
from qwentune.data.rendering.credentials import Credential
from qwentune.data.rendering.example import Example
from qwentune.data.rendering.fill_in_the_middle import Order
from qwentune.data.sample import Source
from qwentune.data.templates.chat_template import Mode
from qwentune.errors import Problem


@dataclass(frozen=True, slots=True)
class Dropped:
    """A turn (None: the whole row) that is not trained, and why."""

    source: Source
    turn: int | None
    reason: str
    num_tokens: int = 0
    kind: Literal["too long", "bad row", "nothing to train", "not asked for"] = "bad row"


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
    unread: Sequence[str] = ()  # keys of the row that nothing reads
    remarks: list[str] = field(default_factory=list[str])  # what deserves a second look
    credentials: list[Credential] = field(default_factory=list[Credential])  # secrets that stand in its texts
    media: Sequence[Shown] = ()  # that its messages show, in order
    identity: int = 0  # a hash, the same for samples that train the same
    answers: tuple[int, ...] = ()  # of a logged call, as its sample has them
    checked_turns: int = 0  # turns read off one rendering that the rule confirmed

    @property
    def fate(self) -> Literal["kept", "refused", "dropped"]:
        """What becomes of the row; AssertionError where it would be lost without a word, or is in two minds."""
        if self.examples and not self.problems:
            return "kept"
        if self.problems and not self.examples:
            return "refused"
        if self.dropped and not self.examples:
            return "dropped"
        counts = f"{len(self.examples)} examples, {len(self.problems)} problems, {len(self.dropped)} drops"
        raise AssertionError(f"{self.source}: a row is lost uncounted: it has {counts}")
