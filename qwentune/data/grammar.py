"""The quick way to a dialogue's turns: what a template writes around messages is learnt from probes, and the dialogue
is rendered about once instead of twice per turn.

Nothing here is known of any template. A grammar is used only where it gives, for every probe, just what the rule of
`dialogue.py` gives; where a dialogue does not look as the grammar expects, the rule has the word; and on a sample of
every run both are compared.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qwentune.data.conservation import first_lost
from qwentune.data.dialogue import Dialogue, RenderOptions, through_last_control_token
from qwentune.data.particulars import Particulars
from qwentune.data.pieces import Encoder, Piece
from qwentune.data.sample import Conversation, Json, Message, RowError, Source, ToolCall
from qwentune.data.template import ChatTemplate, Mode, TemplateRefusalError
from qwentune.data.turn import Part, Turn
from qwentune.errors import DataError, Problem


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
        """The trained turns, as the rule gives them; None where the dialogue does not look as expected."""
        if self.particulars.occur_in(dialogue.lines):
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


def learn(template: ChatTemplate, options: RenderOptions, encoder: Encoder) -> Grammar | None:
    """The template's grammar; None where it writes dialogues in a way that cannot be read off, so that the rule rules.

    Of three kinds, messages that stand as they are, that each of the user's rewrites, and that each answer rewrites,
    the one that reads most probes, each as the rule does.
    """
    if template.particulars is None:
        return None
    try:
        opened, answered = _opening(template, encoder), _stop(template, options, encoder)
    except (TemplateRefusalError, RowError, ValueError):
        return None
    known = (*opened[:3], answered, opened[3], template.particulars)
    kinds = [Grammar(*known, rewrites, loops) for rewrites, loops in ((False, False), (True, True), (True, False))]
    num_read = [_num_probes_read(kind, template, options, encoder) for kind in kinds]
    if not any(num_read):
        return None
    best = kinds[num_read.index(max(num_read))]
    if options.too_long != "drop_old_turns":
        return best
    cutting = replace(best, cuts=True)
    return cutting if _num_probes_read(cutting, template, options, encoder) else best


def _through(pieces: Sequence[Piece], ends: Sequence[int], position: int) -> Part:
    """The pieces that end before a place of their text."""
    return Part(pieces, 0, bisect_right(ends, position))


def _places(word: str, text: str, start: int, stop: int) -> list[int]:
    """Where in a stretch of a text a word begins."""
    return [match.start() for match in re.compile(re.escape(word)).finditer(text, start, stop)]


def same(turns: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether both say the same of every turn: its context, its target, and what is a control token."""
    return [_texts(turn) for turn in turns] == [_texts(turn) for turn in others]


def prove(dialogue: Dialogue, literal: Sequence[Turn], read: Sequence[Turn]) -> None:
    """DataError where turns that were read off one rendering are not those of the rule."""
    if not same(literal, read):
        what = "the turns read off one rendering are not what the chat template gives turn by turn"
        fix = "This is a bug of qwentune: please report it with the row."
        raise DataError(Problem(str(dialogue.conversation.source), what, fix))


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


def _opening(template: ChatTemplate, encoder: Encoder) -> tuple[str, str, dict[Mode, str], bool]:
    """What opens a user's message and an answer, the prompts by mode, and whether a mode changes what stands before.

    ValueError where they are not found.
    """
    word = "question"
    modes: tuple[Mode, ...] = ("thinking", "non_thinking") if template.has_thinking_switch else ("default",)
    prompts: dict[Mode, str] = {}
    questions: set[str] = set()
    opened = ""
    for mode in modes:
        asked = template.render([[{"role": "user", "content": word}]], mode=mode)[0]
        prompt = template.render([[{"role": "user", "content": word}]], mode=mode, generation_prompt=True)[0]
        prompts[mode] = prompt.removeprefix(asked)
        questions.add(asked)
        opened = asked[: asked.index(word)]
    markers = [match.start() for match in encoder.tokenizer.control_pattern.finditer(opened)]
    answers = {prompt[: prompt.index("\n") + 1] for prompt in prompts.values()}
    if not markers or len(answers) != 1 or not encoder.tokenizer.control_pattern.match(min(answers)):
        raise ValueError
    return opened[markers[-1] :], answers.pop(), prompts, len(questions) > 1


def _stop(template: ChatTemplate, options: RenderOptions, encoder: Encoder) -> str:
    """The control token that ends an answer; ValueError where another does."""
    dialogue = Dialogue.of(_PROBES[0], template, options, encoder)
    token = dialogue.literal_turn(dialogue.trained[0]).target[-1]
    (name,) = (name for name, token_id in encoder.tokenizer.control_ids.items() if token_id == token)
    return name


def _num_probes_read(grammar: Grammar, template: ChatTemplate, options: RenderOptions, encoder: Encoder) -> int:
    """How many probes the grammar reads, each as the rule has it; 0 where one is read otherwise."""
    num_read = 0
    for probe in _PROBES:
        try:
            dialogue = Dialogue.of(probe, template, options, encoder)
        except RowError:
            continue
        read = grammar.turns(dialogue)
        try:
            literal = dialogue.literal_turns()
        except RowError:
            literal = None
        if read is not None and (
            literal is None or not same(literal, read) or not all(_cuts_as_the_rule(turn, dialogue) for turn in read)
        ):
            return 0
        num_read += read is not None
    return num_read


def _cuts_as_the_rule(turn: Turn, dialogue: Dialogue) -> bool:
    """Whether what is left of the turn without the first exchanges is what the rule gives."""
    users = [k for k in range(turn.index) if dialogue.messages[k].role == "user"]
    try:
        return all(
            same([dialogue.literal_turn(turn.index, users[number])], [turn.beginning(number)])
            for number in range(1, turn.num_starts)
        )
    except RowError:
        return False


def _probe(*messages: Message, tools: int = 0) -> Conversation:
    return Conversation(Source("probe", 1), messages, tuple(_tool(name) for name in ("look", "go", "ask")[:tools]))


def _tool(name: str) -> dict[str, Json]:
    function: dict[str, Json] = {
        "name": name,
        "description": "Does it.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }
    return {"type": "function", "function": function}


def _user(text: str) -> Message:
    return Message("user", text)


def _answer(text: str, reasoning: str | None = None, calls: int = 0, weight: float = 1.0) -> Message:
    return Message("assistant", text, reasoning, (ToolCall("look", {"at": "it"}),) * calls, weight)


_SYSTEM = Message("system", "be brief")
_RESULT = Message("tool", "seen")
# One probe for each thing that makes templates rewrite what stands before.
_PROBES = (
    _probe(_user("one"), _answer("two"), _user("three"), _answer("four"), _user("five"), _answer("six")),
    _probe(_SYSTEM, _user("one"), _answer("two"), _user("three"), _answer("four")),
    _probe(_user("one"), _answer("two"), _user("three"), _answer("four"), tools=3),
    _probe(_user("a"), _answer("b", "because"), _user("c"), _answer("d"), _user("e"), _answer("f", "since")),
    _probe(_SYSTEM, _user("a"), _answer("b", "because"), _user("c"), _answer("d", "since"), _user("e"), _answer("f")),
    _probe(
        *(_user("a"), _answer("", calls=1), _RESULT, _answer("b"), _user("c"), _answer("d", calls=2)),
        *(_RESULT, _RESULT, _answer("e"), _user("f"), _answer("g")),
        tools=3,
    ),
    _probe(
        *(_SYSTEM, _user("a"), _answer("", "look", calls=1), _RESULT, _answer("b", "seen"), _user("c")),
        *(_answer("d", "look", calls=1), _RESULT, _answer("e"), _user("f"), _answer("g", "so")),
        tools=1,
    ),
    _probe(
        *(_SYSTEM, _user("a"), _answer("", "look", calls=1), _RESULT, _answer("b", calls=1), _RESULT, _RESULT),
        *(_answer("", "so", calls=2), _RESULT, _answer("c", calls=1), _RESULT, _answer("d", "seen"), _user("e")),
        *(_answer("f", "look", calls=1), _RESULT, _answer("", calls=1), _RESULT, _answer("g", calls=1), _RESULT),
        _answer("h", "so"),
        tools=2,
    ),
    _probe(_user("a"), _user("b"), _answer("c"), _answer("d", "because"), _user("e"), _answer("f")),
    _probe(_user("a"), _answer("b", weight=0), _answer("c"), _user("d"), _answer("e", weight=0), _answer("f")),
    _probe(
        _user("a"), _answer("b", "so", weight=0), _answer("c"), _user("d"), _answer("e", "so", weight=0), _answer("f")
    ),
    _probe(
        _user("a"), _answer("<think>\nb\n</think>\n\nc"), _user("d"), _answer("e </think> f"), _user("g"), _answer("h")
    ),
    _probe(_user(" a\n"), _answer("\n\nb\n"), _user("\n"), _answer("  c "), _user(""), _answer("")),
    _probe(_user("a"), _answer("b", weight=0), _user("a"), _answer("b", "because"), _user("a"), _answer("c", weight=0)),
    _probe(_user("a"), _answer("b", "because", weight=0), _user("a"), _answer("c"), _user("a"), _answer("b")),
)
