"""The quick way to a dialogue's turns: what a template writes around messages is learnt from probes, and the dialogue
is rendered about once instead of twice per turn.

Nothing here is known of any template. A grammar is used only where it gives, for every probe, just what the rule of
`dialogue.py` gives; where a dialogue does not look as the grammar expects, the rule has the word; and on a sample of
every run both are compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwentune.data.conservation import first_lost
from qwentune.data.dialogue import Dialogue, RenderOptions, Turn, through_last_control_token
from qwentune.data.particulars import Particulars
from qwentune.data.pieces import Encoder, Piece
from qwentune.data.sample import Conversation, Json, Message, RowError, Source, ToolCall
from qwentune.data.template import ChatTemplate, Mode, TemplateRefusalError


@dataclass(frozen=True, slots=True)
class Grammar:
    """What one template writes around messages.

    `user` and `assistant` open a message of that role, each beginning with a control token; `prompts` are the whole
    generation prompts by mode; `stop` is the control token that ends an answer. `rewrites` says that a message's
    rendering may depend on later ones, `mode_matters` that the mode of the prompt changes what stands before it,
    `particulars` are the words of which only the rule knows what comes of them.
    """

    user: str
    assistant: str
    prompts: dict[Mode, str]
    stop: str
    mode_matters: bool
    particulars: Particulars
    rewrites: bool

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
        self.rendering = self._rendered(0, self.last)
        self.pieces = dialogue.split(self.rendering)
        self.ends = dialogue.encoder.ends(self.pieces)

    def turns(self) -> Iterator[Turn]:
        return self._rewritten() if self.grammar.rewrites else self._as_they_stand()

    def _as_they_stand(self) -> Iterator[Turn]:
        """Every turn is where the whole rendering has it."""
        openings = self._openings(self.rendering, self.num_leading, self.last)
        for i in self.trained:
            yield self._turn_in_rendering(i, openings[i])

    def _rewritten(self) -> Iterator[Turn]:
        """Every turn is in the rendering that ends with it; what is before its exchange, as in the whole one."""
        position, exchange_before = 0, self.num_leading
        for i in self.trained:
            if i == self.last:
                yield self._turn_in_rendering(i, self._openings(self.rendering, self.num_leading, i)[i])
                continue
            first = max(k for k in self.exchanges if k < i)
            exchange = self._exchange(first, i)
            openings = self._openings(exchange, first, i)
            if first != exchange_before or not position:
                # With the answer's opening, for the message before may say the same.
                start = self.rendering.find(exchange[: min(openings.values())] + self.grammar.assistant, position)
                answers = sum(self.messages[k].role == "assistant" for k in range(exchange_before, first))
                if start < 0 or self.rendering.count(self.grammar.assistant, position, start) != answers:
                    raise _UnexpectedError
                position, exchange_before = start, first
            stop = self._prompt_end(exchange, openings[i], i)
            self._prove_conserved(range(first, i + 1), exchange, stop)
            target = through_last_control_token(exchange[stop:], self.dialogue.tokenizer)
            if target is None:
                raise _UnexpectedError
            history = bisect_right(self.ends, position)
            yield Turn(i, self.pieces, history, self.dialogue.split(exchange[:stop]), self.dialogue.split(target))

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
            return Turn(i, pieces, first, (), pieces[first:end])
        # The prompt ends within a piece: what is before and after its end is encoded apart, as on a server.
        context, target = self.rendering[before:start], self.rendering[start:stop]
        return Turn(i, pieces, first, self.dialogue.split(context), self.dialogue.split(target))

    def _openings(self, text: str, first: int, last: int) -> dict[int, int]:
        """Where in a text that renders messages `first` to `last` each assistant message opens."""
        positions: list[int] = []
        position = text.find(self.grammar.assistant)
        while position >= 0:
            positions.append(position)
            position = text.find(self.grammar.assistant, position + 1)
        answers = [k for k in range(first, last + 1) if self.messages[k].role == "assistant"]
        if len(answers) != len(positions):
            raise _UnexpectedError
        return dict(zip(answers, positions, strict=True))

    def _prompt_end(self, text: str, opening: int, i: int) -> int:
        prompt = self.grammar.prompts[self.dialogue.mode(i)]
        if not text.startswith(prompt, opening):
            raise _UnexpectedError
        return opening + len(prompt)

    def _exchange(self, first: int, i: int) -> str:
        """Messages `first` to `i` as they are rendered in a dialogue that begins and ends with them."""
        rendering = self._rendered(first, i)
        start = rendering.find(self.grammar.user)
        if start < 0:
            raise _UnexpectedError
        return rendering[start:]

    def _rendered(self, first: int, i: int) -> str:
        dialogue = self.dialogue
        # What stands before the first message is cut off where this is not the whole dialogue: one tool does for all.
        rows, tools = dialogue.rows[: i + 1], dialogue.tools
        if first:
            rows, tools = [*dialogue.rows[: self.num_leading], *dialogue.rows[first : i + 1]], tools[:1]
        try:
            if not first and i == dialogue.trained[-1]:
                return dialogue.rendering
            return dialogue.template.render([rows], tools, mode=dialogue.mode(i))[0]
        except (RowError, TemplateRefusalError):
            raise _UnexpectedError from None

    def _prove_conserved(
        self, kept: range, rendering: str, context_length: int, tools: Sequence[dict[str, Json]] = ()
    ) -> None:
        messages = [self.messages[k] for k in kept]
        if first_lost(messages, tools, rendering, context_length, has_reasoning=self.has_reasoning) is not None:
            raise _UnexpectedError


def learn(template: ChatTemplate, options: RenderOptions, encoder: Encoder) -> Grammar | None:
    """The template's grammar; None where it writes dialogues in a way that cannot be read off, so that the rule rules.

    Of the two kinds, messages that stand as they are and messages that are rewritten, the one that reads more probes,
    each as the rule does.
    """
    if template.particulars is None:
        return None
    try:
        opened, answered = _opening(template, encoder), _stop(template, options, encoder)
    except (TemplateRefusalError, RowError, ValueError):
        return None
    kinds = [Grammar(*opened[:3], answered, opened[3], template.particulars, rewrites) for rewrites in (False, True)]
    num_read = [_num_probes_read(kind, template, options, encoder) for kind in kinds]
    return kinds[num_read.index(max(num_read))] if any(num_read) else None


def same(turns: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether both say the same of every turn: its context, its target, and what is a control token."""
    return [_texts(turn) for turn in turns] == [_texts(turn) for turn in others]


def _texts(turn: Turn) -> tuple[int, list[Piece], list[Piece]]:
    return turn.index, _joined([*turn.history[: turn.num_history], *turn.context]), _joined(turn.target)


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
        if read is not None and (literal is None or not same(literal, read)):
            return 0
        num_read += read is not None
    return num_read


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
