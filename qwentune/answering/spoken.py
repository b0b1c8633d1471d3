"""An answer while it is made: its tokens as whole characters, its text as reasoning, words and calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias

from qwentune.answering.answer import CLOSING, OPENING
from qwentune.answering.call_syntax import CALL_CLOSING, CALL_OPENING
from qwentune.data.tokenizing.tokenizer import Tokenizer

Part: TypeAlias = Literal["reasoning", "words", "call"]
UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet
MOST_WAITING = 8  # tokens: no character has so many


class Spoken:
    """A streamer of transformers': hears the tokens of one answer, and tells their text in whole characters."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], tell: Callable[[str], object]) -> None:
        self.ids: list[int] = []  # generated so far, with the one that ended it
        self._tokenizer, self._ends, self._tell = tokenizer, ends, tell
        self._waiting: list[int] = []
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Takes the prompt, which is not told, and then one token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            if token in self._ends:
                continue
            self._waiting.append(token)
            text = self._tokenizer.decode(self._waiting)
            if not text.endswith(UNFINISHED) or len(self._waiting) > MOST_WAITING:
                self._waiting.clear()
                self._tell(text)

    def end(self) -> None:
        """Tells what is left, whole or not."""
        if self._waiting:
            text = self._tokenizer.decode(self._waiting)
            self._waiting.clear()
            self._tell(text)


class Parts:
    """Cuts a text that comes in pieces: reasoning and words at once, a call when it is whole.

    Reasoning and words are those of `Answer`. Where calls are not `apart`, they stand in the words as they are written.
    """

    def __init__(self, tell: Callable[[Part, str], object], *, opened: bool, apart: bool) -> None:
        self._tell, self._opened, self._apart = tell, opened, apart
        self._part: Part | None = None  # not known before it is seen whether the text begins with a tag
        self._held = ""
        self._line_ends = ""  # of reasoning, which ends without any
        self._is_fresh = False  # nothing was told of a part that begins without line ends

    def add(self, text: str, *, last: bool = False) -> None:
        """Takes the next piece."""
        self._held += text
        if self._part is None and not self._has_begun(last):
            return
        while (tag := self._tag()) and tag in self._held:
            before, _, self._held = self._held.partition(tag)
            self._say(before if self._part != "call" else f"{CALL_OPENING}{before}{CALL_CLOSING}")
            self._turn()
        if self._part == "call" and not last:
            return
        kept = 0 if last or not tag else _beginning(self._held, tag)
        now, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._say(now if self._part != "call" else CALL_OPENING + now)

    def _has_begun(self, last: bool) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(OPENING):
            self._held = begun.removeprefix(OPENING)
        elif OPENING.startswith(begun) and not last:
            return False
        elif not self._opened:
            self._part = "words"
            return True
        self._part, self._is_fresh = "reasoning", True
        return True

    def _tag(self) -> str:
        """What ends the part; empty where nothing does."""
        if self._part == "reasoning":
            return CLOSING
        if self._part == "call":
            return CALL_CLOSING
        return CALL_OPENING if self._apart else ""

    def _turn(self) -> None:
        self._is_fresh = self._part == "reasoning"
        self._line_ends = ""
        self._part = "call" if self._part == "words" else "words"

    def _say(self, text: str) -> None:
        assert self._part is not None
        text = self._line_ends + text
        if self._is_fresh:
            text = text.lstrip("\n")
        told = text.rstrip("\n") if self._part == "reasoning" else text
        self._line_ends = text[len(told) :]
        if told:
            self._is_fresh = False
            self._tell(self._part, told)


def _beginning(text: str, tag: str) -> int:
    """How many of the last characters may begin a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
