"""A trained turn in pieces, most of which it shares with the other turns of its dialogue."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwentune.data.rendering.pieces import Piece


@dataclass(frozen=True, slots=True)
class Part:
    """Pieces `start` to `stop` of a rendering: the same object for all turns that have a part of it."""

    pieces: Sequence[Piece]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn in pieces: its context is the parts `before` it, one after the other, and then `context`.

    `starts` are the pieces of the first part's rendering with which the user's messages open; None: it is not known
    what is left of the context without the first of them.
    """

    index: int
    before: tuple[Part, ...]
    context: Sequence[Piece]
    target: Sequence[Piece]
    starts: Sequence[int] | None = None

    @property
    def num_starts(self) -> int:
        """How many of the user's messages stand before it."""
        return 0 if self.starts is None else bisect_right(self.starts, self.before[0].stop)

    def beginning(self, number: int) -> Turn:
        """The turn in the dialogue that begins with the user's message `number`, counted from 0."""
        assert self.starts is not None
        whole, *others = self.before
        leading, rest = replace(whole, stop=self.starts[0]), replace(whole, start=self.starts[number])
        return replace(self, before=(leading, rest, *others), starts=None)


def renderings(turns: Sequence[Turn]) -> dict[int, Sequence[Piece]]:
    """The renderings that the turns have parts of, by identity, each as far as it is used."""
    longest: dict[int, Part] = {}
    for part in (part for turn in turns for part in turn.before):
        if id(part.pieces) not in longest or part.stop > longest[id(part.pieces)].stop:
            longest[id(part.pieces)] = part
    return {key: part.pieces[: part.stop] for key, part in longest.items()}
