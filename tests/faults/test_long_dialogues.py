"""A dialogue of thousands of turns costs what its distinct tokens cost: work is counted, in calls and characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.outcome import Outcome
from qwentune.data.rendering.pieces import ids_of
from qwentune.data.rendering.render import NUM_CHECKED_TURNS, Renderer, RenderOptions
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import template_text
from tests.dialogues import random_rows
from tests.test_templates import PUBLISHED, dialogue_of, parsed

WORDS = ["a", "few", "words", "of", "which", "a", "turn", "is", "made", "12", "*", "34", "=", "408", "今天", "é\n"]
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def text(rng: Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 30))) + f" {rng.random()}"


def chat(num_messages: int, *, reasoning: bool = False) -> dict[str, Any]:
    """A user and the answers, with reasoning where it is asked for."""
    rng, messages = Random(num_messages), list[dict[str, Any]]()
    for _ in range(num_messages // 2):
        thought = {"reasoning_content": text(rng)} if reasoning else {}
        messages += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng), **thought}]
    return {"messages": messages}


def loop(num_messages: int, *, ends: int = 1) -> dict[str, Any]:
    """One question, then calls of a tool with reasoning before most; `ends` answers end as many such loops."""
    rng, messages = Random(num_messages), list[dict[str, Any]]()
    for _ in range(ends):
        messages.append({"role": "user", "content": text(rng)})
        for k in range(num_messages // ends // 2 - 1):
            call = {"function": {"name": "look", "arguments": {"at": text(rng)}}}
            thought = {"reasoning_content": text(rng)} if k % 5 else {}
            messages += [{"role": "assistant", "content": "", "tool_calls": [call], **thought}]
            messages += [{"role": "tool", "content": text(rng)}]
        messages.append({"role": "assistant", "content": text(rng), "reasoning_content": text(rng)})
    return {"messages": messages, "tools": [LOOK]}


@dataclass
class Work:
    """What rendering a row took."""

    outcome: Outcome
    messages: int = 0  # given to the template
    written: int = 0  # characters
    encoded: int = 0
    literal: list[int] = field(default_factory=list[int])  # turns rendered by the rule


def work(template: str, row: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Work:
    tokenizer = load_tokenizer(folder)
    chat_template = ChatTemplate(template_text(template), tokenizer.special_tokens, {})
    renderer = Renderer(tokenizer, chat_template, RenderOptions(**{"max_tokens": 1 << 20, **options}))
    assert renderer.grammar is not None
    done = Work(Outcome(parsed(row).source))
    render, encode, literal_turn = ChatTemplate.render, Tokenizer.encode, Dialogue.literal_turn

    def rendered(self: ChatTemplate, conversations: Any, *args: Any, **kwargs: Any) -> list[str]:
        texts = render(self, conversations, *args, **kwargs)
        done.messages += sum(map(len, conversations))
        done.written += sum(map(len, texts))
        return texts

    def encoded(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        done.encoded += sum(map(len, texts))
        return encode(self, texts)

    def literal(self: Dialogue, i: int, first: int = 0) -> Any:
        done.literal.append(i)
        return literal_turn(self, i, first)

    with monkeypatch.context() as patched:
        patched.setattr(ChatTemplate, "render", rendered)
        patched.setattr(Tokenizer, "encode", encoded)
        patched.setattr(Dialogue, "literal_turn", literal)
        done.outcome = renderer.render(parsed(row))
    assert not done.outcome.problems
    return done


KINDS = {
    "qwen2_5": chat,
    "qwen3_instruct_2507": chat,
    "qwen3": loop,
    "qwen3_8": loop,
    "qwen3 with several loops": lambda num_messages: loop(num_messages, ends=4),
    "qwen3 with reasoning": lambda num_messages: chat(num_messages, reasoning=True),
}


@pytest.mark.fault("H67", "rendered about once: work and stored tokens grow with its distinct tokens, not their square")
@pytest.mark.parametrize("kind", KINDS)
def test_work_and_what_is_stored_grow_as_the_dialogue(
    kind: str, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, sizes = kind.split()[0], (200, 800)
    small, large = (work(template, KINDS[kind](size), qwen3_folder, monkeypatch) for size in sizes)
    assert len(large.outcome.modes) == sum(m["role"] == "assistant" for m in KINDS[kind](800)["messages"])
    assert len(large.literal) == len(small.literal) == large.outcome.checked_turns == NUM_CHECKED_TURNS
    for name in ("messages", "written", "encoded"):
        assert getattr(large, name) < 4.4 * getattr(small, name), name
    stored = [sum(len(example.tail) for example in done.outcome.examples) for done in (small, large)]
    assert stored[1] < 4.4 * stored[0]
    assert stored[1] < 2.5 * large.outcome.rendering_tokens


@pytest.mark.fault("H67", "too long: what fits is found by counting, and the rule confirms some of it")
@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3 with reasoning"])
def test_old_turns_are_dropped_by_counting(kind: str, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, sizes = kind.split()[0], (200, 800)
    options: dict[str, Any] = {"max_tokens": 1000, "too_long": "drop_old_turns"}
    small, large = (work(template, KINDS[kind](size), qwen3_folder, monkeypatch, **options) for size in sizes)
    assert not large.outcome.dropped
    assert len(large.outcome.modes) == 400
    assert all(0.7 * 1000 < example.num_tokens <= 1000 for example in large.outcome.examples[20:])
    assert len(large.literal) <= len(small.literal) + 2
    for name in ("messages", "written", "encoded"):
        assert getattr(large, name) < 4.4 * getattr(small, name), name


def first_that_fits(renderer: Renderer, dialogue: Dialogue, i: int) -> list[int] | None:
    """The ids of turn `i` without as few of the first exchanges as make it fit: each tried as a dialogue of its own."""
    users = [k for k in range(1, i) if dialogue.messages[k].role == "user"]
    for first in (0, *users):
        turn = dialogue.literal_turn(i, first)
        encoded = renderer.encoder.encode([turn.context, turn.target])
        ids = ids_of(turn.context, encoded) + ids_of(turn.target, encoded)
        if len(ids) <= renderer.options.max_tokens:
            return ids
    return None


@pytest.mark.fault("H67", "too long: the same beginning as if each were tried by the rule")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("is_read", [True, False], ids=["read", "by the rule"])
def test_the_first_beginning_that_fits_is_found(path: Path, qwen3_folder: Path, is_read: bool) -> None:
    tokenizer = load_tokenizer(qwen3_folder)
    template = ChatTemplate(path.read_text("utf-8"), tokenizer.special_tokens, {})
    num_shortened = 0
    for number, row in enumerate(random_rows(7, 6, reasoning=template.reasoning_form is not None, lists=False)):
        options = RenderOptions(max_tokens=200 + 40 * (number % 8), too_long="drop_old_turns")
        renderer = Renderer(tokenizer, template, options)
        if not is_read:
            renderer.__dict__["grammar"] = None
        dialogue = dialogue_of(renderer, row)
        outcome = renderer.render(parsed(row))
        if dialogue is None or outcome.problems:
            continue
        expected = {dialogue.message_index(i): first_that_fits(renderer, dialogue, i) for i in dialogue.trained}
        found = {span.turn: example.input_ids[: span.stop] for example in outcome.examples for span in example.spans}
        assert found == {i: ids for i, ids in expected.items() if ids is not None}
        assert [drop.turn for drop in outcome.dropped] == [i for i, ids in expected.items() if ids is None]
        num_shortened += sum(first_that_fits(renderer, dialogue, i) is not None for i in dialogue.trained)
    assert num_shortened
