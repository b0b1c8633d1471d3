"""The quick way to a dialogue's turns: what a template writes around messages is known, and the dialogue is rendered
about once instead of twice per turn.

Nothing here is known of any template: `probes.py` learns it. Where a dialogue does not look as the grammar expects, the
rule of `dialogue.py` has the word; and on a sample of every run both are compared.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwentune.data.rendering.conservation import first_lost
from qwentune.data.rendering.dialogue import Dialogue, through_last_control_token
from qwentune.data.rendering.pieces import Piece
from qwentune.data.rendering.turn import Part, Turn
from qwentune.data.sample import Json, RowError
from qwentune.data.templates.chat_template import Mode, TemplateRefusalError
from qwentune.data.templates.particulars import Particulars


@dataclass(frozen=True, slots=True)
class Grammar:
    """What one template writes around messages.

    `user` and `assistant` open a message of that role, each beginning with a control token; `prompts` are the whole
    generation prompts by mode; `stop` is the control token that ends an answer. `mode_matters` says that the mode of
    the prompt changes what stands before it, `particulars` are the words of which only the rule knows what comes of
    them. `rewrites` says that a message's rendering may depend on later ones; `loops`, that it then depends on those
    of the user and on whether it is the last; `cuts`, that without the first exchanges the others stand as they are.
    """

    user: str
    assistant: str
    prompts: dict[Mode, str]
    stop: str
    mode_matters: bool
    particulars: Particulars
    rewrites: bool
    loops: bool = False
    cuts: bool = False

    def turns(self, dialogue: Dialogue) -> list[Turn] | None:
        """The trained turns, as the rule gives them; None where it has media, or does not look as expected."""
        if dialogue.media is not None or self.particulars.occur_in(dialogue.lines):
            return None
        together: dict[Mode | None, list[int]] = {}
        for i in dialogue.trained:
            together.setdefault(dialogue.mode(i) if self.mode_matters else None, []).append(i)
        try:
            turns = [turn for trained in together.values() for turn in _Reading(self, dialogue, trained).turns()]
        except _UnexpectedError:
            return None
        return sorted(turns, key=lambda turn: turn.index)


class _UnexpectedError(Exception):
    """The rendering does not look as the grammar expects."""


class _Reading:
    """Trained turns of one dialogue, read off its rendering through the last of them."""

    def __init__(self, grammar: Grammar, dialogue: Dialogue, trained: Sequence[int]) -> None:
        self.grammar, self.dialogue, self.trained = grammar, dialogue, trained
        self.messages = dialogue.messages
        self.has_reasoning = dialogue.template.reasoning_form is not None
        self.last = trained[-1]
        self.exchanges = [k for k in range(self.last) if self.messages[k].role == "user"]
        self.num_leading = int(self.messages[0].role == "system")
        if not self.exchanges or self.exchanges[0] != self.num_leading:
            raise _UnexpectedError
        if any(self.messages[i - 1].role == "assistant" for i in trained):
            raise _UnexpectedError  # an answer often looks otherwise where it is the last message of a prompt
        self.rendering = self._rendered(range(self.last + 1))
        self.pieces = dialogue.split(self.rendering)
        self.ends = dialogue.encoder.ends(self.pieces)

    def turns(self) -> Iterator[Turn]:
        return self._rewritten() if self.grammar.rewrites else self._as_they_stand()

    def _as_they_stand(self) -> Iterator[Turn]:
        """Every turn is where the whole rendering has it."""
        openings = self._openings(self.rendering, range(self.num_leading, self.last + 1))
        for i in self.trained:
            yield self._turn_in_rendering(i, openings[i])

    def _rewritten(self) -> Iterator[Turn]:
        """Every turn is in the rendering that ends with it; what is before its exchange, as in the whole one."""
        position, exchange_before = 0, self.num_leading
        for first, trained in self._by_exchange():
            *others, last = trained
            if last == self.last:
                openings = self._openings(self.rendering, range(self.num_leading, last + 1))
                yield from (self._turn_in_loop(i, first, (), self.pieces, self.ends, openings[i]) for i in others)
                yield self._turn_in_rendering(last, openings[last])
                continue
            messages = range(first, last + 1)
            exchange = self._exchange(messages)
            openings = self._openings(exchange, messages)
            if first != exchange_before or not position:
                # With the answer's opening, for the message before may say the same.
                start = self.rendering.find(exchange[: min(openings.values())] + self.grammar.assistant, position)
                answers = sum(self.messages[k].role == "assistant" for k in range(exchange_before, first))
                if start < 0 or self.rendering.count(self.grammar.assistant, position, start) != answers:
                    raise _UnexpectedError
                position, exchange_before = start, first
            before = (Part(self.pieces, 0, bisect_right(self.ends, position)),)
            pieces = self.dialogue.split(exchange)
            ends = self.dialogue.encoder.ends(pieces)
            yield from (self._turn_in_loop(i, first, before, pieces, ends, openings[i]) for i in others)
            prompt, target = self._prompt_and_target(exchange, messages)
            yield Turn(last, (*before, _through(pieces, ends, openings[last])), prompt, target, self.starts)

    def _by_exchange(self) -> Iterator[tuple[int, list[int]]]:
        """The trained turns by the user's message before them; each on its own where loops are rewritten."""
        together: list[int] = []
        for i in self.trained:
            if together and (not self.grammar.loops or self._exchange_of(i) != self._exchange_of(together[-1])):
                yield self._exchange_of(together[-1]), together
                together = []
            together.append(i)
        yield self._exchange_of(together[-1]), together

    def _exchange_of(self, i: int) -> int:
        return self.exchanges[bisect_left(self.exchanges, i) - 1]

    def _turn_in_loop(
        self, i: int, first: int, before: tuple[Part, ...], pieces: Sequence[Piece], ends: Sequence[int], opening: int
    ) -> Turn:
        """Turn `i` of an exchange whose rendering goes on after it: what it says is that which it says in an exchange
        without what is before the answer before it."""
        answer = next((k for k in range(i - 1, first, -1) if self.messages[k].role == "assistant"), first + 1)
        messages = [first, *range(answer, i + 1)]
        prompt, target = self._prompt_and_target(self._exchange(messages), messages)
        return Turn(i, (*before, _through(pieces, ends, opening)), prompt, target, self.starts)

    def _prompt_and_target(self, exchange: str, messages: Sequence[int]) -> tuple[Sequence[Piece], Sequence[Piece]]:
        """The prompt of the last of the messages that an exchange renders, and what is trained after it."""
        opening = self._openings(exchange, messages)[messages[-1]]
        start = self._prompt_end(exchange, opening, messages[-1])
        self._prove_conserved(messages, exchange, start)
        target = through_last_control_token(exchange[start:], self.dialogue.tokenizer)
        if target is None:
            raise _UnexpectedError
        return self.dialogue.split(exchange[opening:start]), self.dialogue.split(target)

    def _turn_in_rendering(self, i: int, opening: int) -> Turn:
        pieces, ends = self.pieces, self.ends
        start = self._prompt_end(self.rendering, opening, i)
        stop = self.rendering.find(self.grammar.stop, start)
        if stop < 0:
            raise _UnexpectedError
        stop += len(self.grammar.stop)
        if i == self.last:
            if self.rendering[stop:].strip():
                raise _UnexpectedError
            self._prove_conserved(range(i + 1), self.rendering, start, self.dialogue.tools)
        else:
            self._prove_conserved(range(i, i + 1), self.rendering[start:stop], 0)
        first, end = bisect_right(ends, start), bisect_right(ends, stop)
        before = ends[first - 1] if first else 0
        if before == start:
            return Turn(i, (Part(pieces, 0, first),), (), pieces[first:end], self.starts)
        # The prompt ends within a piece: what is before and after its end is encoded apart, as on a server.
        context, target = self.rendering[before:start], self.rendering[start:stop]
        parts = (Part(pieces, 0, first),)
        return Turn(i, parts, self.dialogue.split(context), self.dialogue.split(target), self.starts)

    @cached_property
    def starts(self) -> list[int] | None:
        """The pieces with which the user's messages open; None where it is not asked for, or cannot be told."""
        if not self.grammar.cuts:
            return None
        openings = self._openings(self.rendering, range(self.num_leading, self.last + 1))
        found: list[int] = []
        since, position = 0, 0
        for answer, opening in openings.items():
            roles = [message.role for message in self.messages[since:answer]]
            users = _places(self.grammar.user, self.rendering, position, opening)
            if "user" in roles and ("tool" in roles or len(users) != roles.count("user")):
                return None  # what a tool says is often written as a user's message
            found += users if "user" in roles else []
            since, position = answer + 1, opening
        return [bisect_right(self.ends, place) for place in found]

    def _openings(self, text: str, messages: Sequence[int]) -> dict[int, int]:
        """Where in a text that renders the messages each of the assistant's opens."""
        positions = _places(self.grammar.assistant, text, 0, len(text))
        answers = [k for k in messages if self.messages[k].role == "assistant"]
        if len(answers) != len(positions):
            raise _UnexpectedError
        return dict(zip(answers, positions, strict=True))

    def _prompt_end(self, text: str, opening: int, i: int) -> int:
        prompt = self.grammar.prompts[self.dialogue.mode(i)]
        if not text.startswith(prompt, opening):
            raise _UnexpectedError
        return opening + len(prompt)

    def _exchange(self, messages: Sequence[int]) -> str:
        """The messages as they are rendered in a dialogue of their own."""
        rendering = self._rendered(messages)
        start = rendering.find(self.grammar.user)
        if start < 0:
            raise _UnexpectedError
        return rendering[start:]

    def _rendered(self, messages: Sequence[int]) -> str:
        dialogue, i = self.dialogue, messages[-1]
        try:
            if len(messages) == i + 1:
                if i == dialogue.trained[-1]:
                    return dialogue.rendering
                return dialogue.template.render([dialogue.rows[: i + 1]], dialogue.tools, mode=dialogue.mode(i))[0]
            # What stands before the first message is cut off: one tool does for all.
            rows = [dialogue.rows[k] for k in (*range(self.num_leading), *messages)]
            return dialogue.template.render([rows], dialogue.tools[:1], mode=dialogue.mode(i))[0]
        except (RowError, TemplateRefusalError):
            raise _UnexpectedError from None

    def _prove_conserved(
        self, kept: Sequence[int], rendering: str, context_length: int, tools: Sequence[dict[str, Json]] = ()
    ) -> None:
        messages = [self.messages[k] for k in kept]
        if first_lost(messages, tools, rendering, context_length, has_reasoning=self.has_reasoning) is not None:
            raise _UnexpectedError


def _through(pieces: Sequence[Piece], ends: Sequence[int], position: int) -> Part:
    """The pieces that end before a place of their text."""
    return Part(pieces, 0, bisect_right(ends, position))


def _places(word: str, text: str, start: int, stop: int) -> list[int]:
    """Where in a stretch of a text a word begins."""
    places: list[int] = []
    place = text.find(word, start, stop)
    while place >= 0:
        places.append(place)
        place = text.find(word, place + len(word), stop)
    return places


def same(turns: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether both say the same of every turn: its context, its target, and what is a control token."""
    return [_texts(turn) for turn in turns] == [_texts(turn) for turn in others]


class ReadOtherwiseError(Exception):
    """The turns of a row, its argument, that were read off one rendering are not those of the rule."""


def prove(dialogue: Dialogue, literal: Sequence[Turn], read: Sequence[Turn]) -> None:
    """ReadOtherwiseError where turns that were read off one rendering are not those of the rule."""
    if not same(literal, read):
        raise ReadOtherwiseError(dialogue.conversation.source)


def _texts(turn: Turn) -> tuple[int, list[Piece], list[Piece]]:
    before = [piece for part in turn.before for piece in part.pieces[part.start : part.stop]]
    return turn.index, _joined([*before, *turn.context]), _joined(turn.target)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with texts that stand side by side as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
