"""Fill-in-the-middle: where code is cut, and the forms in which Qwen's Coder models read it.

A file is `<|fim_prefix|>…<|fim_suffix|>…<|fim_middle|>…<|endoftext|>`. Of a repository the other files stand before it:
`<|repo_name|>name`, then for each file `<|file_sep|>path` and its text (Qwen2.5-Coder, arXiv 2409.12186). The order
with the suffix first is not Qwen's own; it is the one of Bavarian et al., arXiv 2207.14255.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qwentune.data.rendering.pieces import Piece
from qwentune.data.sample import Code, RowError
from qwentune.data.tokenizing.tokenizer import END_OF_TEXT, Tokenizer
from qwentune.recipe import Fim

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
REPOSITORY, FILE = "<|repo_name|>", "<|file_sep|>"
NUM_MARKERS = 4  # the three of a cut, and the end of text
MARGIN = 32  # a text cut in three takes a few tokens more than the whole

Order = Literal["psm", "spm", "plain"]


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which a sample is trained: `target` after `context`, in the epochs that take version `version`.

    `version` is -1 where every epoch trains the same; a plain form has no context.
    """

    version: int
    order: Order
    context: tuple[Piece, ...]
    target: tuple[Piece, ...]
    left_out: int = 0  # files of the repository for which the context has no room


@dataclass(frozen=True)
class FillInTheMiddle:
    """Turns code into its forms; a cut depends on the seed, the version, and where the sample stands: nothing else."""

    tokenizer: Tokenizer
    options: Fim
    max_tokens: int
    seed: int

    def forms(self, code: Code, source_number: int) -> Iterator[Form]:
        """The forms of a sample of source `source_number`, version by version.

        A text that is too long for an example is cut at line ends into several, each with a middle of its own; of a
        repository the first files are left out. Raises RowError where the tokenizer lacks a marker.
        """
        if code.cut is not None:
            yield self._psm(-1, (), code.cut)
            return
        *others, last = code.files
        opening = self._marked(REPOSITORY, code.repo) if code.repo else ()
        before = [self._marked(FILE, file.path, file.text) for file in others]
        header = self._marked(FILE, last.path) if code.repo else ()
        room = self.max_tokens - NUM_MARKERS - MARGIN - self._num_tokens((*opening, *header))
        windows = self._windows(last.text, room)
        kept = self._last_that_fit(before, room - self._num_tokens(windows[:1]) if len(windows) == 1 else 0)
        for version in range(self.options.cuts):
            random = np.random.default_rng([self.seed, version, source_number, code.source.line])
            if random.random() >= self.options.rate:
                whole = (*opening, *_joined(before), *header, last.text, self._marker(END_OF_TEXT))
                yield Form(version, "plain", (), _merged(whole))
                continue
            for window in windows:
                parts = cut(window, random)
                form = self._spm if random.random() < self.options.spm_rate else self._psm
                made = form(version, (*opening, *_joined(kept), *header), parts)
                yield replace(made, left_out=len(before) - len(kept))

    def _psm(self, version: int, head: tuple[Piece, ...], parts: tuple[str, str, str]) -> Form:
        prefix, middle, suffix = parts
        context = (self._marker(PREFIX), prefix, self._marker(SUFFIX), suffix, self._marker(MIDDLE))
        return self._form(version, "psm", (*head, *context), middle)

    def _spm(self, version: int, head: tuple[Piece, ...], parts: tuple[str, str, str]) -> Form:
        prefix, middle, suffix = parts
        context = (self._marker(SUFFIX), suffix, self._marker(PREFIX), prefix, self._marker(MIDDLE))
        return self._form(version, "spm", (*head, *context), middle)

    def _form(self, version: int, order: Order, context: tuple[Piece, ...], middle: str) -> Form:
        return Form(version, order, _merged(context), _merged((middle, self._marker(END_OF_TEXT))))

    def _marked(self, name: str, *lines: str) -> tuple[Piece, ...]:
        return (self._marker(name), "".join(f"{line}\n" for line in lines))

    def _marker(self, name: str) -> int:
        if name not in self.tokenizer.control_ids:
            fix = "Take a Qwen Coder checkpoint, or train the rows as the format text."
            raise RowError(f"the checkpoint's tokenizer has no token {name}", fix)
        return self.tokenizer.control_ids[name]

    def _num_tokens(self, pieces: Sequence[Piece]) -> int:
        texts = [piece for piece in pieces if isinstance(piece, str)]
        return len(pieces) - len(texts) + sum(map(len, self.tokenizer.encode(texts)))

    def _fits(self, text: str, room: int) -> bool:
        return len(text.encode()) <= room or self._num_tokens((text,)) <= room  # a token is a byte at least

    def _windows(self, text: str, room: int) -> list[str]:
        """The text in parts of at most `room` tokens, cut at line ends where it has some."""
        if len(text) < 2 or room < 1 or self._fits(text, room):
            return [text]
        half = len(text) // 2
        at = text.rfind("\n", 0, half) + 1 or text.find("\n", half) + 1
        at = at if 0 < at < len(text) else half
        return [*self._windows(text[:at], room), *self._windows(text[at:], room)]

    def _last_that_fit(self, files: Sequence[tuple[Piece, ...]], room: int) -> Sequence[tuple[Piece, ...]]:
        start = len(files)
        while start and (size := self._num_tokens(files[start - 1])) <= room:
            room -= size
            start -= 1
        return files[start:]


def cut(text: str, random: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text that is not empty, cut at two different characters, all pairs alike."""
    first = int(random.integers(len(text) + 1))
    second = int(random.integers(len(text)))
    second += second >= first
    start, stop = sorted((first, second))
    return text[:start], text[start:stop], text[stop:]


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces with texts that touch made one, as a server encodes them, and without empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif piece != "":
            merged.append(piece)
    return tuple(merged)


def _joined(files: Sequence[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    return tuple(piece for file in files for piece in file)
