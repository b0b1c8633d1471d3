"""No key of a row is passed over: it is read under its own meaning, refused, or counted and named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwentune.data.formats import FORMATS
from qwentune.data.formats.samples import read_samples
from qwentune.data.reading.columns import Columns
from qwentune.data.reading.row_keys import REFUSALS, seems
from qwentune.data.reading.unread import UnreadKeys
from qwentune.data.rendering.outcome import Outcome
from qwentune.data.rendering.remarks import AFTER_THE_LAST, ALWAYS_THINKS, NEVER_THINKS, NO_TOOLS, NOT_THINKING
from qwentune.data.report import Report
from qwentune.data.sample import Conversation, Pair, Source
from qwentune.recipe import DataSource
from qwentune.row_formats import LOSS, ROW_FORMATS
from tests.checkpoints import template_text
from tests.oracle import expected_examples
from tests.test_render import as_previewed, renderer_of

DATA_TEMPLATES = Path(__file__).parents[1] / "data_templates"
README = DATA_TEMPLATES / "README.md"
THINKING_ONLY = (Path(__file__).parent / "templates" / "thinking_only.jinja").read_text("utf-8")
SOURCE = Source("rows.jsonl", 7)
USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL: dict[str, Any] = {"name": "f", "arguments": {"x": [1, "</think>"]}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}
LOOP = [USER, CALLED, {"role": "tool", "content": "r"}, ANSWER]
SPOKEN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SYSTEM = {"role": "system", "content": "s"}


def chat(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


def called(value: str) -> dict[str, Any]:
    turns = [SPOKEN[0], {"from": "function_call", "value": value}, {"from": "observation", "value": "r"}, SPOKEN[1]]
    return {"conversations": turns, "tools": TOOLS}


OFF, HALF = {**ANSWER, "train": False}, {**ANSWER, "weight": 0.5}
LONG = [USER, OFF, USER, ANSWER]
# A row of some convention, and the same dialogue as the format chat says it.
CONVENTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("chat", chat(USER, ANSWER, system="s"), chat(SYSTEM, USER, ANSWER)),
    ("sharegpt", {"conversations": SPOKEN, "system": "s"}, chat(SYSTEM, USER, ANSWER)),
    *(
        ("chat", chat(*LOOP, **{key: value}), chat(*LOOP, tools=TOOLS))
        for key, value in (
            *(("tools", TOOLS), ("tools", json.dumps(TOOLS)), ("functions", [FUNCTION]), ("tool_defs", [FUNCTION])),
            *(("tool_defs", json.dumps([FUNCTION])), ("tool_defs", TOOLS), ("functions", json.dumps(TOOLS))),
        )
    ),
    *(
        ("chat", chat(USER, {**ANSWER, key: off}, USER, {**ANSWER, key: on}), chat(*LONG))
        for key in LOSS
        for off, on in ((False, True), (0, 1), (0.0, 1.0))
        if key != "weight" or off is not False
    ),
    ("sharegpt", {"conversations": [SPOKEN[0], {**SPOKEN[1], "weight": 0}, *SPOKEN]}, chat(*LONG)),
    ("chat", chat({**USER, "loss_mask": 0}, ANSWER), chat(USER, ANSWER)),
    ("chat", chat(USER, ANSWER, weight=0.5), chat(USER, HALF)),
    ("chat", chat(USER, {**ANSWER, "weight": 0.25}, weight=2), chat(USER, HALF)),
    ("instruction", {"instruction": "q", "output": "a", "weight": 0.5}, chat(USER, HALF)),
    *(
        ("sharegpt", called(value), chat(USER, {**CALLED, "reasoning_content": "why"}, *LOOP[2:], tools=TOOLS))
        for value in (f"<think>\nwhy\n</think>\n\n{json.dumps(CALL)}", f"why\n</think>\n[{json.dumps(CALL)}]")
    ),
    ("sharegpt", called(json.dumps(CALL)), chat(*LOOP, tools=TOOLS)),
]


def parsed(format: str, row: dict[str, Any]) -> Any:
    sample = FORMATS[format](row, SOURCE)
    assert not isinstance(sample, list), sample
    return sample


def faults(format: str, row: dict[str, Any]) -> str:
    problems = FORMATS[format](row, SOURCE)
    assert isinstance(problems, list)
    return " | ".join(problem.what for problem in problems)


def outcome(folder: Path, row: dict[str, Any], **options: Any) -> Outcome:
    return renderer_of(folder, **options).render(parsed("chat", row))


def test_every_convention_trains_the_turns_of_the_plain_one(qwen3_folder: Path) -> None:
    renderer, tokenizer = renderer_of(qwen3_folder), AutoTokenizer.from_pretrained(qwen3_folder)
    for format, row, plain in CONVENTIONS:
        found = renderer.render(parsed(format, row))
        assert not found.problems, row
        ours = [{**as_previewed(one), "turns": None} for one in found.examples]
        assert ours == [{**one, "turns": None} for one in expected_examples(plain, tokenizer)], row
        assert {"messages[].tool_calls[].type"} >= set(found.unread), row


def test_what_a_row_says_twice_and_differently_is_refused() -> None:
    for row, what in (
        (chat(SYSTEM, USER, ANSWER, system="s"), "system stands both in the row and among its messages"),
        (chat(*LOOP, tools=TOOLS, functions=[{"name": "g"}]), "different tools in tools and functions"),
        (chat(USER, {**ANSWER, "train": True, "loss": False}), "messages[1] has train true and loss false"),
        (chat(USER, ANSWER, train=False, weight=2), "the row has train false and weight 2"),
        (chat(USER, ANSWER, loss=0.73), "loss is the number 0.73"),
        (chat({**USER, "training": True}, ANSWER), "messages[0] has training, but its role is 'user'"),
        (chat(USER, ANSWER, enable_thinking="no"), "enable_thinking is the text 'no'"),
        (chat(USER, ANSWER, chat_template_kwargs={"tools": []}), "chat_template_kwargs has tools"),
        (chat(USER, ANSWER, chat_template_kwargs={"note": "<|im_end|>"}), "chat_template_kwargs.note is the text"),
        (
            chat(USER, ANSWER, enable_thinking=True, chat_template_kwargs='{"enable_thinking": false}'),
            "enable_thinking and chat_template_kwargs.enable_thinking, which differ",
        ),
    ):
        assert what in faults("chat", row)
    assert "is trained as a whole" in faults("text", {"text": "t", "train": False})


@pytest.mark.parametrize("by", ["enable_thinking", "chat_template_kwargs"])
def test_a_row_that_says_whether_it_thinks_outweighs_the_recipe(qwen3_folder: Path, by: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen3_folder)
    reasoned = {**ANSWER, "reasoning_content": "why"}
    for on, answer, thinking in ((True, reasoned, "off"), (True, ANSWER, "auto"), (False, ANSWER, "on")):
        row = chat(USER, answer)
        said = {by: on if by == "enable_thinking" else {by: 1, "enable_thinking": on}}
        found = outcome(qwen3_folder, {**row, **said}, thinking=thinking)
        assert [as_previewed(one) for one in found.examples] == expected_examples(
            row, tokenizer, thinking="on" if on else "off"
        )
        assert set(found.unread) == ({f"{by}.{by}"} if by == "chat_template_kwargs" else set())
        assert (NOT_THINKING in found.remarks) is (on and answer is ANSWER)
        denied = outcome(qwen3_folder, chat(USER, reasoned, enable_thinking=False), unsupported_reasoning="drop")
        assert "messages[1] has reasoning, but the row says that enable_thinking is false" in denied.problems[0].what


def test_what_trains_nothing_is_remarked(qwen3_folder: Path) -> None:
    assert outcome(qwen3_folder, chat(USER, ANSWER, USER, USER)).remarks.count(AFTER_THE_LAST) == 2
    assert outcome(qwen3_folder, chat(*LOOP[:3])).remarks.count(AFTER_THE_LAST) == 1
    assert NO_TOOLS in outcome(qwen3_folder, chat(*LOOP)).remarks
    assert NO_TOOLS not in outcome(qwen3_folder, chat(*LOOP, tools=TOOLS)).remarks


def test_keys_that_nothing_reads_are_in_the_report_with_their_places(qwen3_folder: Path) -> None:
    renderer = renderer_of(qwen3_folder)
    assert renderer.template is not None
    report = Report(tokenizer=renderer.tokenizer, template=renderer.template, thinking="auto")
    row = chat({**USER, "note": 1}, {**ANSWER, "note": None}, id="7", my_tools=[1], nothing=None)
    report.add(renderer.render(parsed("chat", row)))
    place = [{"file": "rows.jsonl", "line": 7}]
    assert report.unread.report() == {
        "id": {"count": 1, "first": place},
        "messages[].note": {"count": 1, "first": place},
        "my_tools": {"count": 1, "first": place},
    }
    (warning,) = report.unread.warnings()
    assert warning.startswith("2 keys of rows are read by nothing: ")
    assert "'my_tools' (1, first: rows.jsonl:7)" in warning
    assert "'messages[].note' (1, first: rows.jsonl:7)" in warning


@pytest.mark.parametrize(
    ("format", "row", "key"),
    [
        ("chat", chat(*LOOP, available_tools=TOOLS), "tools"),
        ("chat", chat(USER, ANSWER, systemPrompt="s"), "system"),
        ("chat", chat(USER, {**ANSWER, "thoughts": "why"}), "reasoning_content"),
        ("chat", chat(USER, {**ANSWER, "content": "", "toolInvocations": [CALL]}), "tool_calls"),
    ],
)
def test_what_a_key_seems_to_be_is_said_with_the_words_that_have_it_read(
    format: str, row: dict[str, Any], key: str
) -> None:
    report = UnreadKeys()
    report.add([*parsed(format, row).unread, *(one.path for one in parsed(format, row).offered)], SOURCE)
    (warning,) = report.warnings()
    kind, mend = re.findall(r"seems to be \w+: (\w+): (\{.*?\})", warning)[0]
    source = DataSource.model_validate({"path": "rows.jsonl", kind: yaml.safe_load(mend)})
    assert yaml.safe_load(mend).keys() == {key}
    columns = Columns.of(source)
    assert columns is not None
    read = parsed(format, columns.renamed(row)[0])
    assert (read.unread, read.offered) == ((), ())
    assert read != parsed(format, row)


@pytest.mark.parametrize("key", ["tool_choice", "num_tools", "conversation_hash", "note", "thinking_tokens"])
def test_a_key_that_counts_or_names_seems_to_be_nothing(key: str) -> None:
    assert seems(key) is None


@pytest.mark.parametrize(
    ("template", "says", "remark"),
    [
        (THINKING_ONLY, False, ALWAYS_THINKS),
        (THINKING_ONLY, True, None),
        (template_text("qwen3_instruct_2507"), True, NEVER_THINKS),
        (template_text("qwen3_instruct_2507"), False, None),
        (template_text("qwen3"), False, None),
    ],
    ids=["always", "as it does", "never", "as it does not", "switched"],
)
def test_a_row_that_asks_for_a_prompt_which_the_template_has_not_is_said(
    qwen3_folder: Path, template: str, says: bool, remark: str | None
) -> None:
    renderer = renderer_of(qwen3_folder)
    assert renderer.template is not None
    renderer = replace(renderer, template=replace(renderer.template, text=template))
    found = renderer.render(parsed("chat", chat(USER, ANSWER, enable_thinking=says))).remarks
    assert [one for one in found if one in (ALWAYS_THINKS, NEVER_THINKS)] == ([remark] if remark else [])


# --- keys that are misspelt, moved or renamed

FULL: dict[str, dict[str, Any]] = {
    "chat": chat(USER, {**CALLED, "reasoning_content": "w", "weight": 2.0}, *LOOP[2:], tools=TOOLS, system="s"),
    "sharegpt": {"conversations": SPOKEN, "system": "s", "tools": TOOLS},
    "instruction": {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
    "preference": {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}], "system": "s"},
    "fim": {"text": "t", "path": "p", "repo": "r"},
}
for _format in ROW_FORMATS.keys() - FULL.keys():  # of the others, the first row of the example file
    FULL[_format] = json.loads((DATA_TEMPLATES / f"{_format}.jsonl").read_text("utf-8").splitlines()[0])
PEERS = ("dialog", "human", "loss_scale", "train_on_turn", "tool_list", "kwargs", "system_prompt", "images", "labels")


def holders(row: Any) -> list[dict[str, Any]]:
    """The row and the messages and calls in it; none in a text."""
    if not isinstance(row, dict):
        return []
    found = [row]
    for key in ("messages", "conversations", "prompt", "chosen", "rejected", "tool_calls"):
        for item in row.get(key, []):
            found += holders(item)
    return found


@given(data=st.data())
def test_no_key_that_is_misspelt_moved_or_renamed_stays_unsaid(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(FULL)))
    row = json.loads(json.dumps(FULL[format]))
    holder = data.draw(st.sampled_from(holders(row)))
    key = data.draw(st.sampled_from(sorted(holder)))
    value = holder.pop(key)
    change = data.draw(st.sampled_from(("misspell", "move", "rename")))
    if change == "misspell":
        at = data.draw(st.integers(0, len(key)))
        key = key[:at] + data.draw(st.sampled_from("xyz_")) + key[at:]
    elif change == "rename":
        key = data.draw(st.sampled_from(PEERS))
    else:
        holder = data.draw(st.sampled_from(holders(row)))
    before = json.dumps(row)
    is_new = key not in holder
    holder.setdefault(key, value)
    sample, without = FORMATS[format](row, SOURCE), FORMATS[format](json.loads(before), SOURCE)
    if isinstance(sample, list):
        return
    found = sample.chosen if isinstance(sample, Pair) else sample
    offered = [one.key for one in found.offered] if isinstance(found, Conversation) else []
    named = {path.rpartition(".")[2] for path in found.unread} | set(offered)
    assert not is_new or value in (None, [], "") or key in named or sample != without, (format, key, row)


def test_the_page_names_the_keys_that_are_refused() -> None:
    table = README.read_text("utf-8").partition("## Keys that are refused")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == [refusal.keys for refusal in REFUSALS]


def test_every_key_that_the_formats_read_is_on_the_page() -> None:
    words = set(re.findall(r"`(\w+)`", README.read_text("utf-8")))
    assert {key for format in ROW_FORMATS.values() for key in format.keys} <= words


# --- columns and tags

FACTORY = {
    "columns": {"conversations": "dialog", "system": "sys", "tools": "functions_json"},
    "tags": {
        **{"role": "speaker", "content": "text", "user": "customer", "assistant": "agent", "tool": "result"},
        "function_call": "action",
    },
}
TOLD = [
    {"speaker": "customer", "text": "q"},
    {"speaker": "action", "text": json.dumps(CALL)},
    {"speaker": "result", "text": "r"},
    {"speaker": "agent", "text": "a"},
]


@pytest.mark.parametrize(
    ("row", "source", "plain"),
    [
        ({"dialog": TOLD, "sys": "s", "functions_json": TOOLS}, FACTORY, chat(SYSTEM, *LOOP, tools=TOOLS)),
        ({"dialog": json.dumps(TOLD), "functions_json": TOOLS, "sys": ""}, FACTORY, chat(*LOOP, tools=TOOLS)),
        (
            {"messages": [{"from": "me", "value": "q"}, {"from": "bot1", "value": "a"}]},
            {"tags": {"role": "from", "content": "value", "user": ["me", "you"], "assistant": ["bot1", "bot2"]}},
            chat(USER, ANSWER),
        ),
        (
            {"conversations": [{"from": "me", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"tags": {"user": "me"}},
            chat(USER, ANSWER),
        ),
        ({"input": "q", "instruction": "a"}, {"columns": {"instruction": "input", "output": "instruction"}}, None),
        ({"question": "q", "answer": "a"}, {"columns": {"instruction": "question", "output": "answer"}}, None),
    ],
)
def test_columns_and_tags_by_other_names_are_the_same_dialogue(
    tmp_path: Path, row: dict[str, Any], source: dict[str, Any], plain: dict[str, Any] | None
) -> None:
    file, problems = tmp_path / "rows.jsonl", list[Any]()
    file.write_text(json.dumps(row) + "\n")
    columns = Columns.of(DataSource(path=str(file), **source))
    (sample,) = read_samples(str(file), "auto", problems, columns=columns)
    expected = parsed("chat", plain or chat(USER, ANSWER))
    assert not problems
    assert isinstance(sample, Conversation)
    assert (sample.messages, list(sample.tools)) == (expected.messages, list(expected.tools))
    assert not sample.unread


def test_a_column_that_gives_way_is_unread_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "q", "output": "a", "instruction": "i"}) + "\n")
    problems: list[Any] = []
    source = DataSource(path=str(file), columns={"instruction": "question", "system": "questions"})
    (sample,) = read_samples(str(file), "auto", problems, columns=Columns.of(source))
    assert isinstance(sample, Conversation)
    assert sample.unread == ("instruction",)
    (problem,) = problems
    assert "no row has the column 'questions', which is to be 'system'" in problem.what
    assert "Did you mean 'question'? Its rows have 'question', 'output', 'instruction'" in problem.fix
