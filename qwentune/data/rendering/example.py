"""Training examples, and how those of one dialogue grow turn by turn and share what they begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

from qwentune.data.media.seen import Seen
from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.pieces import Encoder, Piece, ids_of
from qwentune.data.rendering.stretches import Beginnings, Run, Tokens
from qwentune.data.rendering.turn import Turn, renderings
from qwentune.data.sample import Source

Part: TypeAlias = Literal["", "chosen", "rejected", "query", "positive", "negative"]
PARTS: tuple[Part, ...] = get_args(Part)


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

    It begins with `shared` tokens of `earlier` and goes on with `tail`. Of the earlier examples of its sample that one,
    `back` places before it, begins most alike. Code is cut anew each epoch: an epoch trains the examples of one
    version, and those of version -1, which are the same in every epoch. Where a row is trained as several, `part` says
    which of them it is. A negative id −(k + 1) is a pad of `media[k]`.
    """

    source: Source
    tail: list[int]
    spans: tuple[Span, ...]
    shared: int = 0
    back: int = 1
    version: int = -1
    earlier: Example | None = None
    part: Part = ""
    media: Sequence[Seen] = ()

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.shared + len(self.tail)

    @property
    def input_ids(self) -> list[int]:
        """All tokens, put together."""
        parts: list[list[int]] = []
        example, missing = self, self.num_tokens
        while missing:
            if example.shared < missing:
                parts.append(example.tail[: missing - example.shared])
                missing = example.shared
            if missing:
                assert example.earlier is not None
                example = example.earlier
        return [token for part in reversed(parts) for token in part]

    @property
    def last_tokens(self) -> list[int]:
        """The last token of each span."""
        if all(span.stop > self.shared for span in self.spans):
            return [self.tail[span.stop - 1 - self.shared] for span in self.spans]
        ids = self.input_ids
        return [ids[span.stop - 1] for span in self.spans]

    @property
    def turns(self) -> tuple[int, ...]:
        """The indices of the messages trained; empty for a text."""
        return tuple(span.turn for span in self.spans if span.turn >= 0)

    @property
    def weights(self) -> list[float]:
        """The loss weight of each token, 0 where it is context."""
        weights = [0.0] * self.num_tokens
        for span in self.spans:
            weights[span.start : span.stop] = [span.weight] * (span.stop - span.start)
        return weights


class TurnIds:
    """The ids of turns; those of a rendering that turns share are put together once."""

    def __init__(self, turns: Sequence[Turn], encoder: Encoder, encoded: dict[str, list[int]]) -> None:
        self.encoder, self.encoded = encoder, encoded
        self.renderings: dict[int, tuple[list[int], list[int]]] = {}  # ids, and how many its first k pieces have
        for key, pieces in renderings(turns).items():
            self.renderings[key] = ids_of(pieces, encoded), [0, *accumulate(map(self._size, pieces))]

    def know(self, pieces: Iterable[Sequence[Piece]]) -> None:
        """Encodes what was not among the turns."""
        new = [[piece for piece in some if isinstance(piece, str) and piece not in self.encoded] for some in pieces]
        self.encoded.update(self.encoder.encode(new))

    def context(self, turn: Turn) -> list[Run]:
        """The ids of a turn's context."""
        runs: list[Run] = []
        for part in turn.before:
            ids, ends = self.renderings[id(part.pieces)]
            runs.append((ids, ends[part.start], ends[part.stop]))
        return [*runs, _run(ids_of(turn.context, self.encoded))]

    def target(self, turn: Turn) -> Run:
        """The ids of a turn's target."""
        return _run(ids_of(turn.target, self.encoded))

    def num_tokens(self, turn: Turn) -> int:
        """How many ids context and target have."""
        size = sum(map(self._size, turn.context)) + sum(map(self._size, turn.target))
        for part in turn.before:
            ends = self.renderings[id(part.pieces)][1]
            size += ends[part.stop] - ends[part.start]
        return size

    def _size(self, piece: Piece) -> int:
        return 1 if isinstance(piece, int) else len(self.encoded[piece])


class DialogueExamples:
    """The examples of one dialogue, grown turn by turn."""

    def __init__(self, dialogue: Dialogue, ids: TurnIds) -> None:
        self.dialogue, self.ids = dialogue, ids
        self.tokens: list[Tokens] = []
        self.spans: list[list[Span]] = []

    def add(self, turn: Turn) -> None:
        """Adds a turn."""
        context, i = self.ids.context(turn), turn.index
        before, tokens = Tokens(context), Tokens([*context, self.ids.target(turn)])
        span = Span(len(before), len(tokens), self.dialogue.messages[i].weight, self.dialogue.message_index(i))
        last = self.tokens[-1] if self.tokens else before
        if self.tokens and len(last) <= len(before) and before.num_common(last, 0, len(last)) == len(last):
            self.tokens[-1] = tokens
            self.spans[-1].append(span)
        else:
            self.tokens.append(tokens)
            self.spans.append([span])

    def finished(self) -> list[Example]:
        """The examples in the order of their turns."""
        source, beginnings, examples = self.dialogue.conversation.source, Beginnings(), list[Example]()
        media = () if self.dialogue.media is None else self.dialogue.media.table
        for tokens, spans in zip(self.tokens, self.spans, strict=True):
            shared, back = beginnings.add(tokens)
            tail, earlier = tokens.ids(shared, len(tokens)), examples[-back] if shared else None
            examples.append(Example(source, tail, tuple(spans), shared, back, earlier=earlier, media=media))
        return examples


def _run(ids: list[int]) -> Run:
    return ids, 0, len(ids)
