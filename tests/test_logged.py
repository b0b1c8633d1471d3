"""Logged calls, Anthropic's messages, completions: each is read as the same dialogue written plainly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.formats import FORMATS, detect
from qwentune.data.layout.split import dialogues
from qwentune.data.sample import Completion, Conversation, Source
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions
from qwentune.row_formats import CALLS
from tests.oracle import expected_examples
from tests.test_formats import TEMPLATES
from tests.test_render import as_previewed, renderer_of

SOURCE = Source("calls.jsonl", 7)
Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
ANSWER: Json = {"role": "assistant", "content": "hello"}
TOOL = {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object", "properties": {"word": {}}}}


def parsed(row: Json) -> Any:
    format = detect([row])
    assert format is not None, row
    sample = FORMATS[format](row, SOURCE)
    assert not isinstance(sample, list), sample
    return sample


def faults(row: Json) -> list[str]:
    problems = FORMATS[detect([row]) or "request"](row, SOURCE)
    assert isinstance(problems, list)
    return [f"{problem.what} {problem.fix}" for problem in problems]


# --- dialogues written plainly, and the same as others log them


def dialogue(random: Random) -> list[Json]:
    """A dialogue with calls, results and reasoning, which ends with an answer."""

    def text() -> str:
        return f"{random.choice(('Well', 'So', '什么', '<b>'))} {random.randrange(1000)}."

    def answer(**fields: Any) -> Json:
        return {
            "role": "assistant",
            "content": text(),
            **({"reasoning_content": text()} if random.random() < 0.5 else {}),
            **fields,
        }

    messages: list[Json] = [{"role": "system", "content": text()}] if random.random() < 0.5 else []
    for number in range(random.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if random.random() < 0.6:
            calls = [
                {
                    "id": f"c{number}{k}",
                    "type": "function",
                    "function": {"name": "look_up", "arguments": {"word": text()}},
                }
                for k in range(random.randint(1, 2))
            ]
            messages.append(answer(tool_calls=calls))
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": text()} for call in calls]
            if random.random() < 0.3:  # in Anthropic's API one message with the results
                messages.append({"role": "user", "content": text()})
        messages.append(answer())
    return messages


def as_chat_completions(messages: list[Json]) -> Json:
    *asked, answer = json.loads(json.dumps(messages))
    for call in (call for message in (*asked, answer) for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    ended = "tool_calls" if "tool_calls" in answer else "stop"
    return {
        "request": {
            "model": "m",
            "messages": asked,
            "tools": [{"type": "function", "function": TOOL}],
            "max_tokens": 9,
        },
        "response": {
            "id": "x",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {**answer, "refusal": None}, "finish_reason": ended, "logprobs": None}],
            "usage": {"total_tokens": 3},
        },
    }


def as_anthropic_messages(messages: list[Json]) -> Json:
    """A row of the format chat whose messages are Anthropic's."""
    turned: list[Json] = []
    for message in messages:
        blocks: list[Json] = []
        if message["role"] == "tool":
            result = {"type": "text", "text": message["content"]}
            blocks.append(
                {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": [result], "is_error": True}
            )
        else:
            if "reasoning_content" in message:
                blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": "s"})
            blocks.append({"type": "text", "text": message["content"], "citations": None})
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"].values()
                blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": arguments})
        role = "user" if message["role"] == "tool" else message["role"]
        if turned and turned[-1]["role"] == role == "user":
            turned[-1]["content"] += blocks
        else:
            turned.append({"role": role, "content": blocks})
    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    return {"messages": turned, "tools": [tool]}


def as_anthropic(messages: list[Json]) -> Json:
    row = as_anthropic_messages(messages)
    *asked, answer = row["messages"]
    if asked[0]["role"] == "system":
        row["system"] = asked.pop(0)["content"]
    ended = "tool_use" if "tool_calls" in messages[-1] else "end_turn"
    response = {"id": "m", "type": "message", "model": "m", **answer, "stop_reason": ended, "stop_sequence": None}
    return {
        "request": {**row, "messages": asked, "max_tokens": 9, "thinking": {"type": "enabled"}},
        "response": response,
    }


def as_responses(messages: list[Json]) -> Json:
    items: list[list[Json]] = []  # of each message
    for message in messages:
        items.append([])
        if message["role"] == "tool":
            items[-1].append(
                {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
            )
            continue
        if "reasoning_content" in message:
            thoughts = [{"type": "reasoning_text", "text": message["reasoning_content"]}]
            items[-1].append({"type": "reasoning", "id": "r", "summary": [], "content": thoughts})
        kind = "output_text" if message["role"] == "assistant" else "input_text"
        content = [{"type": kind, "text": message["content"], "annotations": []}]
        items[-1].append({"type": "message", "role": message["role"], "content": content})
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"].values()
            items[-1].append(
                {"type": "function_call", "call_id": call["id"], "name": name, "arguments": json.dumps(arguments)}
            )
    *asked, answer = items
    request: Json = {"input": [*chain(*asked)], "tools": [{"type": "function", **TOOL}]}
    if messages[0]["role"] == "system":
        request |= {"input": [*chain(*asked[1:])], "instructions": messages[0]["content"]}
    return {
        "request": request,
        "response": {"object": "response", "status": "completed", "error": None, "output": answer},
    }


def as_prompt_and_completion(messages: list[Json]) -> Json:
    return {"prompt": messages[:-1], "completion": messages[-1:], "tools": [{"type": "function", "function": TOOL}]}


LOGS = (as_chat_completions, as_anthropic, as_responses, as_prompt_and_completion)


def plain(messages: list[Json], *, whole: bool = False) -> Json:
    """The row of the format chat that trains the last answer, or all."""
    *before, last = messages
    if not whole:
        before = [{**message, "train": False} if message["role"] == "assistant" else message for message in before]
    return {"messages": [*before, last], "tools": [{"type": "function", "function": TOOL}]}


@pytest.mark.parametrize("name", ["qwen2_folder", "qwen3_folder"])
@pytest.mark.parametrize("log", [*LOGS, as_anthropic_messages])
def test_a_logged_call_trains_its_response_as_the_plain_dialogue_does(
    log: Callable[[list[Json]], Json], name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    renderer = renderer_of(folder, unsupported_reasoning="inline")
    judge = AutoTokenizer.from_pretrained(folder)
    for seed in range(12):
        messages = dialogue(Random(seed))
        row = plain(messages, whole=log is as_anthropic_messages)
        sample = parsed(log(messages))
        assert isinstance(sample, Conversation)
        outcome = renderer.render(sample)
        expected = expected_examples(row, judge, unsupported_reasoning="inline")
        found = [as_previewed(example) for example in outcome.examples]
        if log in (as_responses, as_anthropic_messages):  # whose messages are numbered otherwise
            for example in (*found, *expected):
                del example["turns"]
        assert found == expected
        said = [(one.role, one.content, one.reasoning, one.weight) for one in sample.messages]
        same = parsed(row).messages
        assert [one for one in said if one[0] == "assistant"] == [
            (one.role, one.content, one.reasoning, one.weight) for one in same if one.role == "assistant"
        ]
        assert [one[:2] for one in said] == [(one.role, one.content) for one in same]
        assert sample.tools == parsed(row).tools


@pytest.mark.parametrize("log", LOGS[:3])
def test_bodies_are_read_as_objects_texts_and_inside_what_was_wrapped_around_them(
    log: Callable[[list[Json]], Json],
) -> None:
    row = log([USER, ANSWER])
    request, response = row["request"], row["response"]
    expected = parsed(row)
    for asked, answered in CALLS[:-1]:
        assert parsed({"id": 1, asked: request, answered: response, "latency": 2}).messages == expected.messages
    wrapped = (
        {"request": json.dumps(request), "response": json.dumps(response)},
        {
            "request": {"method": "POST", "url": "u", "body": request},
            "response": {"status_code": 200, "body": response},
        },
        {"request": {"json": json.dumps(request)}, "response": {"body": json.dumps(response)}},
        {"custom_id": "1", "params": request, "result": {"type": "succeeded", "message": response}},
        {"custom_id": "1", "body": request, "response": {"status_code": 200, "body": response}, "error": None},
    )
    for one in wrapped:
        assert parsed(one).messages == expected.messages


def test_a_response_may_stand_beside_the_messages_and_be_a_message_or_a_text() -> None:
    response = as_chat_completions([USER, ANSWER])["response"]
    rows = (
        {"messages": [USER], "response": response},
        {"messages": [USER], "choices": response["choices"]},
        {"input": {"messages": [USER]}, "output": ANSWER},
        {"input": [USER], "output": "hello"},
        {"inputs": [USER], "outputs": [ANSWER]},
    )
    for row in rows:
        assert [(one.role, one.content, one.weight) for one in parsed(row).messages if one.role == "assistant"] == [
            ("assistant", "hello", 1.0)
        ]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"input": "a text", "output": "another"}, None),
        ({"input": {"a": 1}, "output": {"b": 2}}, None),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction"),
        ({"messages": [USER, ANSWER], "response": "r"}, "chat"),
        ({"query": "q", "response": "a"}, "instruction"),
    ],
)
def test_halves_that_are_no_call_are_not_taken_for_one(row: Json, format: str | None) -> None:
    assert detect([row]) == format


def call(*asked: Json, **response: Any) -> Json:
    return {"request": {"messages": list(asked or [USER])}, "response": response}


OPENAI = as_chat_completions([USER, ANSWER])["response"]
ANTHROPIC = as_anthropic([USER, ANSWER])["response"]
RESPONSE = as_responses([USER, ANSWER])["response"]


def ended(reason: str) -> Json:
    return call(choices=[{**OPENAI["choices"][0], "finish_reason": reason}])


CUT: Json = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (ended("length"), "response.choices[0].finish_reason is the text 'length' The answer was cut off"),
        (ended("content_filter"), "finish_reason is the text 'content_filter' The answer was cut off or filtered"),
        (call(choices=OPENAI["choices"] * 2), "response.choices has 2 answers"),
        (
            call(**{**ANTHROPIC, "stop_reason": "max_tokens"}),
            "response.stop_reason is the text 'max_tokens' The answer was cut off",
        ),
        (
            call(**{**ANTHROPIC, "stop_reason": "refusal"}),
            "response.stop_reason is the text 'refusal' The answer was refused",
        ),
        (
            call(**{**RESPONSE, **CUT}),
            "response.status is the text 'incomplete', for the text 'max_output_tokens'",
        ),
        (call(error={"type": "rate_limit_error"}), "response is an error: the text 'rate_limit_error'"),
        (call(type="error", error={"type": "api_error"}), "response is an error: the text 'api_error'"),
        ({**call(), "response": None}, "response is null"),
        ({**call(), "response": "data: {}\n\ndata: [DONE]"}, "response is a stream of events"),
        ({**call(), "response": '{"choices": ['}, "response is a text that is no JSON"),
        (call(USER, {"role": "assistant", "content": "I"}, **OPENAI), "request ends with words of the assistant"),
        (call({"role": "usr", "content": "hi"}, **OPENAI), "request.messages[0] has the unknown role 'usr'"),
        (
            {"request": {"input": "hi", "previous_response_id": "r"}, "response": RESPONSE},
            "request has previous_response_id",
        ),
    ],
)
def test_what_is_no_whole_answer_is_named_and_not_trained(row: Json, fault: str) -> None:
    assert fault in faults(row)[0]


def test_keys_of_a_log_that_nothing_reads_are_named_by_their_place() -> None:
    row = {
        "id": 1,
        "latency": 0.5,
        "request": {
            "messages": [{**USER, "note": 1}],
            "temperature": 0.5,
            "documents": [{}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "response": OPENAI,
    }
    sample = parsed(row)
    assert sorted(sample.unread) == ["id", "latency", "request.documents"]
    assert [one.path for one in sample.offered if one.key == "note"] == ["request.messages[].note"]
    assert sample.template_args == {"enable_thinking": False}
    body = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "messages": [USER]}
    assert parsed({"request": body, "response": OPENAI}).template_args == {"enable_thinking": False}
    assert parsed(blocks(THINKING, {**TEXT, "mood": "glad"})).unread == ("messages[].content[].mood",)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{**TEXT, "mood": "sad"}]}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    row = {"system": [{**TEXT, "mood": "calm"}], "messages": [USER, used, {"role": "user", "content": [result]}]}
    assert parsed(row).unread == ("system.mood", "messages[].content[].content.mood")


def test_keys_of_a_response_that_nothing_reads_are_named_by_their_place() -> None:
    answer = {"role": "assistant", "content": "hello"}
    completion = {"id": "1", "note": 1, "choices": [{"index": 0, "note": 1, "message": {**answer, "mood": "glad"}}]}
    sample = parsed({"request": {"messages": [USER]}, "response": completion})
    assert sorted(sample.unread) == ["response.choices[].note", "response.note"]
    assert [one.path for one in sample.offered] == ["response.choices[].message.mood"]
    said = {
        "type": "message",
        "note": 1,
        **answer,
        "content": [{"type": "output_text", "text": "hello", "mood": "glad"}],
    }
    row = {"request": {"input": [{**USER, "mood": "sad"}]}, "response": {"output": [said], "note": 1}}
    assert sorted(parsed(row).unread) == [
        "request.input[].mood",
        "response.note",
        "response.output[].content[].mood",
        "response.output[].note",
    ]


# --- Anthropic's blocks


def blocks(*content: Json, role: str = "assistant", **row: Any) -> Json:
    return {
        "messages": [USER, {"role": role, "content": list(content)}, *([] if role == "assistant" else [ANSWER])],
        **row,
    }


TEXT = {"type": "text", "text": "so"}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


def test_results_and_texts_of_one_message_are_read_in_their_order() -> None:
    results = [{"type": "tool_result", "tool_use_id": f"t{k}", "content": f"r{k}"} for k in range(2)]
    row = blocks(*results, TEXT, {"type": "text", "text": "now"}, role="user")
    messages = parsed(row).messages
    assert [(one.role, one.content) for one in messages[1:4]] == [("tool", "r0"), ("tool", "r1"), ("user", "sonow")]
    assert [one.extra for one in messages[1:3]] == [{"tool_call_id": "t0"}, {"tool_call_id": "t1"}]
    assert messages[3].num_parts == 2
    assert parsed(row).turns == (0, 1, 1, 1, 2)
    other = parsed(blocks(TEXT, results[0], role="user")).messages
    assert [one.role for one in other] == ["user", "user", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (blocks({"type": "redacted_thinking", "data": "x"}, TEXT), "messages[1].content[0] is redacted thinking"),
        (blocks({**THINKING, "thinking": ""}, TEXT), "messages[1].content[0] is thinking without its text"),
        (blocks(TEXT, THINKING), "messages[1].content has a thinking block after a text block"),
        (blocks(USE, TEXT), "messages[1].content has a text block after a tool_use block"),
        (blocks(THINKING, {"type": "image", "source": {}}), "messages[1].content[1] is of the type 'image' Texts"),
        (blocks({**THINKING, "type": ["thinking"]}, USE), "messages[1].content[0] is of the type ['thinking']"),
        (blocks({**USE, "type": "server_tool_use"}, USE), "content[0] is of the type 'server_tool_use'"),
        (blocks({**USE, "name": None}), "messages[1].content[0] has no name"),
        (blocks(USE, role="user"), "messages[1].content[0] is a tool_use block, but its role is 'user'"),
        (
            blocks({"type": "tool_result", "tool_use_id": "t", "content": "", "is_error": True}, role="user"),
            "messages[1].content[0] is an error without a text",
        ),
        (
            blocks({"type": "tool_result", "content": [{"type": "image", "source": {}}]}, role="user"),
            "messages[1].content[0].source is the object {}",
        ),
        (
            blocks(TEXT, tools=[{"type": "web_search_20250305", "name": "web_search"}]),
            "tools[0] is Anthropic's own tool",
        ),
    ],
)
def test_blocks_that_no_chat_template_shows_are_refused_by_name(row: Json, fault: str) -> None:
    (said,) = faults(row)
    assert fault in said


# --- refusals


def test_a_refusal_is_what_was_said_and_is_counted(tmp_path: Path, qwen3_folder: Path) -> None:
    said = {"role": "assistant", "content": None, "refusal": "No."}
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    rows = [
        {"messages": [USER, said]},
        {"messages": [USER, part]},
        {"messages": [USER], "choices": [{"message": said}]},
    ]
    assert [parsed(row).messages[1].content for row in rows] == ["No."] * 3
    warnings = prepared(tmp_path, qwen3_folder, *rows[:2]).report["warnings"]
    assert any(warning.startswith("2 answers are refusals") for warning in warnings)
    assert "both content and refusal" in faults({"messages": [USER, {**said, "content": "Yes."}]})[0]
    assert parsed({"messages": [USER, {**ANSWER, "refusal": None}]}).messages[1].extra == {}


# --- completions


def test_texts_are_completed_as_they_are_and_only_the_completion_is_trained(qwen3_folder: Path) -> None:
    sample = parsed({"prompt": "The sky is", "completion": " <|im_end|>blue."})
    assert sample == Completion(SOURCE, "The sky is", " <|im_end|>blue.")
    outcome = renderer_of(qwen3_folder).render(sample)
    judge = AutoTokenizer.from_pretrained(qwen3_folder)
    (example,) = outcome.examples
    prompt = judge.encode("The sky is")
    assert example.input_ids[: len(prompt)] == prompt
    assert [token for token, weight in zip(example.input_ids, example.weights, strict=True) if weight] == (
        example.input_ids[len(prompt) :]
    )
    assert judge.decode(example.input_ids[len(prompt) :]) == " <|im_end|>blue.<|endoftext|>"
    assert judge.convert_tokens_to_ids("<|im_end|>") not in example.input_ids  # a text, no control token
    assert outcome.forged_control_tokens == 1


def test_a_completion_is_whole_or_dropped(qwen3_folder: Path) -> None:
    renderer = renderer_of(qwen3_folder)
    (example,) = renderer.render(parsed({"prompt": "", "completion": "a b"})).examples
    assert example.spans[0].start == 1  # nothing stands before the first token
    assert "completion is empty" in faults({"prompt": "q", "completion": " "})[0]
    assert "label false" in faults({"prompt": "q", "completion": "a", "label": False})[0]


# --- calls of one dialogue


def prepared(folder: Path, checkpoint: Path, *rows: Json, **options: Any) -> Dataset:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions.model_validate({"train": [{"path": str(file)}], "max_dropped_fraction": 1.0, **options})
    tokenizer = load_tokenizer(checkpoint)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 0)


def conversation(number: int, length: int) -> list[Json]:
    texts = [{"role": ("user", "assistant")[k % 2], "content": f"{number} says {k}"} for k in range(2 * length)]
    for message in texts[1::2]:
        message["reasoning_content"] = f"{number} thinks"
    return texts


def without_reasoning(message: Json) -> Json:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def calls_of(messages: list[Json], log: Callable[[list[Json]], Json] = as_chat_completions) -> list[Json]:
    """The calls by which a dialogue came about; clients send no reasoning back."""
    return [log([*map(without_reasoning, messages[:k]), messages[k]]) for k in range(1, len(messages), 2)]


@pytest.mark.parametrize("log", LOGS[:3])
def test_calls_of_one_dialogue_train_each_response_once_and_are_counted(
    log: Callable[[list[Json]], Json], tmp_path: Path, qwen3_folder: Path
) -> None:
    rows = [
        *calls_of(conversation(1, 3), log),
        *calls_of(conversation(2, 1), log),
        *calls_of(conversation(3, 2), log)[::-1],
    ]
    dataset = prepared(tmp_path, qwen3_folder, *rows)
    assert (dataset.report["logged_calls"], dataset.report["calls_going_on"]) == (6, 3)
    assert dataset.report["trained_turns"] == 6
    tokenizer = load_tokenizer(qwen3_folder)
    trained = [
        tokenizer.decode([token for token, weight in zip(one.input_ids, one.weights, strict=True) if weight])
        for one in map(dataset.examples.example, range(6))
    ]
    said = [re.findall(r"\d says \d", text) for text in trained]
    assert said == [["1 says 1"], ["1 says 3"], ["1 says 5"], ["2 says 1"], ["3 says 3"], ["3 says 1"]]


def test_calls_of_one_dialogue_are_evaluated_or_trained_together(tmp_path: Path, qwen3_folder: Path) -> None:
    rows = [row for number in range(12) for row in calls_of(conversation(number, 1 + number % 4))]
    dataset = prepared(tmp_path, qwen3_folder, *rows, eval_fraction=0.3)
    owner = [number for number in range(12) for _ in range(1 + number % 4)]

    def owners(indices: Any) -> set[int]:
        return {owner[dataset.examples.example(int(i)).source.line - 1] for i in indices}

    evaluated = owners(dataset.examples.evaluation)
    assert evaluated
    assert evaluated.isdisjoint(owners(dataset.examples.train))
    assert 0 < len(dataset.examples.evaluation) <= 9  # of 30


def test_dialogues_are_found_whatever_their_order() -> None:
    answers = np.array([0, 13, 11, 0, 12, 21, 14], dtype=np.uint64)
    before = np.array([0, 12, 0, 0, 11, 99, 13], dtype=np.uint64)
    assert dialogues(answers, before).tolist() == [0, 2, 2, 3, 2, 5, 2]
    assert dialogues(answers[:0], before[:0]).tolist() == []


def test_a_call_that_is_logged_twice_is_trained_once(tmp_path: Path, qwen3_folder: Path) -> None:
    (first,), (other,) = calls_of(conversation(1, 1)), calls_of(conversation(2, 1))
    report = prepared(tmp_path, qwen3_folder, first, other, first, first).report
    assert (report["train_examples"], report["duplicates"], report["calls_logged_again"]) == (2, 2, 2)
    assert (report["rows"]["trained"], report["rows"]["logged_again"], report["calls_going_on"]) == (2, 2, 0)
    (warning,) = report["warnings"]
    assert warning.startswith("2 calls were logged before")
    assert warning.endswith("rows.jsonl:3, " + warning.rpartition(", ")[2])


def test_what_http_wraps_around_a_body_is_counted() -> None:
    whole = call(**OPENAI)
    request = {"method": "POST", "url": "u", "headers": {"a": 1}, "body": whole["request"]}
    response = {"status": 200, "headers": {}, "trace": "t", "body": json.dumps(whole["response"])}
    sample = parsed({"request": request, "response": response})
    assert sample == parsed(whole)
    named = {
        "request.method",
        "request.url",
        "request.headers",
        "response.status",
        "response.headers",
        "response.trace",
    }
    assert set(sample.unread) == named


# --- the table for the user


def conventions() -> list[tuple[str, str, Json]]:
    """Name, format and row of each line of the table in data_templates/README.md."""
    text = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    table = text.partition("| convention |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return [(name, format.strip("`"), json.loads(row.strip("`"))) for name, format, row, _ in lines]


def test_every_line_of_the_table_of_conventions_is_read_as_it_says() -> None:
    table = conventions()
    assert {format for _, format, _ in table} >= {"chat", "request", "completion", "sharegpt", "instruction"}
    for name, format, row in table:
        assert detect([row]) == format, name
        sample = parsed(row)
        if isinstance(sample, Completion):
            assert (sample.prompt, sample.completion) == ("hi", "hello")
            continue
        trained = [one.content for one in sample.messages if one.role == "assistant" and one.weight]
        assert trained[-1] == "hello", name
        assert ("user", "hi") in [(one.role, one.content) for one in sample.messages], name


@pytest.mark.parametrize("format", ["request", "completion"])
def test_wrong_values_are_faults_and_never_errors_of_ours(format: str) -> None:
    values: list[Any] = [
        None,
        "",
        3,
        [],
        {},
        [3],
        "{",
        "[]",
        {"messages": []},
        {"messages": 3},
        {"choices": []},
        [USER],
        ANSWER,
    ]
    for first in values:
        for second in values:
            for names in (*CALLS, ("prompt", "completion")):
                result = FORMATS[format]({names[0]: first, names[1]: second}, SOURCE)
                assert result != []


def test_the_first_wrong_call_ends_the_run_by_place(tmp_path: Path, qwen3_folder: Path) -> None:
    cut = call(choices=[{**OPENAI["choices"][0], "finish_reason": "length"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*finish_reason is the text 'length'"):
        prepared(tmp_path, qwen3_folder, call(**OPENAI), cut)
    dataset = prepared(tmp_path, qwen3_folder, call(**OPENAI), cut, bad_rows="skip")
    assert (dataset.report["trained_turns"], dataset.report["rows"]["refused"]) == (1, 1)
