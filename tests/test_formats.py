"""Rows become samples as inference servers read them; whatever is wrong with a row is said at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune.data.formats import FORMATS, detect
from qwentune.data.formats.samples import read_samples, refuse_untrained
from qwentune.data.formats.suggestion import suggestion
from qwentune.data.reading.columns import Columns
from qwentune.data.rendering.remarks import WRAPPED_TOOLS, remarks
from qwentune.data.sample import Code, Completion, Conversation, Message, Pair, Retrieval, Source, Text, ToolCall
from qwentune.errors import DataError, Problem
from qwentune.recipe import DataSource
from qwentune.recipe.keys import describe_keys
from qwentune.row_formats import ROW_FORMATS

TEMPLATES = Path(__file__).parents[1] / "data_templates"
SOURCE = Source("rows.jsonl", 7)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def parsed(format: str, row: dict[str, Any]) -> Any:
    sample = FORMATS[format](row, SOURCE)
    assert not isinstance(sample, list), sample
    return sample


def faults(format: str, row: dict[str, Any]) -> list[str]:
    problems = FORMATS[format](row, SOURCE)
    assert isinstance(problems, list)
    assert all(problem.where == "rows.jsonl:7" for problem in problems)
    return [f"{problem.what} {problem.fix}" for problem in problems]


def chat(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


USER: dict[str, Any] = {"role": "user", "content": "hi"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "hello"}


def message(**fields: Any) -> Message:
    """The assistant's message of a chat row, parsed."""
    return parsed("chat", chat(USER, {"role": "assistant", "content": "", **fields})).messages[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jsonl")))
def test_every_row_template_parses(name: str) -> None:
    problems: list[Problem] = []
    path = TEMPLATES / f"{name}.jsonl"
    samples = list(read_samples(str(path), "auto", problems))
    assert not problems
    assert len(samples) == len(path.read_text().splitlines())


def test_a_format_is_one_file_and_one_line_of_the_table() -> None:
    page = (TEMPLATES / "README.md").read_text("utf-8")
    assert {name for name in ROW_FORMATS if not (TEMPLATES / f"{name}.jsonl").exists()} == set()
    assert {name for name in ROW_FORMATS if f"`{name}.jsonl`" not in page} == set()
    assert [key.type for key in describe_keys() if key.name == "data.train[].format"] == [
        f"auto, {', '.join([*ROW_FORMATS][:-1])} or {[*ROW_FORMATS][-1]}"
    ]


@pytest.mark.parametrize("name", [name for name, format in ROW_FORMATS.items() if not format.is_trained])
def test_a_format_that_is_not_trained_yet_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=f"format {name} can be previewed, but not trained on yet"):
        refuse_untrained([DataSource(path=f"data_templates/{file}.jsonl") for file in ("chat", name)])


def test_keys_that_no_format_has_are_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"mesages": []}\n')
    with pytest.raises(DataError, match=r"(?s)'mesages'.*Did you mean 'messages'"):
        list(read_samples(str(tmp_path / "rows.jsonl"), "auto", []))


def test_a_truncated_line_a_role_typo_and_a_null_content_are_three_problems_with_their_lines(tmp_path: Path) -> None:
    rows = [
        chat(USER, ANSWER),
        chat(USER, {"role": "asistant", "content": "x"}),
        chat(USER, {"role": "assistant", "content": None}),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": [{"role": "us')
    problems: list[Problem] = []
    assert len(list(read_samples(str(file), "auto", problems))) == 1
    assert [problem.where.removeprefix(f"{file}:").split(":")[0] for problem in problems] == ["2", "3", "4"]
    assert "Did you mean 'assistant'?" in problems[0].fix
    assert "messages[1].content is null" in problems[1].what
    assert "ends in the middle" in problems[2].what


@pytest.mark.parametrize(("role", "read"), [("developer", "system"), ("function", "tool"), ("tool", "tool")])
def test_roles_are_read_as_servers_read_them(role: str, read: str) -> None:
    sample = parsed("chat", chat({"role": role, "content": "x"}, USER, ANSWER))
    assert sample.messages[0].role == read


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_many_names(key: str) -> None:
    assert message(**{key: "because"}).reasoning == "because"
    assert message(**{key: " \n"}).reasoning is None


def test_different_texts_of_reasoning_in_one_message_are_refused() -> None:
    (fault,) = faults("chat", chat(USER, {**ANSWER, "reasoning": "a", "thinking": "b"}))
    assert "messages[1] has different texts in reasoning and thinking" in fault


@given(arguments=st.dictionaries(st.text(), json_values, max_size=4))
def test_arguments_as_a_text_of_json_are_the_object_itself(arguments: dict[str, Any]) -> None:
    call = {"name": "f", "arguments": arguments}
    as_text = {**call, "arguments": json.dumps(arguments)}
    for given_call in (call, as_text, {"type": "function", "function": call}, {"function": as_text}):
        (read,) = message(tool_calls=[given_call]).tool_calls
        assert (read.name, read.arguments) == ("f", arguments)


def test_null_fields_of_a_message_go_and_nulls_inside_arguments_stay() -> None:
    read = message(content=None, name=None, tool_calls=[{"id": None, "name": "f", "arguments": {"x": None}}])
    assert read == Message("assistant", "", tool_calls=(ToolCall("f", {"x": None}),))


def test_text_parts_are_one_text_and_other_parts_are_refused() -> None:
    texts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    image = {"type": "image", "image": "a.png"}
    assert message(content=texts).content == "one two"
    (fault,) = faults("chat", chat(USER, {**ANSWER, "content": [*texts, image]}))
    assert fault == (
        "messages[1].content[2] is an image in what the assistant says A model of this kind writes text only: "
        "leave the row out."
    )


def test_a_turn_can_be_left_out_or_weighted() -> None:
    assert message(train=False).weight == 0
    assert message(weight=0.5).weight == 0.5
    assert message().weight == 1
    for wrong in ({"weight": -1}, {"weight": True}, {"train": "no"}, {"train": False, "weight": 2}):
        assert len(faults("chat", chat(USER, {**ANSWER, **wrong}))) == 1


def test_everything_that_is_wrong_with_a_row_is_said_at_once() -> None:
    row = chat(
        {"role": "user", "content": 5},
        {"role": "assistant", "content": "x", "tool_calls": [{"arguments": {}}, {"name": "f", "arguments": "{"}]},
        {"role": "robot", "content": "x"},
        {**ANSWER, "loss_scale": 1},
        tools=["not a tool"],
    )
    words = " | ".join(faults("chat", row))
    for expected in (
        "messages[0].content is the number 5",
        "messages[1].tool_calls[0] has no name",
        "messages[1].tool_calls[1].arguments is a text that is no JSON",
        "messages[2] has the unknown role 'robot'",
        "messages[3] has the unknown key 'loss_scale'",
        "tools[0] is the text 'not a tool'",
    ):
        assert expected in words


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": []}, "messages is empty"),
        (chat(USER), "messages has no assistant message"),
        ({"messages": "nope"}, "messages is a text that is no JSON"),
        ({}, "messages is missing"),
        (chat(USER, {"role": "tool_call", "content": ""}), "messages[1] holds no call"),
        (chat({**USER, "reasoning": "x"}, ANSWER), "messages[0] has reasoning, but its role is 'user'"),
        (chat(USER, ANSWER, tool=[]), "the row has the unknown key 'tool'"),
    ],
)
def test_a_row_without_anything_to_train_or_with_a_misplaced_key_is_refused(row: dict[str, Any], fault: str) -> None:
    assert fault in faults("chat", row)[0]


def test_sharegpt_is_the_same_dialogue_as_chat() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    sample = parsed(
        "sharegpt",
        {
            "system": "s",
            "tools": json.dumps([{"name": "f"}]),
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
        },
    )
    same = chat(
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
        tools=[{"name": "f"}],
    )
    assert sample == parsed("chat", same)


def test_an_instruction_is_asked_with_its_input_below_it_and_after_its_history() -> None:
    row = {"instruction": "Do", "input": "this", "output": "Done", "system": "s", "history": [["q", "a"]]}
    said = [(m.role, m.content) for m in parsed("instruction", row).messages]
    assert said == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "Do\nthis"), ("assistant", "Done")]
    assert parsed("instruction", {**row, "input": ""}).messages[3].content == "Do"


def test_a_text_is_itself() -> None:
    assert parsed("text", {"text": " as it is\n"}) == Text(SOURCE, " as it is\n")


def test_a_format_is_recognised_by_most_of_the_rows() -> None:
    assert detect([{"text": "a"}, {"messages": []}, {"messages": []}, 5]) == "chat"
    assert detect([{"prompt": "p", "chosen": "c", "rejected": "r", "text": "t"}]) == "preference"
    assert detect([{"something": 1}]) is None


KEYS = ("role", "content", "messages", "tools", "tool_calls", "function", "name", "arguments", "conversations", "from")
VALUES = ("user", "assistant", "tool", "human", "gpt", "function_call", "{}", "[1]")
near_rows = st.recursive(
    json_values | st.sampled_from(VALUES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*KEYS, "value", "weight", "text", "instruction", "output"]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


PLACES = (
    *("messages", "conversations", "tools", "text", "history", "prompt", "chosen", "rejected"),
    *("completion", "request", "response", "input", "output", "choices", "system"),
)
SAMPLES = Conversation | Text | Completion | Code | Pair | Retrieval


@given(row=st.dictionaries(st.sampled_from(PLACES), near_rows))
def test_no_row_makes_a_format_fail(row: dict[str, Any]) -> None:
    for parse in FORMATS.values():
        result = parse(row, SOURCE)
        assert isinstance(result, SAMPLES) or all(isinstance(problem, Problem) for problem in result)
        assert result != []


# --- the files of other toolkits, unchanged

CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
ASKED = [("user", "q"), ("assistant", "a")]


def said(format: str, row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(m.role, m.content) for m in parsed(format, row).messages]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("instruction", {"instruction": "q", "input": "", "output": "a"}),
        ("instruction", {"query": "q", "response": "a"}),
        ("instruction", {"system": "", "query": "q", "response": "a", "history": []}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("sharegpt", {"conversation": [{"human": "q", "assistant": "a"}]}),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ("sharegpt", {"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}], "id": "7"}),
        ("chat", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": True}]}),
        ("chat", {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])}),
    ],
)
def test_dialects_are_recognised_and_read_as_one_dialogue(format: str, row: dict[str, Any]) -> None:
    assert detect([row]) == format
    assert said(format, row) == ASKED


def test_calls_as_messages_of_their_own_are_the_calls_of_the_assistant() -> None:
    text = json.dumps(CALL)
    swift = chat(USER, {"role": "tool_call", "content": text}, {"role": "tool_response", "content": "r"}, ANSWER)
    factory = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": text},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "hello"},
        ],
        "tools": "",
    }
    plain = chat(
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {**CALL, "arguments": text[37:-1]}}]},
        {"role": "tool", "content": "r"},
        ANSWER,
    )
    assert plain["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert parsed("chat", swift).messages == parsed("sharegpt", factory).messages == parsed("chat", plain).messages


@pytest.mark.parametrize("value", ['{"name": "f"}\n{"name": "g"}', 'I look it up. {"name": "f"}'])
def test_a_value_that_is_not_one_json_is_told_how_several_calls_are_written(value: str) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    (fault,) = faults("sharegpt", row)
    assert fault.endswith("It is JSON, one call or a list of them, before which only <think>…</think> may stand.")


def test_a_message_whose_loss_is_false_is_context() -> None:
    assert message(loss=False).weight == 0
    assert parsed("chat", chat({**USER, "loss": False}, ANSWER)).messages[0].role == "user"


def test_an_answer_that_was_judged_bad_is_not_taken_for_one_to_learn() -> None:
    assert "label false" in faults("chat", chat(USER, ANSWER, label=False))[0]
    parsed("chat", chat(USER, ANSWER, label=True))


HUMAN = {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
        {"prompt": "q", "chosen": "hello", "rejected": "no"},
        {"instruction": "q", "input": "", "chosen": "hello", "rejected": "no"},
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "chosen": [{"role": "user", "content": "q"}, ANSWER],
            "rejected": [{"role": "user", "content": "q"}, {**ANSWER, "content": "no"}],
        },
        {"messages": [{"role": "user", "content": "q"}, ANSWER], "rejected_response": "no"},
    ],
)
def test_preferences_come_in_many_layouts(row: dict[str, Any]) -> None:
    assert detect([row]) == "preference"
    pair = parsed("preference", row)
    for end, answer in ((pair.chosen, "hello"), (pair.rejected, "no")):
        assert [(m.role, m.content) for m in end.messages] == [("user", "q"), ("assistant", answer)]


def test_two_answers_that_are_the_same_are_no_preference() -> None:
    assert "the same" in faults("preference", {"prompt": "q", "chosen": "a", "rejected": "a"})[0]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"question": "q", "answer": "a"},
            "rename 'question' to 'instruction', 'answer' to 'output'",
        ),
        ({"prompt": "q", "answer": "a"}, "format instruction: rename 'prompt' to 'instruction'"),
        ({"dialogue": []}, "format chat: rename 'dialogue' to 'messages'"),
        ({"content": "t"}, "format text: rename 'content' to 'text'"),
        (
            {"asked": chat(USER), "answered": {"choices": []}},
            "As rows of the format request: rename 'asked' to 'request', 'answered' to 'response', in the recipe by",
        ),
        ({"input": "q", "output": "a"}, "format instruction: rename 'input' to 'instruction', in the recipe by `data:"),
        (
            {"data": [chat(USER, ANSWER)]},
            "The rows of 'data' are rows of the format chat: take them out (jq -c '.data[]'",
        ),
        (
            {"id": "1", "body": chat(USER)},
            "The 'body' of each row is one of the format chat: take it out (jq -c '.body'",
        ),
        ({"anchor": "t", "pos": "u"}, "format retrieval: rename 'anchor' to 'query', 'pos' to 'positive'"),
    ],
)
def test_columns_by_other_names_are_answered_with_a_renaming(tmp_path: Path, row: dict[str, Any], hint: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as refused:
        list(read_samples(str(file), "auto", []))
    assert hint in str(refused.value)


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read_source(source: DataSource) -> list[Any]:
    """The samples of a source whose rows are all right."""
    problems: list[Problem] = []
    samples = list(read_samples(source.path, source.format, problems, columns=Columns.of(source)))
    assert not problems
    return samples


def mended(file: Path) -> list[Any]:
    """What the command that is printed for a file makes of it."""
    with pytest.raises(DataError) as refused:
        list(read_samples(str(file), "auto", []))
    found = re.search(r"\((jq .* > renamed\.jsonl)\)", str(refused.value))
    assert found, refused.value
    subprocess.run(found[1], shell=True, cwd=file.parent, check=True)
    problems: list[Problem] = []
    samples = list(read_samples(str(file.with_name("renamed.jsonl")), "auto", problems))
    assert not problems
    return samples


@pytest.mark.skipif(shutil.which("jq") is None, reason="no jq")
@pytest.mark.parametrize("wrapped", [{"data": [chat(USER, ANSWER)]}, [{"data": [chat(USER, ANSWER)]}]])
def test_rows_are_taken_out_of_an_object_and_of_a_list(tmp_path: Path, wrapped: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(wrapped) + "\n")
    assert len(mended(file)) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}},  # of SQuAD
        {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},  # of ARC
        {"question": "q", "answer": "a", "contexts": [{"text": "c"}]},
    ],
)
def test_a_text_beside_a_question_is_not_offered_as_all_that_there_is_to_train(row: dict[str, Any]) -> None:
    assert "take" not in suggestion([row], "rows.jsonl")


def test_no_command_is_offered_for_names_that_jq_does_not_take() -> None:
    said = suggestion([{"对话": [chat(USER, ANSWER)]}], "rows.jsonl")
    assert "take them out" in said
    assert "jq" not in said


@pytest.mark.parametrize("key", ["image", "images", "videos", "audios", "objects"])
def test_what_a_row_names_beside_texts_that_have_no_place_for_it_is_refused(key: str) -> None:
    rows: dict[str, dict[str, Any]] = {
        "chat": chat(USER, ANSWER),
        "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "instruction": {"instruction": "hi", "output": "hello"},
        "preference": {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
    }
    for format, row in rows.items():
        said = faults(format, {**row, key: ["a.png"]})
        kind = key.removesuffix("s")
        wanted = "the row has objects" if key == "objects" else f"the row has 1 {kind} items and 0 <{kind}>s"
        assert said
        assert all(fault.startswith(wanted) for fault in said)
        assert parsed(format, {**row, key: []}) == parsed(format, row)


def alone(name: str, **message: Any) -> dict[str, Any]:
    """A call in a message of its own, as ms-swift writes it."""
    return {"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}}), **message}


def as_sharegpt(message: dict[str, Any], speaker: str = "function_call") -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt", "tool_call": speaker, "tool_response": "observation"}
    return {"from": speakers[message["role"]], "value": message["content"]}


RESULTS = [{"role": "tool_response", "content": text} for text in "ab"]
LOOKING: dict[str, Any] = {"role": "assistant", "content": "I look."}


@pytest.mark.parametrize("before", [[], [LOOKING]])
def test_calls_in_messages_of_their_own_are_those_of_one_turn(before: list[dict[str, Any]]) -> None:
    messages = [USER, *before, alone("f"), alone("g"), *RESULTS, ANSWER]
    content = "I look." if before else ""
    called = {"role": "assistant", "content": content, "tool_calls": [{"name": name, "arguments": {}} for name in "fg"]}
    rows = [
        ("chat", chat(*messages)),
        ("chat", chat(*[{**m, "content": json.loads(m["content"])} if "call" in m["role"] else m for m in messages])),
        ("sharegpt", {"conversations": messages}),
        ("sharegpt", {"conversations": [as_sharegpt(message) for message in messages]}),
        ("sharegpt", {"conversations": [as_sharegpt(message, "tool_call") for message in messages]}),
    ]
    expected = parsed("chat", chat(USER, called, *RESULTS, ANSWER)).messages
    for format, row in rows:
        sample = parsed(format, row)
        assert sample.messages == expected
        assert sample.turns == (0, 1, *range(3 + len(before), 6 + len(before)))
    ends = {"prompt": [USER], "chosen": messages[1:], "rejected": [LOOKING]}
    assert parsed("preference", ends).chosen.messages[1:] == expected[1:]


def test_calls_of_other_weight_or_speaker_stay_apart() -> None:
    def roles(*messages: dict[str, Any]) -> list[str]:
        return [message.role for message in parsed("chat", chat(*messages)).messages]

    assert roles(USER, {**LOOKING, "loss": False}, alone("f"), *RESULTS, ANSWER)[1:3] == ["assistant", "assistant"]
    assert roles(USER, alone("f"), RESULTS[0], alone("g"), RESULTS[1], ANSWER)[1:5] == ["assistant", "tool"] * 2


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "message": {**ANSWER, "refusal": None}, "finish_reason": "stop", **fields}


def test_the_one_choice_of_a_logged_request_is_its_answer() -> None:
    logged = chat(USER, choices=[choice()], model="gpt-5", usage={"total_tokens": 3})
    assert parsed("chat", logged).messages == parsed("chat", chat(USER, ANSWER)).messages
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = choice(message={"role": "assistant", "content": None, "tool_calls": [call]}, finish_reason="tool_calls")
    answer = parsed("chat", chat(USER, choices=json.dumps([called]))).messages[1]
    assert answer.tool_calls == (ToolCall("f", {}, {"id": "c1", "type": "function"}),)
    of_tests = (
        ["A", "B"],
        "A or B",
        ["a message", "a letter"],
        '["a", "message"]',
        {"text": ["a message"], "label": [1]},
    )
    for none in (None, [], *of_tests):
        assert parsed("chat", chat(USER, ANSWER, choices=none)).messages == parsed("chat", chat(USER, ANSWER)).messages


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (chat(USER, choices=[choice(), choice(index=1)]), "choices has 2 answers"),
        (chat(USER, ANSWER, choices=[choice()]), "choices stands beside an answer in messages"),
        (chat(USER, choices=[choice(finish_reason="length")]), "choices[0].finish_reason is the text 'length'"),
        (chat(USER, choices=[{"index": 0, "text": "hello"}]), "choices[0] is the object"),
        (chat(USER, choices=[choice(message={"role": "user", "content": "x"})]), "choices[0] is the object"),
        (chat(USER, choices=["hello"]), "choices[0] is the text 'hello'"),
        (chat(USER, choices="hello"), "choices is a text that is no JSON"),
    ],
)
def test_choices_that_are_not_clearly_the_answer_are_said(row: dict[str, Any], fault: str) -> None:
    (said,) = faults("chat", row)
    assert said.startswith(fault)


def test_the_choices_of_a_test_are_not_held_against_a_row_that_is_wrong() -> None:
    (said,) = faults("chat", chat(USER, {**ANSWER, "role": "assistent"}, choices=["A", "B"]))
    assert "the unknown role 'assistent'" in said


def test_functions_are_tools_as_they_were_called_before() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    called = chat(USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}})
    tools = parsed("chat", {**called, "functions": [function]}).tools
    assert tools == parsed("chat", {**called, "tools": [{"type": "function", "function": function}]}).tools


def test_a_tool_gets_the_wrapper_without_which_no_server_takes_it() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    wrapped = {"type": "function", "function": function}
    sample = parsed("chat", chat(USER, ANSWER, tools=[function, wrapped]))
    assert (sample.tools, sample.num_wrapped_tools) == ((wrapped, wrapped), 1)
    assert list(remarks(sample)) == [WRAPPED_TOOLS]
    for odd in ({"type": "custom", "name": "f"}, {"parameters": {}}, {"name": 1}):
        (said,) = faults("chat", chat(USER, ANSWER, tools=[odd]))
        assert "tools[0] is " in said


def test_an_instruction_may_have_tools() -> None:
    row = {"instruction": "q", "output": "a"}
    assert parsed("instruction", {**row, "tools": '[{"name": "f"}]'}).tools == (
        {"type": "function", "function": {"name": "f"}},
    )
    assert parsed("instruction", {**row, "tools": ""}).tools == ()


@pytest.mark.parametrize(("role", "meant"), [("human", "user"), ("gpt", "assistant"), ("AI", "assistant")])
def test_a_role_of_another_format_is_answered_with_ours(role: str, meant: str) -> None:
    (fault,) = faults("chat", chat({**USER, "role": role}, ANSWER))
    assert fault == f"messages[0] has the unknown role {role!r} Did you mean {meant!r}?"


def test_a_hint_does_not_propose_what_the_values_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": 1, "body": {"model": "m"}}) + "\n")
    with pytest.raises(DataError) as refused:
        list(read_samples(str(file), "auto", []))
    assert "rename" not in str(refused.value)
