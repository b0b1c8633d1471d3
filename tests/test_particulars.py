"""Templates that write otherwise where a text holds a word or a dialogue is long: the rule has the word there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest

from qwentune.data.formats.chat import parse
from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.grammar import same
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.sample import Conversation, RowError, Source
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.templates.particulars import Particulars, particulars
from qwentune.data.tokenizing.tokenizer import load_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


def template(before: str = "", header: str = "", end: str = "", prompt: str = "") -> str:
    """A plain template with something before its messages, after headers, before ends, and in its prompt."""
    return (
        "{% set ns = namespace(last=0, short=false) %}"
        "{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}"
        f"{before}{{% if tools %}}<|im_start|>system\n{{{{ tools | tojson }}}}<|im_end|>\n{{% endif %}}"
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
        f"{header}{{{{ m.content }}}}{end}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{prompt}{{% endif %}}"
    )


SHORT = "{% if m.role == 'assistant' and '/short' in messages[loop.index0 - 1].content %}In short: {% endif %}"
SHORT_PROMPT = "{% if '/short' in messages[-1].content %}In short: {% endif %}"
SYSTEM_SWITCH = (
    "{% if messages[0].role == 'system' and '/short' in messages[0].content %}{% set ns.short = 1 %}{% endif %}"
)
QUESTION = "{% if m.role == 'assistant' and messages[loop.index0 - 1].content[-1:] == '?' %}A: {% endif %}"
ONCE_OLD = "{{% if m.role == 'assistant' and not loop.last and {} %}}…{{% endif %}}"
TEMPLATES = {
    "word": template(header=SHORT, prompt=SHORT_PROMPT),
    "word in a variable": template(
        "{% set word = '/short' %}", SHORT.replace("'/short'", "word"), prompt=SHORT_PROMPT.replace("'/short'", "word")
    ),
    "word of the system": template(
        SYSTEM_SWITCH,
        "{% if m.role == 'assistant' and ns.short %}In short: {% endif %}",
        prompt="{% if ns.short %}In short: {% endif %}",
    ),
    "last character": template(header=QUESTION, prompt="{% if messages[-1].content[-1:] == '?' %}A: {% endif %}"),
    "long dialogue": template(header="{% if messages | length - loop.index0 > 8 %}[earlier] {% endif %}"),
    "long answer": template(
        end="{% if m.role == 'assistant' and not loop.last and m.content | length > 40 %}…{% endif %}"
    ),
    "several tools": template(
        end="{% if tools and tools | length > 1 and m.role == 'assistant' and not loop.last %}…{% endif %}"
    ),
    "an echo": template(
        header="{% if m.role == 'assistant' and messages[loop.index0 - 1].content == m.content %}Again: {% endif %}"
    ),
    "an echo in a list": template(end=ONCE_OLD.format("messages[loop.index0 - 1].content in [m.content]")),
    "an echo by a test": template(end=ONCE_OLD.format("messages[loop.index0 - 1].content is eq(m.content)")),
    "an echo by the loop": template(end=ONCE_OLD.format("not loop.changed(m.content)")),
    "an echo at the beginning": template(
        end=ONCE_OLD.format("m.content.startswith(messages[loop.index0 - 1].content)")
    ),
    "the same said anywhere": template(
        end=ONCE_OLD.format("(messages | selectattr('content', 'equalto', m.content) | list)[1] is defined")
    ),
    "users counted": template(
        header="{% if m.role == 'assistant' and (loop.last or loop.index0 > messages | selectattr('role', 'equalto', "
        "'user') | list | length) %}[kept] {% endif %}"
    ),
    "answer after an answer": template(end="{% if loop.last and m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"),
}


def rows() -> list[dict[str, Any]]:
    plain = [("user", "a"), ("assistant", "b")]
    dialogues = [
        [*plain, ("user", "be quick /short"), ("assistant", "c"), ("user", "d"), ("assistant", "e")],
        [("system", "/short"), *plain, *plain],
        [*plain, ("user", "why?"), ("assistant", "so"), *plain],
        [*plain, ("user", "q"), ("assistant", "a long answer " * 5), *plain],
        plain * 6,
        [
            *plain,
            ("tool", "c"),
            ("assistant", "d"),
            ("user", "e"),
            ("assistant", "f"),
            ("user", "g"),
            ("assistant", "h"),
        ],
        [*plain, ("user", "b"), ("assistant", "b"), *plain],
        [("user", "c"), ("assistant", "c"), *plain],
        [*plain, ("user", "a"), ("assistant", "b"), ("assistant", "c"), *plain],
    ]
    messages = [[{"role": role, "content": text} for role, text in said] for said in dialogues]
    messages[-1][3]["train"] = False
    return [{"messages": m, "tools": tools} for m in messages for tools in ([], [TOOL], [TOOL] * 2)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_probes_cannot_show_is_left_to_the_rule(name: str, qwen3_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen3_folder)
    chat_template = ChatTemplate(TEMPLATES[name], tokenizer.special_tokens, {})
    renderer = Renderer(tokenizer, chat_template, RenderOptions(max_tokens=1 << 20))
    for row in rows():
        sample = parse(row, Source("rows.jsonl", 1))
        assert isinstance(sample, Conversation)
        dialogue = Dialogue.of(sample, chat_template, renderer.options, renderer.encoder)
        read = renderer.grammar.turns(dialogue) if renderer.grammar else None
        try:
            literal = dialogue.literal_turns()
        except RowError:
            assert read is None
        else:
            assert read is None or same(literal, read)


def test_a_switch_that_only_dialogues_with_tools_have_is_found(qwen3_folder: Path) -> None:
    text = template(prompt="{% if tools and enable_thinking is false %}{{ '<think></think>' }}{% endif %}")
    assert ChatTemplate(text, load_tokenizer(qwen3_folder).special_tokens, {}).has_thinking_switch


@pytest.mark.parametrize(
    ("expression", "within", "whole"),
    [
        ("'x' in m.content", {"x"}, set[str]()),
        ("m.content.startswith('<x>')", {"<x>"}, set[str]()),
        ("m.content | replace('x', 'y')", {"x", "y"}, set[str]()),
        ("m.content | trim == 'x'", {"x"}, set[str]()),
        ("m.role == 'user' or m['role'] in ['tool', 'x']", set[str](), {"user", "tool", "x"}),
        ("'tool_calls' in m", set[str](), set[str]()),
        ("'</think>' in m.content or '\\n' in m.content", set[str](), set[str]()),
        ("m | tojson(indent=4)", set[str](), set[str]()),
    ],
)
def test_words_looked_for(expression: str, within: set[str], whole: set[str]) -> None:
    tree = jinja2.Environment().parse(f"{{% for m in messages %}}{{{{ {expression} }}}}{{% endfor %}}")
    assert particulars(tree) == Particulars(frozenset(within), frozenset(whole))


@pytest.mark.parametrize(
    "expression", ["messages | length > 8", "messages[-2:]", "loop.index0 % 2 == 0", "m.a == n.a", "a in b"]
)
def test_templates_that_count_or_compare_are_left_to_the_rule(expression: str) -> None:
    assert particulars(jinja2.Environment().parse(f"{{{{ {expression} }}}}")) is None


def test_case_is_ignored_where_the_template_does() -> None:
    found = particulars(jinja2.Environment().parse("{{ '/Short' in m.content | lower }}"))
    assert found
    assert found.occur_in("be quick /SHORT")
    assert not found.occur_in("be quick")
