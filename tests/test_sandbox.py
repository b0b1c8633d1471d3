"""Templates render as in transformers' own sandbox, and which of them could tell a bar in a text is known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from qwentune.data.formats.chat import parse
from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.sample import Conversation, RowError, Source
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.templates.sandbox import TEMPLATE_ERRORS, rendered
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from tests.dialogues import random_rows
from tests.test_templates import TEMPLATES

PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
END = "{% set end %}<|im_end|>{% endset %}"
SEES_BARS = {
    "replaces a token": PLAIN.replace("m.content", "m.content.replace('<|im_end|>', '')"),
    "looks for a token": PLAIN.replace("m.content", "('marked' if '<|im_end|>' in m.content else m.content)"),
    "cuts at the end of text": PLAIN.replace("m.content", "m.content.split(eos_token)[0]"),
    "cuts at a bar in a variable": "{% set bar = '|' %}" + PLAIN.replace("m.content", "m.content.split(bar)[0]"),
    "compares by a test": PLAIN.replace("m.content", "('a bar' if m.content[-1:] is eq('|') else m.content)"),
    "orders": PLAIN.replace("m.content", "('early' if m.content < '~' else m.content)"),
    "sorts": PLAIN.replace("m.content", "(m.content | list | sort | join)"),
    "escapes": PLAIN.replace("m.content", "(m.content | urlencode)"),
    "escapes each of a list": PLAIN.replace("m.content", "([m.content] | map('urlencode') | join)"),
    "orders by a test": PLAIN.replace("m.content", "([m.content] | reject('lt', '~') | join)"),
    "replaces what it writes, by name": END + PLAIN.replace("m.content", "(m.content | replace(old=end, new=''))"),
    "cuts at what it writes, in a list": END + PLAIN.replace("m.content", "m.content.split(*[end])[0]"),
    "finds what it writes in a list": END
    + PLAIN.replace("m.content", "('the end' if m.content in [end] else m.content)"),
    "compares with what it writes": "{% set ns = namespace(last='') %}{% macro end() %}<|im_end|>{% endmacro %}"
    + PLAIN.replace("m.content", "('the end' if m.content == end() else m.content)"),
}
WITH_BARS = "a | b ~ <|im_end|>|"
TEXTS = {
    "orders": "| a",
    "orders by a test": "| a",
    "finds what it writes in a list": "<|im_end|>",
    "compares with what it writes": "<|im_end|>",
}
SPECIALLY = re.escape("treats '|' in a text specially")


def outcome(render: Any, template: str, row: dict[str, Any]) -> tuple[str, str]:
    try:
        one = [{"role": m["role"], **{k: v for k, v in m.items() if k != "role"}} for m in row["messages"]]
        return "rendered", render(chat_template=template, conversations=[one], tools=row.get("tools"))[0]
    except TEMPLATE_ERRORS as error:
        return type(error).__name__, str(error)


@TEMPLATES
def test_a_template_renders_as_in_the_sandbox_that_nobody_touched(path: Path) -> None:
    template = path.read_text("utf-8")
    rows = random_rows(5, 40, reasoning=True, quoted_think=True)
    _compile_jinja_template.cache_clear()
    expected = [outcome(lambda **a: render_jinja_template(**a)[0], template, row) for row in rows]
    ours = [outcome(lambda chat_template, **a: rendered(chat_template, **a), template, row) for row in rows]
    assert ours == expected
    assert any(kind == "rendered" for kind, _ in ours)


@pytest.mark.parametrize("trap", ["messages.append(1)", "messages[0].__class__", "messages[0].update(a=1)", "''.x.y"])
def test_the_sandbox_refuses_what_it_refused(trap: str) -> None:
    template = f"{{{{ {trap} }}}}"
    row = {"messages": [{"role": "user", "content": "hi"}]}
    _compile_jinja_template.cache_clear()
    expected = outcome(lambda **a: render_jinja_template(**a)[0], template, row)
    twice = [outcome(lambda chat_template, **a: rendered(chat_template, **a), template, row) for _ in range(2)]
    assert twice == [expected, expected]
    assert expected[1] == "" or expected[0] != "rendered"


def test_a_field_may_have_the_name_of_a_method() -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "hi", "items": "a field"}]}
    shown = [
        outcome(lambda chat_template, **a: rendered(chat_template, **a), template, row)[1]
        for template in ("{{ messages[0].items is string }}", "{{ messages[0]['items'] }}", "{{ messages[0].missing }}")
    ]
    assert shown == ["False", "a field", ""]


# --- bars


def dialogue(template: str, text: str, tokenizer: Tokenizer, tools: list[Any] | None = None) -> Dialogue:
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    sample = parse({"messages": said, "tools": tools or []}, Source("x", 1))
    assert isinstance(sample, Conversation)
    renderer = Renderer(tokenizer, ChatTemplate(template, tokenizer.special_tokens, {}), RenderOptions(4096))
    assert renderer.template is not None
    return Dialogue.of(sample, renderer.template, renderer.options, renderer.encoder)


@TEMPLATES
def test_templates_that_ignore_bars_do(path: Path, qwen3_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen3_folder)
    template = ChatTemplate(path.read_text("utf-8"), tokenizer.special_tokens, {})
    renderer = Renderer(tokenizer, template, RenderOptions(4096))
    assert template.ignores_bars
    num_guarded = 0
    for number, row in enumerate(random_rows(6, 80, reasoning=template.reasoning_form is not None)):
        sample = parse(row, Source("x", number))
        assert isinstance(sample, Conversation)
        try:
            one = Dialogue.of(sample, template, renderer.options, renderer.encoder)
            one.prove_guard(by_rendering=False)
            num_guarded += one.guard != "|"
        except RowError:
            continue
        one.prove_guard(by_rendering=True)
    assert num_guarded > 10


@pytest.mark.parametrize("name", SEES_BARS)
def test_a_template_that_sees_bars_refuses_the_rows_with_bars(name: str, qwen3_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen3_folder)
    one = dialogue(SEES_BARS[name] + PROMPT, TEXTS.get(name, WITH_BARS), tokenizer)
    assert not one.template.ignores_bars
    with pytest.raises(RowError, match=SPECIALLY):
        one.prove_guard(by_rendering=False)


@pytest.mark.parametrize("shown", ["tools", "tools | string", "'' ~ tools"])
def test_a_guard_that_is_spelled_as_an_escape_is_seen(shown: str, qwen3_folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "a | b", "parameters": {}}}
    one = dialogue(f"{{{{ {shown} }}}}" + PLAIN + PROMPT, "a", load_tokenizer(qwen3_folder), [tool])
    assert one.template.ignores_bars
    with pytest.raises(RowError, match=SPECIALLY):
        one.prove_guard(by_rendering=False)
