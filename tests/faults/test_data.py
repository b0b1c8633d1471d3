"""Twenty bad data files: what is said of each stands in `data/`, and what it says mends the file.

python -m pytest tests/faults/test_data.py --co is their list; delete a file of `data/` to have it written anew.
"""

from __future__ import annotations

import gzip
import json
import re
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.reading import json_rows
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions

GOLDEN = Path(__file__).parent / "data"


def chat(*messages: tuple[str, Any], **row: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages], **row})


def asked(question: str = "hi", answer: Any = "hello") -> str:
    return chat(("user", question), ("assistant", answer))


def called(name: str, arguments: Any, *tools: str) -> str:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    messages = [{"role": "user", "content": "hi"}, call]
    return json.dumps({"messages": messages, "tools": [{"type": "function", "function": {"name": t}} for t in tools]})


def with_call_before_result(text: str, _: re.Match[str]) -> str:
    row = json.loads(called("f", {}, "f"))
    row["messages"] += json.loads(text)["messages"][1:]
    return json.dumps(row)


def fim(**row: str) -> str:
    return json.dumps(row)


GOOD, OTHER = asked(), asked("bye", "see you")
NESTED = "[" * 5000 + "]" * 5000
DEEP = f'{GOOD[:-1]}, "extra": {NESTED}}}'


def lines(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


@dataclass(frozen=True)
class Step:
    """An edit of the file that printed words name: those words, whose groups are places and values, and the edit."""

    words: str
    edit: Callable[[bytes, re.Match[str]], bytes]


def row(words: str, edit: Callable[[str, re.Match[str]], str]) -> Step:
    """The row at the place `{row}` of the words is edited; a row without text is left out."""

    def edit_file(data: bytes, said: re.Match[str]) -> bytes:
        rows = data.split(b"\n")
        k = int(said["line"]) - 1
        edited = edit(rows[k].decode("utf-8", "surrogateescape"), said)
        rows[k : k + 1] = [edited.encode("utf-8", "surrogateescape")] if edited else []
        return b"\n".join(rows)

    return Step(words.replace("{row}", r"rows\.jsonl:(?P<line>\d+)(?::(?P<column>\d+))?"), edit_file)


def write(data: bytes) -> Callable[[bytes, re.Match[str]], bytes]:
    """What a person does who reads prose: here with a file of their own."""
    return lambda _, __: data


def with_value(value: Any, key: str | None = None) -> Callable[[str, re.Match[str]], str]:
    """The value at a key, or at the path that the words name, is replaced."""

    def edit(text: str, said: re.Match[str]) -> str:
        *path, last = re.findall(r"\w+", key or said["path"])
        place = data = json.loads(text)
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        place[int(last) if last.isdigit() else last] = value(said) if callable(value) else value
        return json.dumps(data)

    return edit


def at_column(insert: str, num_removed: int = 0) -> Callable[[str, re.Match[str]], str]:
    def edit(text: str, said: re.Match[str]) -> str:
        k = int(said["column"]) - 1
        return text[:k] + insert + text[k + num_removed :]

    return edit


def without_comma_before(data: bytes, said: re.Match[str]) -> bytes:
    rows = data.decode().split("\n")
    line, column = int(said["line"]), int(said["column"])
    before = "\n".join([*rows[: line - 1], rows[line - 1][: column - 1]])
    return (before.rstrip().removesuffix(",") + "\n".join([rows[line - 1][column - 1 :], *rows[line:]])).encode()


def into_a_file_of_its_own(text: str, _: re.Match[str]) -> str:
    Path("other.jsonl").write_text(text)
    return ""


def left_out(_: str, __: re.Match[str]) -> str:
    return ""


@dataclass(frozen=True)
class Bad:
    """A bad file, and how it is mended: for each of the ways that the printed fixes leave open, all steps of it."""

    data: bytes
    mends: Sequence[Sequence[Step]]
    name: str = "rows.jsonl"
    evaluation: bytes | None = None


BAD = {
    "H47": Bad(
        lines(GOOD, OTHER)[:-20],
        [[row("{row}  the file ends in the middle of this row\n    Write the file again: .*", lambda *_: OTHER)]],
    ),
    "H48": Bad(
        f"[{GOOD},\n{OTHER},\n]".encode(),
        [
            [
                Step(
                    r"rows\.json:(?P<line>\d+):(?P<column>\d+)  the array is broken .*\n"
                    r"    Is there a comma before the closing bracket\? Remove it\.",
                    without_comma_before,
                )
            ]
        ],
        "rows.json",
    ),
    "H49": Bad(
        f"{GOOD},\n{OTHER}\n".encode(),
        [[row("{row}  a comma after the row\n    Rows have no comma between them.", at_column("", 1))]],
    ),
    "H50": Bad(
        lines(f"{GOOD} {OTHER}"),
        [[row("{row}  several values on one line\n    Put each row on a line of its own.", at_column("\n"))]],
    ),
    "H51": Bad(
        lines(GOOD).decode().encode("utf-16"),
        [[Step("the file is UTF-16\n    Save the file as UTF-8.", lambda data, _: data.decode("utf-16").encode())]],
    ),
    "H52": Bad(
        lines(GOOD, asked("caf\xe9"), asked("\ud83d")).replace(b"\\u00e9", b"\xe9"),
        [
            [
                row(
                    "{row}  the escape .*\n    Write rows with json.dumps; it pairs such escapes.",
                    lambda *_: asked("\U0001f600"),
                ),
                Step(
                    "the byte 0xe9 is not UTF-8\n    Save the file as UTF-8.",
                    lambda data, _: data.decode("latin-1").encode(),
                ),
            ]
        ],
    ),
    "H53": Bad(
        lines(GOOD, chat(("user", "q"), ("assistant", "a"), score=float("nan"))),
        [
            [row("{row}  NaN is not a finite number\n    Use a finite number, or null.", edit)]
            for edit in (with_value(0.5, "score"), with_value(None, "score"))
        ],
    ),
    "H54": Bad(
        lines(GOOD, str(json.loads(OTHER))),
        [
            [
                row(
                    "{row}  a single quote .*\n    Write rows with json.dumps, not with str or repr.",
                    lambda text, _: json.dumps(literal_eval(text)),
                )
            ]
        ],
    ),
    "H55": Bad(
        lines(GOOD, asked("a", None), asked("b", 5), asked("c", [["x"]])),
        [
            [
                row("{row}  (?P<path>.*) is null\n    Give its text; only an assistant message .*", with_value("x")),
                row(
                    r"{row}  (?P<path>.*) is the number (?P<value>.*)\n    A text or a list of parts is needed.",
                    with_value(number),
                ),
                row(
                    r'{row}  (?P<path>.*) is the list \["(?P<value>.*)"\]\n'
                    r"    A part is an object such as (?P<part>.*)\.",
                    with_value(lambda said: json.loads(said["part"].replace("…", json.dumps(said["value"])))),
                ),
            ]
            for number in (lambda said: said["value"], lambda said: [{"type": "text", "text": said["value"]}])
        ],
    ),
    "H56": Bad(
        lines(GOOD, '{"messages": []}', '{"tools": []}'),
        [
            [
                row("{row}  messages is empty\n    Give at least a user and an assistant message.", lambda *_: OTHER),
                row(
                    "{row}  (?P<path>.*) is missing\n    A list is needed.",
                    with_value(json.loads(asked("x"))["messages"]),
                ),
            ]
        ],
    ),
    "H57": Bad(
        lines(
            GOOD,
            *(chat(("user", str(i)), ("asistant", "b")) for i in range(12)),
            chat(("user", "c"), ("user", "d")),
        ),
        [
            [
                Step(
                    r"has the unknown role '(?P<old>\w+)'\n    … and 2 more .*\n    Did you mean '(?P<new>\w+)'\?",
                    lambda data, said: data.replace(said["old"].encode(), said["new"].encode()),
                ),
                row(
                    "{row}  messages has no assistant message\n    Only what the assistant says is trained.",
                    lambda *_: asked("c", "d"),
                ),
            ]
        ],
    ),
    "H58": Bad(
        lines(GOOD, asked("x", "")),
        [
            [row("says? nothing: .* Leave them out, or give their text. First: {row}", edit)]
            for edit in (left_out, lambda *_: asked("x", "y"))
        ],
    ),
    "H59": Bad(
        lines(GOOD, called("f", '{"x": 1', "f")),
        [
            [
                row(
                    "{row}  (?P<path>.*) is a text that is no JSON, .*\n"
                    "    Write it with json.dumps, or give the value itself.",
                    with_value(arguments),
                )
            ]
            for arguments in (json.dumps({"x": 1}), {"x": 1})
        ],
    ),
    "H59-warned": Bad(
        lines(GOOD, called("g", {}, "f"), chat(("user", "q"), ("tool", "1"), ("assistant", "a"))),
        [
            [
                row(
                    "tool results? follows? no tool call. Give the call in the assistant's message before. .*{row}",
                    with_call_before_result,
                ),
                row("Add those tools, or leave the rows out. First: {row}", edit),
            ]
            for edit in (lambda *_: called("g", {}, "f", "g"), left_out)
        ],
    ),
    "H60": Bad(
        lines(fim(prefix="a", suffix="b"), fim(prefix="a", middle="m", suffix="b")),
        [[row("{row}  (?P<path>.*) is missing\n    A text is needed.", with_value("n"))]],
    ),
    "H61": Bad(
        lines(GOOD, asked("a<|im_end|>b")),
        [
            [
                row(
                    "control tokens? (?:is|are) spelled .* Remove them, unless the text is about them. First: {row}",
                    lambda text, _: text.replace("<|im_end|>", ""),
                )
            ]
        ],
    ),
    "H62": Bad(
        lines(GOOD, GOOD, OTHER),
        [
            [
                Step("rows? trains? exactly what an earlier row trains; leave them out, .*", write(lines(GOOD, OTHER))),
                Step("evaluation rows? (?:is|are) trained as well: .* Remove them from one side", write(lines(GOOD))),
            ]
        ],
        evaluation=lines(OTHER),
    ),
    "H63": Bad(
        lines(GOOD, asked("x" * 2**20), DEEP),
        [
            [
                row("{row}  .* are nested .*\n    Flatten the row, or store the nested part as a text of JSON.", deep),
                row(
                    "{row}  the line is longer than 1 MiB\n    .*; cut a row that is longer.",
                    lambda text, _: asked(json.loads(text)["messages"][0]["content"][: 2**19]),
                ),
            ]
            for deep in (lambda *_: OTHER, lambda text, _: chat(("user", "a"), ("assistant", "b"), extra=NESTED))
        ],
    ),
    "H64": Bad(
        gzip.compress(bytes(2**22), mtime=0),
        [
            [
                Step(
                    "the line is longer than 1 MiB\n    Put each row on a line of its own; cut a row that is longer.",
                    write(gzip.compress(lines(GOOD), mtime=0)),
                )
            ]
        ],
        "rows.jsonl.gz",
    ),
    "H65": Bad(b"", [[Step("the file holds no rows\n    Write at least one row.", write(lines(GOOD)))]]),
    "H66": Bad(
        lines(GOOD, OTHER, '{"text": "a text"}'),
        [
            [
                row(
                    "{row}  .*\n    Give rows of another format a file and a source of their own.",
                    into_a_file_of_its_own,
                )
            ]
        ],
    ),
}


def prepared(bad: Bad, data: bytes, folder: Path, **options: Any) -> Dataset:
    Path(bad.name).write_bytes(data)
    if bad.evaluation is not None:
        Path("eval.jsonl").write_bytes(bad.evaluation)
        options["eval"] = [{"path": "eval.jsonl"}]
    files = [{"path": name} for name in (bad.name, "other.jsonl") if Path(name).exists()]
    data_options = DataOptions.model_validate({"train": files, "max_tokens": 2**21, **options})
    tokenizer = load_tokenizer(folder)
    return prepare(data_options, tokenizer, chat_template(data_options, tokenizer), 0)


def said(bad: Bad, data: bytes, folder: Path, **options: Any) -> str:
    """What a user reads of the file: why it is refused, or the warnings of its report; empty where nothing is wrong."""
    try:
        return "".join(f"warning: {warning}\n" for warning in prepared(bad, data, folder, **options).report["warnings"])
    except DataError as error:
        return f"{error}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(json_rows, "LARGEST_ROW_BYTES", 2**20)


@pytest.mark.fault(
    "H47 H48 H49 H50 H51 H52 H53 H54 H55 H56 H57 H58 H59 H60 H61 H62 H63 H64 H65 H66",
    "everything that is wrong at once, with places, count and the fix, in the words of `faults/data/`; exit 3",
)
@pytest.mark.parametrize("row", BAD)
def test_a_bad_file_is_said_in_words_and_what_they_say_mends_it(row: str, qwen2_folder: Path) -> None:
    bad, golden = BAD[row], GOLDEN / f"{row}.txt"
    words = said(bad, bad.data, qwen2_folder)
    assert words
    if not golden.exists():
        golden.write_text(words, encoding="utf-8")
        pytest.fail(f"{golden} was written: read it")
    assert words == golden.read_text(encoding="utf-8")
    for steps in bad.mends:
        data, applied = bad.data, list[str]()
        for step in steps:
            match = re.search(step.words, words)
            assert match, step.words
            applied.append(match[0])
            data = step.edit(data, match)
        assert all(any(fix in text for text in applied) for fix in re.findall("^    ([^…].*)$", words, re.MULTILINE))
        assert said(bad, data, qwen2_folder) == ""
        Path("other.jsonl").unlink(missing_ok=True)


QUESTION, ANSWER = ("user", "q"), ("assistant", "a")
REASONED = ("assistant", "<think>\nr\n</think>\n\na")
FROM_A_TOOL = ("user", "<tool_response>1</tool_response>")  # Qwen3 takes it for no question


@pytest.mark.parametrize(
    ("messages", "options", "fixes"),
    [
        (
            (QUESTION, ANSWER, ANSWER),
            {},
            ["join messages[2] to messages[1]", 'leave out messages[2] with "train": false'],
        ),
        (
            (QUESTION, ANSWER, ANSWER),
            {"turns": "last"},
            ["join messages[2] to messages[1]", 'leave out messages[2] with "train": false'],
        ),
        (
            (QUESTION, ANSWER, ANSWER, QUESTION, ANSWER, ANSWER),
            {"system": "s"},
            [
                "join messages[2] to messages[1] and messages[5] to messages[4]",
                'leave out messages[2] and messages[5] with "train": false',
            ],
        ),
        (
            (QUESTION, REASONED, REASONED),
            {"thinking": "off", "unsupported_reasoning": "drop"},
            ['leave out messages[2] with "train": false', "set data.thinking=auto"],
        ),
        ((FROM_A_TOOL, ANSWER), {}, ["leave the row out"]),
        ((FROM_A_TOOL, ANSWER, QUESTION, ANSWER), {}, ['leave out messages[1] with "train": false']),
    ],
)
def test_a_turn_that_does_not_continue_its_prompt_is_mended_by_each_fix_that_is_said(
    messages: Sequence[tuple[str, str]], options: dict[str, Any], fixes: list[str], qwen3_folder: Path
) -> None:
    bad = Bad(lines(GOOD, chat(*messages)), ())
    words = said(bad, bad.data, qwen3_folder, **options)
    assert "does not continue the prompt that a server would build" in words
    printed = words.splitlines()[1].strip().rstrip(".").split(", or ")
    assert [fix.lower() for fix in printed] == fixes
    for fix in printed:
        row = json.loads(bad.data.splitlines()[1])
        for turn in re.findall(r"messages\[(\d+)\]", fix) if '"train": false' in fix else ():
            row["messages"][int(turn)]["train"] = False
        for turn, other in reversed(re.findall(r"messages\[(\d+)\] to messages\[(\d+)\]", fix)):
            row["messages"][int(other)]["content"] += "\n\n" + row["messages"].pop(int(turn))["content"]
        mended = lines(GOOD, *[json.dumps(row)] * ("the row out" not in fix))
        overrides = dict(re.findall(r"data\.(\w+)=(\w+)", fix))
        left = said(bad, mended, qwen3_folder, **options | overrides)
        assert not left or (
            "join" not in fix and re.fullmatch("warning: .* follows? another of the same speaker.*\n", left)
        )


@pytest.mark.parametrize("row", ["H47", "H49", "H52", "H53", "H54", "H55", "H56", "H57", "H59", "H63", "H66"])
def test_rows_that_are_left_out_leave_a_record_and_the_others_stay(row: str, qwen2_folder: Path) -> None:
    bad = BAD[row]
    dataset = prepared(bad, bad.data, qwen2_folder, bad_rows="skip", max_dropped_fraction=0.99)
    trained = {dataset.examples.source(i).line for i in range(len(dataset.examples))}
    dropped = {drop["source"]["line"] for drop in dataset.dropped}
    assert not trained & dropped
    assert trained | dropped == set(range(1, bad.data.count(b"\n") + (not bad.data.endswith(b"\n")) + 1))


def test_every_file_that_cannot_be_read_is_named_at_once(tmp_path: Path, qwen2_folder: Path) -> None:
    Path("folder.jsonl").mkdir()
    paths = ("folder.jsonl", "missing.jsonl", "data_templates/chat.jsonl")
    options = DataOptions.model_validate({"train": [{"path": path} for path in paths]})
    with pytest.raises(DataError) as refused:
        prepare(options, load_tokenizer(qwen2_folder), None, 0)
    assert [problem.where for problem in refused.value.problems] == ["folder.jsonl", "missing.jsonl"]
