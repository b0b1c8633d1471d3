"""A rendering as its control tokens and the texts between them, in which every text is encoded once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

from qwentune.data.tokenizing.tokenizer import Tokenizer

Piece: TypeAlias = int | str  # a control token's id, or a text in which no control token is recognised

LONGEST_HEADER = len("<|im_start|>assistant")
CLOSED_THOUGHT = "</think>\n\n"
_LINE = re.compile(r"[ \t]*\S")
LONGEST_KEPT = 32  # shorter texts, such as the lines that name a role, come again in every dialogue


@dataclass(frozen=True)
class Encoder:
    """Splits renderings and encodes their texts, each once; no text becomes a control token."""

    tokenizer: Tokenizer
    kept: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @cached_property
    def control_lengths(self) -> dict[int, int]:
        """How many characters each control token has."""
        return {token_id: len(name) for name, token_id in self.tokenizer.control_ids.items()}

    def split(self, rendering: str, guard: str = "|") -> list[Piece]:
        """The pieces of a rendering whose texts have `guard` in the place of "|"."""
        control_ids, cuts = self.tokenizer.control_ids, self.tokenizer.cuts_after_newline
        pieces: list[Piece] = []
        for k, piece in enumerate(self.tokenizer.control_pattern.split(rendering)):
            if k % 2:
                pieces.append(control_ids[piece])
            elif piece:
                text = piece.replace(guard, "|")
                if cuts:
                    pieces += _cut(text)
                else:
                    pieces.append(text)
        return pieces

    def ends(self, pieces: Iterable[Piece]) -> list[int]:
        """Before which character of the rendering each piece ends."""
        lengths = self.control_lengths
        return list(accumulate(lengths[piece] if isinstance(piece, int) else len(piece) for piece in pieces))

    def encode(self, pieces: Iterable[Sequence[Piece]]) -> dict[str, list[int]]:
        """The ids of every text among the pieces."""
        texts = {piece for some in pieces for piece in some if isinstance(piece, str)}
        encoded = {text: self.kept[text] for text in texts if text in self.kept}
        new = [text for text in texts if text not in encoded]
        encoded.update(zip(new, self.tokenizer.encode(new), strict=True))
        if len(self.kept) < 10_000:
            self.kept.update((text, encoded[text]) for text in new if len(text) <= LONGEST_KEPT)
        return encoded


def _cut(text: str) -> Sequence[str]:
    """The text cut where what follows recurs: after the line that names a role, and after closed reasoning.

    Only between a line feed and a line that is not empty: there the encodings of both sides, one after the other, are
    the encoding of the whole (`Tokenizer.cuts_after_newline`).
    """
    header = text.find("\n", 0, LONGEST_HEADER) + 1
    thought = text.find(CLOSED_THOUGHT) + len(CLOSED_THOUGHT)
    if header and not _LINE.match(text, header):
        header = 0
    if thought < len(CLOSED_THOUGHT) or not _LINE.match(text, thought):
        return (text[:header], text[header:]) if header else (text,)
    return (text[:header], text[header:thought], text[thought:]) if header else (text[:thought], text[thought:])


def ids_of(pieces: Sequence[Piece], encoded: dict[str, list[int]]) -> list[int]:
    """The ids of the pieces one after the other."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += encoded[piece]
    return ids
