"""Learns a template's grammar from probes: it is used only where it gives, for every one, just what the rule gives."""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.rendering.dialogue import Dialogue, RenderOptions
from qwentune.data.rendering.grammar import Grammar, same
from qwentune.data.rendering.pieces import Encoder
from qwentune.data.rendering.turn import Turn
from qwentune.data.sample import Conversation, Json, Message, RowError, Source, ToolCall
from qwentune.data.templates.chat_template import ChatTemplate, Mode, TemplateRefusalError


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
