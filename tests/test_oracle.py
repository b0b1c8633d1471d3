"""The oracle, checked by eye: what it trains on a handful of rows, in ⟦ ⟧, and its laws on random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import template_text
from dialogues import chat_rows, random_rows
from hypothesis import given, settings
from oracle import UNTRAINED, UntrainableError, expected_examples, masked_text, reasoning_form
from transformers import PreTrainedTokenizerFast

DEFAULT_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
EMPTY_THINK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def qwen2(qwen2_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(qwen2_folder)


@pytest.fixture(scope="module")
def qwen3(qwen3_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(qwen3_folder)


def with_template(folder: Path, name: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template_text(name)
    return tokenizer


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def masked(
    tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], tools: Any = None, **options: Any
) -> list[str]:
    examples = expected_examples({"messages": list(messages), "tools": tools}, tokenizer, **options)
    return [masked_text(example, tokenizer) for example in examples]


def test_qwen2_5_trains_every_answer_of_a_dialogue_in_one_example(qwen2: PreTrainedTokenizerFast) -> None:
    assert masked(qwen2, user("hi"), assistant("hello"), user("bye"), assistant("ciao")) == [
        DEFAULT_SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n⟦ciao<|im_end|>⟧"
    ]


def test_qwen3_without_reasoning_has_its_empty_block_in_the_context(qwen3: PreTrainedTokenizerFast) -> None:
    assert masked(qwen3, user("hi"), assistant("hello")) == [
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{EMPTY_THINK}⟦hello<|im_end|>⟧"
    ]


def test_qwen3_with_reasoning_trains_the_whole_block(qwen3: PreTrainedTokenizerFast) -> None:
    expected = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nhello<|im_end|>⟧"]
    assert masked(qwen3, user("hi"), assistant("hello", reasoning_content="hm")) == expected
    assert masked(qwen3, user("hi"), assistant("hello", thinking="hm", reasoning=None)) == expected
    assert masked(qwen3, user("hi"), assistant("<think>\nhm\n</think>\n\nhello")) == expected
    assert masked(qwen3, user("hi"), assistant("hm\n</think>\n\nhello")) == expected


def test_qwen3_drops_history_and_so_makes_one_example_per_turn(qwen3: PreTrainedTokenizerFast) -> None:
    first = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert masked(qwen3, user("hi"), assistant("a", reasoning_content="r"), user("bye"), assistant("b")) == [
        first + "⟦<think>\nr\n</think>\n\na<|im_end|>⟧",
        first + "a<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n" + f"{EMPTY_THINK}⟦b<|im_end|>⟧",
    ]


def test_qwen3_keeps_the_reasoning_between_tool_calls_in_one_example(qwen3: PreTrainedTokenizerFast) -> None:
    shown = masked(
        qwen3,
        user("Oslo?"),
        assistant("", reasoning_content="ask", tool_calls=[call("f", '{"city": "Oslo", "n": null}')]),
        {"role": "tool", "content": "4"},
        assistant("cold", reasoning_content="4 is cold"),
    )
    assert shown == [
        "<|im_start|>user\nOslo?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nask\n</think>\n\n<tool_call>\n"
        '{"name": "f", "arguments": {"city": "Oslo", "n": null}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n4 is cold\n</think>\n\ncold<|im_end|>⟧"
    ]


def test_qwen2_5_writes_tools_parallel_calls_and_one_turn_of_results(qwen2: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    [shown] = masked(
        qwen2,
        user("both?"),
        assistant("wait", tool_calls=[call("f", {"x": 1}), call("f", '{"x": "二"}')]),
        {"role": "tool", "content": "one"},
        {"role": "function", "content": "two"},
        assistant("done"),
        tools=[tool],
    )
    system, dialogue = shown.split("<|im_end|>\n", 1)
    assert f"\n<tools>\n{json.dumps(tool)}\n</tools>\n" in system
    assert dialogue == (
        "<|im_start|>user\nboth?<|im_end|>\n<|im_start|>assistant\n⟦wait\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"x": "二"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦done<|im_end|>⟧"
    )


def test_turns_without_a_question_and_turns_marked_untrained_are_context(
    qwen2: PreTrainedTokenizerFast,
) -> None:
    shown = masked(
        qwen2,
        {"role": "developer", "content": "be kind"},
        assistant("welcome"),
        user("hi"),
        assistant("bad", train=False),
        user("again"),
        assistant("good"),
        user("never answered"),
    )
    assert shown == [
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>assistant\nwelcome<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n⟦good<|im_end|>⟧"
    ]


def test_only_the_last_turn_is_trained_where_the_recipe_says_so(qwen2: PreTrainedTokenizerFast) -> None:
    assert masked(qwen2, user("hi"), assistant("a"), user("bye"), assistant("b"), turns="last") == [
        DEFAULT_SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧"
    ]


def test_a_weight_stands_at_the_tokens_of_its_turn(qwen2: PreTrainedTokenizerFast) -> None:
    row = {"messages": [user("a"), assistant("x", weight=0.5), user("b"), assistant("y")]}
    [example] = expected_examples(row, qwen2)
    pairs = zip(example["weights"], example["labels"], strict=True)
    assert [weight for weight, label in pairs if label != UNTRAINED] == [0.5, 0.5, 1.0, 1.0]
    assert sum(example["weights"]) == 3.0
    assert expected_examples({"messages": [user("a"), assistant("x", weight=0)]}, qwen2) == []


def test_text_never_becomes_a_control_token(qwen3: PreTrainedTokenizerFast) -> None:
    row = {"messages": [user("<|im_end|>"), assistant("say <|endoftext|> or <")]}
    [example] = expected_examples(row, qwen3)
    ids, control = example["input_ids"], qwen3.get_added_vocab()
    assert ids.count(control["<|im_end|>"]) == 2
    assert control["<|endoftext|>"] not in ids
    assert masked_text(example, qwen3) == (
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        f"{EMPTY_THINK}⟦say <|endoftext|> or <<|im_end|>⟧"
    )


def test_the_context_and_the_target_are_encoded_separately(qwen2: PreTrainedTokenizerFast) -> None:
    newline, two_newlines = qwen2.convert_tokens_to_ids(["Ċ", "ĊĊ"])
    row = {"messages": [user("a"), assistant("\nx"), user("b"), assistant("y")]}
    first, second = expected_examples(row, qwen2)  # the history reads "assistant\n\nx", with other tokens
    assert next(label for label in first["labels"] if label != UNTRAINED) == newline
    assert two_newlines not in first["input_ids"]
    assert two_newlines in second["input_ids"]


def test_the_mode_can_be_forced(qwen3: PreTrainedTokenizerFast) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert masked(qwen3, user("hi"), assistant("a"), thinking="on") == [f"{prompt}⟦{EMPTY_THINK}a<|im_end|>⟧"]
    with pytest.raises(UntrainableError, match="does not extend its context"):
        masked(qwen3, user("hi"), assistant("a", reasoning_content="r"), thinking="off")


def test_reasoning_without_a_place_is_refused_dropped_or_written_inline(
    qwen2: PreTrainedTokenizerFast,
) -> None:
    messages = user("hi"), assistant("a", reasoning_content="r")
    prompt = DEFAULT_SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UntrainableError, match="no place for reasoning"):
        masked(qwen2, *messages)
    assert masked(qwen2, *messages, unsupported_reasoning="drop") == [f"{prompt}⟦a<|im_end|>⟧"]
    inline = [f"{prompt}⟦<think>\nr\n</think>\n\na<|im_end|>⟧"]
    assert masked(qwen2, *messages, unsupported_reasoning="inline") == inline
    assert masked(qwen2, user("hi"), assistant("<think>\nr\n</think>\n\na")) == inline


@pytest.mark.parametrize(
    ("name", "form"),
    [("qwen2_5", None), ("qwen3_instruct_2507", None), ("qwen3", "field"), ("qwen3_8", "field")],
)
def test_the_form_of_reasoning_is_read_off_the_template(name: str, form: str | None, qwen3_folder: Path) -> None:
    assert reasoning_form(with_template(qwen3_folder, name), {}) == form


def test_a_template_that_knows_only_inline_reasoning_gets_it_inline(qwen3_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen3_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert reasoning_form(tokenizer, {}) == "inline"
    assert masked(tokenizer, user("hi"), assistant("a", reasoning_content="r")) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦r\n</think>\n\na<|im_end|>⟧"
    ]


def test_text_parts_are_joined_as_they_stand(qwen2: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = "onetwo"
    assert masked(qwen2, user(parts), assistant(parts)) == masked(qwen2, user(joined), assistant(joined))


@settings(max_examples=40)
@given(row=chat_rows(reasoning=True))
def test_every_trained_span_is_an_answer_that_ends_its_turn(
    qwen3: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    examples = expected_examples(row, qwen3)
    end = qwen3.get_added_vocab()["<|im_end|>"]
    trained = [i for example in examples for i in example["turns"]]
    assert trained == sorted(set(trained))
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        assert all(label in (UNTRAINED, token) for label, token in zip(labels, ids, strict=True))
        assert labels.count(end) == len(example["turns"])
        assert labels[-1] == end


def test_random_rows_are_the_same_for_a_seed_and_render_with_both_templates(
    qwen2: PreTrainedTokenizerFast, qwen3: PreTrainedTokenizerFast
) -> None:
    rows = random_rows(seed=5, count=40)
    assert rows == random_rows(seed=5, count=40) != random_rows(seed=6, count=40)
    assert all(expected_examples(row, qwen2) and expected_examples(row, qwen3) for row in rows)
    assert json.loads(json.dumps(rows)) == rows
