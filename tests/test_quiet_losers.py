"""What chat templates lose without a word is either rendered right or said with its row; never trained in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions
from tests.checkpoints import template_text

# The one of QwQ-32B in short: it drops the field, keeps inline reasoning in the last turn and strips it from history.
QWQ = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == "assistant" and not loop.last %}{% set content = content.split("</think>")[-1].lstrip("\n") %}
{%- endif %}
{{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n<think>\n" }}{% endif %}
"""
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"function": {"name": "look", "arguments": {"at": "it"}}}]
TEXT_TEMPLATES = ("qwen2_5", "qwen3", "qwen3_instruct_2507")
PART_TEMPLATES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5_think", "qwen3_8")


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


class Run:
    """Rows rendered by a template, as a run would."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        Path("template.jinja").write_text(QWQ if template == "qwq" else template_text(template))

    def prepared(self, *messages: dict[str, Any], **row: Any) -> Dataset:
        Path("rows.jsonl").write_text(json.dumps({"messages": messages, **row}))
        options: dict[str, Any] = {"train": [{"path": "rows.jsonl"}], "chat_template": "template.jinja"}
        data = DataOptions.model_validate({**options, "max_tokens": 4096, "eval_fraction": 0})
        return prepare(data, self.tokenizer, chat_template(data, self.tokenizer), 0)

    def last(self, *messages: dict[str, Any], **row: Any) -> tuple[str, str]:
        """Context and target of the last trained turn."""
        examples = self.prepared(*messages, **row).examples
        example = examples.example(len(examples) - 1)
        start, decode = example.spans[-1].start, self.tokenizer.decode
        return decode(example.input_ids[:start]), decode(example.input_ids[start:])

    def warning(self, words: str, *messages: dict[str, Any], **row: Any) -> str:
        """The warning that holds these words; it names the row."""
        (warning,) = (w for w in self.prepared(*messages, **row).report["warnings"] if words in w)
        assert warning.endswith("First: rows.jsonl:1")
        return warning

    def refusal(self, *messages: dict[str, Any], **row: Any) -> str:
        """What is said of the row that is refused."""
        with pytest.raises(DataError) as refused:
            self.prepared(*messages, **row)
        (problem,) = refused.value.problems
        assert problem.where == "rows.jsonl:1"
        assert problem.fix
        return problem.what


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> Tokenizer:
    return load_tokenizer(qwen3_folder)


@pytest.fixture
def run(template: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    return Run(template, tokenizer)


@pytest.mark.parametrize("template", ["qwen2_5_vl"])
def test_calls_that_the_template_drops_are_refused(run: Run) -> None:
    assert "leaves out the call of 'look'" in run.refusal(user(), answer("", tool_calls=CALLS))
    result = {"role": "tool", "content": "seen"}
    assert "leaves out the call of 'look'" in run.refusal(user(), answer("", tool_calls=CALLS), result, answer())
    assert "leaves out the tool 'look'" in run.refusal(user(), answer(), tools=TOOLS)


@pytest.mark.parametrize("template", [*TEXT_TEMPLATES, *PART_TEMPLATES])
def test_contents_in_text_parts_are_rendered_as_one_text(run: Run) -> None:
    context, target = run.last(user(parts("how ", "are you")), answer(parts("fine")))
    assert "<|im_start|>user\nhow are you<|im_end|>" in context
    assert target == "fine<|im_end|>"


@pytest.mark.parametrize("template", TEXT_TEMPLATES)
def test_that_servers_join_parts_otherwise_is_said_where_the_template_takes_no_parts(run: Run) -> None:
    assert run.warning("1 content has several text parts", user(parts("how ", "are you")), answer(parts("fine")))


@pytest.mark.parametrize("template", PART_TEMPLATES[1:])
def test_that_servers_join_the_parts_of_a_tools_answer_themselves_is_said(run: Run) -> None:
    result = {"role": "tool", "content": parts("how ", "are you")}
    assert run.warning("1 content has several text parts", user(), answer("", tool_calls=CALLS), result, answer())


@pytest.mark.parametrize("template", PART_TEMPLATES)
def test_a_template_that_takes_parts_joins_them_itself(run: Run) -> None:
    warnings = run.prepared(user(parts("how ", "are you")), answer()).report["warnings"]
    assert not [warning for warning in warnings if "parts" in warning]


@pytest.mark.parametrize("template", [*TEXT_TEMPLATES, *PART_TEMPLATES])
def test_what_is_no_text_is_refused_though_a_template_may_render_nothing_or_a_place_for_it(run: Run) -> None:
    said = {
        "messages[0].content[0] is an image, and this model takes text only": {"type": "image", "image": "a.png"},
        "messages[0].content[0] is of the type 'file'": {"type": "file", "file": "a.pdf"},
    }
    for fault, part in said.items():
        assert fault in run.refusal(user([part]), answer())


DEVELOPER = {"role": "developer", "content": "be brief"}


@pytest.mark.parametrize("template", [*TEXT_TEMPLATES, *PART_TEMPLATES])
def test_the_developer_speaks_as_the_system(run: Run) -> None:
    before, instruction, _ = run.last(DEVELOPER, user(), answer())[0].partition("be brief")
    assert instruction
    assert before.startswith("<|im_start|>system\n")


@pytest.mark.parametrize("template", [*TEXT_TEMPLATES, "qwen2_5_vl"])
def test_the_developer_may_speak_later_where_the_system_may(run: Run) -> None:
    assert "<|im_start|>system\nbe brief<|im_end|>" in run.last(user(), answer(), DEVELOPER, user(), answer())[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("qwen3_vl", "leaves out the text 'be brief', which the system says"),
        ("qwen3_5_think", "System message must be at the beginning"),
        ("qwen3_8", "System message must be at the beginning"),
    ],
)
def test_a_developer_whom_the_template_does_not_hear_is_refused(run: Run, reason: str) -> None:
    assert reason in run.refusal(user(), answer(), DEVELOPER, user(), answer())


@pytest.mark.parametrize("template", ["qwq"])
def test_reasoning_given_as_a_field_reaches_a_template_that_reads_it_inline_only(run: Run) -> None:
    context, target = run.last(user(), answer("hello", reasoning_content="because"))
    assert context.endswith("<|im_start|>assistant\n<think>\n")
    assert target == "because\n</think>\n\nhello<|im_end|>"


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_8"])
@pytest.mark.parametrize(
    "content",
    ["<think>\nbecause\n</think>\n\nhello", "<think>because</think>hello", "because\n</think>\n\nhello"],
    ids=["inline", "inline without line feeds", "raw completion with only the closing tag"],
)
def test_inline_reasoning_is_reasoning(run: Run, content: str) -> None:
    context, target = run.last(user(), answer(content))
    assert context + target == "".join(run.last(user(), answer("hello", reasoning_content="because")))
    assert target.endswith("because\n</think>\n\nhello<|im_end|>")


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_8"])
def test_an_answer_after_reasoning_may_quote_the_closing_tag(run: Run) -> None:
    _, target = run.last(user(), answer("</think> closes it", reasoning_content="because"))
    assert target.endswith("because\n</think>\n\n</think> closes it<|im_end|>")


QUOTES = ("write </think> to close it", "because</think>hello", "because</think>\n\nhello", "a <think>b</think> c")


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_6"])
@pytest.mark.parametrize("content", QUOTES)
def test_an_answer_that_the_template_splits_at_a_tag_is_refused(run: Run, content: str) -> None:
    what = "messages[1] holds </think>, and the chat template takes what stands before it for reasoning"
    assert run.refusal(user(), answer(content)) == what
    assert run.refusal(user(), answer(content, train=False), user(), answer()) == what


@pytest.mark.parametrize("template", ["qwen3_8", "qwen2_5", "qwen3_instruct_2507"])
@pytest.mark.parametrize("content", [*QUOTES, "<think>\nbecause"])
def test_a_tag_that_is_trained_as_text_is_said(run: Run, content: str) -> None:
    assert run.last(user(), answer(content))[1] == f"{content}<|im_end|>"
    assert run.warning("think tags that are not taken", user(), answer(content)).startswith("1 turn ")


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507"])
def test_reasoning_that_a_template_has_no_place_for_is_refused(run: Run) -> None:
    assert "has reasoning, but" in run.refusal(user(), answer("hello", reasoning_content="because"))


@pytest.mark.parametrize("template", ["qwen3"])
def test_a_turn_that_no_server_is_asked_for_is_said(run: Run) -> None:
    assert run.warning("1 turn has no user turn before it", answer("welcome"), user(), answer())
