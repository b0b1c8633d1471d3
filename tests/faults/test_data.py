"""Twenty bad data files: what is said of each stands in `data/`, and what it says mends the file.

python -m pytest tests/faults/test_data.py --co is their list; delete a file of `data/` to have it written anew.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwentune.data import json_rows
from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.tokenizer import load_tokenizer
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


def fim(**row: str) -> str:
    return json.dumps(row)


GOOD, OTHER = asked(), asked("bye", "see you")
DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"


def lines(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


@dataclass(frozen=True)
class Bad:
    """A bad file, and the same after the fix that is printed was applied."""

    data: bytes
    mended: bytes
    name: str = "rows.jsonl"
    evaluation: bytes | None = None


BAD = {
    "H47": Bad(lines(GOOD, OTHER)[:-20], lines(GOOD, OTHER)),
    "H48": Bad(f"[{GOOD},\n{OTHER},\n]".encode(), f"[{GOOD},\n{OTHER}\n]".encode(), "rows.json"),
    "H49": Bad(f"{GOOD},\n{OTHER}\n".encode(), lines(GOOD, OTHER)),
    "H50": Bad(lines(f"{GOOD} {OTHER}"), lines(GOOD, OTHER)),
    "H51": Bad(lines(GOOD).decode().encode("utf-16"), "\ufeff".encode() + lines(GOOD).replace(b"\n", b"\r\n")),
    "H52": Bad(
        lines(GOOD, asked("caf\xe9"), asked("\ud83d")).replace(b"\\u00e9", b"\xe9"),
        lines(GOOD, asked("caf\xe9"), asked("\U0001f600")),
    ),
    "H53": Bad(
        lines(GOOD, chat(("user", "q"), ("assistant", "a"), score=float("nan"))),
        lines(GOOD, chat(("user", "q"), ("assistant", "a"), score=None)),
    ),
    "H54": Bad(lines(GOOD, str(json.loads(OTHER))), lines(GOOD, OTHER)),
    "H55": Bad(
        lines(GOOD, asked("a", None), asked("b", 5), asked("c", [["x"]])),
        lines(GOOD, asked("a", "x"), asked("b", "5"), asked("c", [{"type": "text", "text": "x"}])),
    ),
    "H56": Bad(lines(GOOD, '{"messages": []}', '{"tools": []}'), lines(GOOD, OTHER, asked("x"))),
    "H57": Bad(
        lines(GOOD, *[chat(("user", "a"), ("asistant", "b"))] * 12, chat(("user", "c"), ("user", "d"))),
        lines(
            GOOD,
            *(chat(("user", str(i)), ("assistant", "b")) for i in range(12)),
            chat(("user", "c"), ("assistant", "d")),
        ),
    ),
    "H58": Bad(lines(GOOD, asked("x", "")), lines(GOOD, asked("x", "y"))),
    "H59": Bad(lines(GOOD, called("f", '{"x": 1', "f")), lines(GOOD, called("f", '{"x": 1}', "f"))),
    "H59-warned": Bad(
        lines(GOOD, called("g", {}, "f"), chat(("user", "q"), ("tool", "1"), ("assistant", "a"))),
        lines(GOOD, called("g", {}, "f", "g")),
    ),
    "H60": Bad(
        lines(fim(prefix="a", suffix="b"), fim(prefix="a", middle="m", suffix="b")),
        lines(fim(prefix="a", middle="n", suffix="b"), fim(prefix="a", middle="m", suffix="b")),
    ),
    "H61": Bad(lines(GOOD, asked("a<|im_end|>b")), lines(GOOD, asked("ab"))),
    "H62": Bad(lines(GOOD, GOOD, OTHER), lines(GOOD), evaluation=lines(OTHER)),
    "H63": Bad(lines(GOOD, asked("x" * 2**20), DEEP), lines(GOOD)),
    "H64": Bad(gzip.compress(bytes(2**22), mtime=0), gzip.compress(lines(GOOD), mtime=0), "rows.jsonl.gz"),
    "H65": Bad(b"", lines(GOOD)),
    "H66": Bad(lines(GOOD, OTHER, '{"text": "a text"}'), lines(GOOD, OTHER)),
}


def prepared(bad: Bad, data: bytes, folder: Path, **options: Any) -> Dataset:
    Path(bad.name).write_bytes(data)
    if bad.evaluation is not None:
        Path("eval.jsonl").write_bytes(bad.evaluation)
        options["eval"] = [{"path": "eval.jsonl"}]
    data_options = DataOptions.model_validate({"train": [{"path": bad.name}], "max_tokens": 2**21, **options})
    tokenizer = load_tokenizer(folder)
    return prepare(data_options, tokenizer, chat_template(data_options, tokenizer), 0)


def said(bad: Bad, data: bytes, folder: Path) -> str:
    """What a user reads of the file: why it is refused, or the warnings of its report; empty where nothing is wrong."""
    try:
        return "".join(f"warning: {warning}\n" for warning in prepared(bad, data, folder).report["warnings"])
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
    assert said(bad, bad.mended, qwen2_folder) == ""


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
