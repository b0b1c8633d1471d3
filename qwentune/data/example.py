"""Training examples, and how those of one dialogue grow turn by turn and share what they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from qwentune.data.dialogue import Dialogue
from qwentune.data.pieces import Piece, ids_of
from qwentune.data.sample import Source


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` of an example carry loss with a weight; `turn` is the message, -1 for a text."""

    start: int
    stop: int
    weight: float
    turn: int


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: the tokens of its spans are trained, each predicted from what stands before it.

    Of the earlier examples of its sample, the one `back` places before it begins most alike: `shared` tokens are the
    same. Code is cut anew each epoch: an epoch trains the examples of one version, and those of version -1, which are
    the same in every epoch.
    """

    source: Source
    input_ids: list[int]
    spans: tuple[Span, ...]
    shared: int = 0
    back: int = 1
    version: int = -1

    @property
    def turns(self) -> tuple[int, ...]:
        """The indices of the messages trained; empty for a text."""
        return tuple(span.turn for span in self.spans if span.turn >= 0)

    @property
    def weights(self) -> list[float]:
        """The loss weight of each token, 0 where it is context."""
        weights = [0.0] * len(self.input_ids)
        for span in self.spans:
            weights[span.start : span.stop] = [span.weight] * (span.stop - span.start)
        return weights


@dataclass(frozen=True, slots=True)
class History:
    """The ids of a rendering that contexts share; `ends[k]` counts the tokens of its first k pieces."""

    ids: list[int]
    ends: list[int]

    @classmethod
    def of(cls, pieces: Sequence[Piece], encoded: dict[str, list[int]]) -> History:
        sizes = (1 if isinstance(piece, int) else len(encoded[piece]) for piece in pieces)
        return cls(ids_of(pieces, encoded), [0, *accumulate(sizes)])


class DialogueExamples:
    """The examples of one dialogue, grown turn by turn."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self.ids: list[list[int]] = []
        self.spans: list[list[Span]] = []
        self.origins: list[tuple[int, int]] = []  # of each example, `shared` and `back`
        self.alike: list[int] = []  # how many tokens each example before the last has in common with it
        self.history: tuple[list[int], int] = ([], 0)  # what the last example begins with, and how much of it

    def add(self, i: int, history: list[int], num_history: int, context: list[int], target: list[int]) -> None:
        """Adds turn `i`, whose context is `num_history` tokens of `history` and then `context`."""
        ids = history[:num_history]
        ids += context
        start, stop = len(ids), len(ids) + len(target)
        ids += target
        span = Span(start, stop, self.dialogue.messages[i].weight, self.dialogue.message_index(i))
        known = min(num_history, self.history[1]) if history is self.history[0] else 0  # the same for both
        last = self.ids[-1] if self.ids else []
        if 0 < len(last) <= start and ids[known : len(last)] == last[known:]:
            self.ids[-1] = ids
            self.spans[-1].append(span)
        else:
            self._begin(ids, known)
            self.spans.append([span])
        self.history = history, num_history

    def _begin(self, ids: list[int], known: int) -> None:
        # Two examples that leave the last one at different tokens part where the first of them leaves it; only those
        # that leave it at the same token may go on together.
        shared = _num_common(ids, self.ids[-1], known) if self.ids else 0
        alike = [
            min(shared, earlier) if shared != earlier else _num_common(ids, other, shared)
            for earlier, other in zip(self.alike, self.ids, strict=False)
        ]
        self.alike = [*alike, shared] if self.ids else []
        most = max(self.alike, default=0)
        back = next((k for k, count in enumerate(reversed(self.alike), 1) if count == most), 1)
        self.origins.append((most, back))
        self.ids.append(ids)

    def finished(self) -> list[Example]:
        """The examples in the order of their turns."""
        source = self.dialogue.conversation.source
        return [
            Example(source, ids, tuple(spans), shared, back)
            for ids, spans, (shared, back) in zip(self.ids, self.spans, self.origins, strict=True)
        ]


def _num_common(one: Sequence[int], other: Sequence[int], known: int) -> int:
    """How many tokens two examples have in common at their beginning; the first `known` are."""
    low, high = known, min(len(one), len(other))
    while low < high:  # comparing slices is quicker than token by token
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
