"""What a score is given, and what a score is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwentune.answering.answer import Answer

# A turn of a dialogue, the completion of a prompt, the middle of a cut code, or a text that nothing asks for.
Kind: TypeAlias = Literal["turn", "completion", "middle", "text"]


@dataclass(frozen=True)
class Case:
    """What a row teaches in one place, and what a model makes of it.

    `loss` is the mean over its trained tokens, which together weigh `weight`. `answer` is None where nothing was asked.
    `asked_to_reason` is what the prompt asks for; None: its template has no notion of reasoning.
    """

    kind: Kind
    taught: Answer
    loss: float
    weight: float
    answer: Answer | None = None
    asked_to_reason: bool | None = None


def _one(_: Case) -> float:
    return 1.0


def _itself(mean: float) -> float:
    return mean


@dataclass(frozen=True)
class Score:
    """A kind of score: the mean of `of` over the cases, each with its `weight`, as `shown` says it.

    `of` is None where the score does not apply, which what is taught decides alone. A score `in_shares` lies between 0
    and 1.
    """

    name: str
    of: Callable[[Case], float | None]
    weight: Callable[[Case], float] = _one
    shown: Callable[[float], float] = _itself
    in_shares: bool = True

    def mean(self, cases: Sequence[Case]) -> float | None:
        """The score of some cases; None where it applies to none."""
        marks = [(mark, self.weight(case)) for case in cases if (mark := self.of(case)) is not None]
        return self.shown(sum(m * w for m, w in marks) / sum(w for _, w in marks)) if marks else None


def given(case: Case) -> Answer:
    """The answer of a case in which something was asked."""
    assert case.answer is not None
    return case.answer
