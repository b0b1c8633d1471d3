"""A rendering as its control tokens and the texts between them, in which every text is encoded once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qwentune.data.tokenizer import Tokenizer

Piece: TypeAlias = int | str  # a control token's id, or a text in which no control token is recognised

LONGEST_HEADER = len("<|im_start|>assistant")
CLOSED_THOUGHT = "</think>\n\n"
_LINE = re.compile(r"[ \t]*\S")
LONGEST_KEPT = 32  # shorter texts, such as the lines that name a role, come again in every dialogue


@dataclass(frozen=True, slots=True)
class Pieces:
    """A rendering in pieces; piece k ends before character `ends[k]` of it."""

    pieces: list[Piece]
    ends: list[int]


@dataclass(frozen=True)
class Encoder:
    """Splits renderings and encodes their texts, each once; no text becomes a control token."""

    tokenizer: Tokenizer
    kept: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    def split(self, rendering: str, guard: str = "|") -> Pieces:
        """The pieces of a rendering whose texts have `guard` in the place of "|"."""
        control_ids, cuts = self.tokenizer.control_ids, self.tokenizer.cuts_after_newline
        pieces: list[Piece] = []
        ends: list[int] = []
        end = 0
        for k, piece in enumerate(self.tokenizer.control_pattern.split(rendering)):
            if k % 2:
                pieces.append(control_ids[piece])
                end += len(piece)
                ends.append(end)
            elif piece:
                if guard != "|":
                    piece = piece.replace(guard, "|")
                for text in _cut(piece) if cuts else (piece,):
                    pieces.append(text)
                    end += len(text)
                    ends.append(end)
        return Pieces(pieces, ends)

    def encode(self, pieces: Iterable[Sequence[Piece]]) -> dict[str, list[int]]:
        """The ids of every text among the pieces."""
        texts = {piece for some in pieces for piece in some if isinstance(piece, str)}
        encoded = {text: self.kept[text] for text in texts if text in self.kept}
        new = [text for text in texts if text not in encoded]
        encoded.update(zip(new, self.tokenizer.encode(new), strict=True))
        if len(self.kept) < 10_000:
            self.kept.update((text, encoded[text]) for text in new if len(text) <= LONGEST_KEPT)
        return encoded


def _cut(text: str) -> list[str]:
    """The text cut where what follows recurs: after the line that names a role, and after closed reasoning.

    Only between a line feed and a line that is not empty: there the encodings of both sides, one after the other, are
    the encoding of the whole (`Tokenizer.cuts_after_newline`).
    """
    cuts = [0]
    header = text.find("\n", 0, LONGEST_HEADER) + 1
    if header and _LINE.match(text, header):
        cuts.append(header)
    thought = text.find(CLOSED_THOUGHT)
    if thought >= 0:
        after = thought + len(CLOSED_THOUGHT)
        if cuts[-1] < after and _LINE.match(text, after):
            cuts.append(after)
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def ids_of(pieces: Sequence[Piece], encoded: dict[str, list[int]]) -> list[int]:
    """The ids of the pieces one after the other."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += encoded[piece]
    return ids
