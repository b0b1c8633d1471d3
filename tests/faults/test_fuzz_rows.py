"""Rows of every format, damaged at random and with Qwen's control tokens in every field: none lost, none forged.

pytest -m soak tests/faults/test_fuzz_rows.py tries thousands; FUZZ_SEED=N repeats what a printed seed did.
"""

from __future__ import annotations

import copy
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from qwentune.data.dataset import Dataset, prepare
from qwentune.data.formats import FORMATS
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions
from tests.checkpoints import template_text
from tests.dialogues import HOSTILE_TEXTS, Taste, random_row
from tests.faults.fuzz import new_seed
from tests.oracle import UntrainableError, expected_examples

DATA_TEMPLATES = Path(__file__).parents[2] / "data_templates"
TEMPLATES = ("qwen2_5", "qwen3", "qwen3_8")
ASKED = "\u2020asked\u2020"  # stands in every text that the assistant does not say: none of it may be trained
ASKED_KEYS = ("instruction", "input", "system", "prompt", "prefix", "suffix", "query")  # of rows, of any format
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3.5, 1e300, 10**30, "", " ", "\n", [], {}, [[]], [None], {"a": None}, [{}], {"": ""}),
    *("\x00", "\ufeff", "\u202e", "e\u0301", "\u1112\u1161\u11ab", "\u2028", "\ue000", "👍🏽"),
    *("\ud83d", "a|b", "{{ 1 }}", "[1", "x" * 3000),
    *("user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", *HOSTILE_TEXTS),
    {"type": "text", "text": "part"},
    [{"type": "text", "text": "<|im_end|>"}],
    [{"type": "image", "image": "x.png"}],
    {"name": "f", "arguments": "{"},
)  # fmt: skip
KEYS = (
    "role",
    "content",
    "from",
    "value",
    "messages",
    "weight",
    "train",
    "tools",
    "tool_calls",
    "text",
    "output",
    "name",
)
BROKEN = (
    b'{"text"',
    b"[]",
    b"3",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"text": "a"} {"text": "b"}',
    b"{'text': 1}",
    b"nan",
)


def text(random: Random) -> str:
    """A text with what the control tokens are made of."""
    words = [*HOSTILE_TEXTS, "<|im_start|>", "<think>", "</think>", "<tool_call>", "word", "什么", "\n", "e\u0301"]
    return "".join(random.choices(words, k=random.randint(1, 4))) + "."


def chat(random: Random) -> dict[str, Any]:
    return random_row(random, Taste(reasoning=True, quoted_think=random.random() < 0.2, marks=True))


def sharegpt(random: Random) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[k % 2], "value": text(random)} for k in range(random.choice((2, 2, 3, 4, 6)))]
    return {"conversations": turns} | ({"system": text(random)} if random.random() < 0.3 else {})


def instruction(random: Random) -> dict[str, Any]:
    row: dict[str, Any] = {"instruction": text(random), "output": text(random)}
    more = {"input": text(random), "system": text(random), "history": [[text(random), text(random)]]}
    return row | {key: more[key] for key in more if random.random() < 0.4}


def fim(random: Random) -> dict[str, Any]:
    kinds = (
        {key: text(random) for key in ("prefix", "suffix", "middle")},
        {"text": text(random) * 5, "path": "a.py", "repo": "r"},
        {"repo": text(random), "files": [{"path": text(random), "text": text(random)} for _ in range(3)]},
    )
    return random.choice(kinds)


def document(random: Random) -> dict[str, Any]:
    return {"text": text(random) * random.choice((0, 1, 1, 30))}


def preference(random: Random) -> dict[str, Any]:
    prompt = [{"role": "user", "content": text(random)}]
    return {"prompt": prompt} | {
        key: [{"role": "assistant", "content": text(random)}] for key in ("chosen", "rejected")
    }


def completion(random: Random) -> dict[str, Any]:
    if random.random() < 0.5:
        return {"prompt": text(random), "completion": text(random)}
    messages = chat(random)["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def request(random: Random) -> dict[str, Any]:
    """A logged call, of OpenAI's chat completions, its responses, or Anthropic's messages."""
    question, answer = text(random), text(random)
    asked = {"messages": [{"role": "user", "content": question}], "temperature": 0.5}
    match random.randrange(4):
        case 0:
            row = chat(random)
            message = {"message": row["messages"].pop(), "finish_reason": "stop"}
            return {"request": row, "response": {"choices": [message]}}
        case 1:
            blocks = [{"type": "thinking", "thinking": text(random)}, {"type": "text", "text": answer}]
            asked["messages"][0]["content"] = [
                {"type": "tool_result", "content": question},
                {"type": "text", "text": "x"},
            ]
            return {"request": asked, "response": {"role": "assistant", "content": blocks, "stop_reason": "end_turn"}}
        case 2:
            message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}
            return {"request": {"input": [*asked["messages"]]}, "response": {"output": [message]}}
        case _:
            return {"input": json.dumps(asked), "output": json.dumps({"role": "assistant", "content": answer})}


ROWS = {
    "request": request,
    "completion": completion,
    "chat": chat,
    "sharegpt": sharegpt,
    "instruction": instruction,
    "fim": fim,
    "text": document,
    "preference": preference,
}


def row_of(format: str, random: Random) -> dict[str, Any]:
    """A row of a format: one of its own here, else one of its example file with other texts."""
    if format in ROWS:
        return ROWS[format](random)
    row = random.choice(
        [json.loads(line) for line in (DATA_TEMPLATES / f"{format}.jsonl").read_text("utf-8").splitlines()]
    )
    for holder, key in list(places(row)):
        if isinstance(holder[key], str):
            holder[key] = text(random)
    return row


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(row: dict[str, Any], random: Random) -> None:
    """One change anywhere in the row."""
    found = list(places(row))
    if not found:
        row[random.choice(KEYS)] = random.choice(VALUES)
        return
    container, key = random.choice(found)
    old = container[key]
    match random.randrange(7):
        case 0:
            container[key] = copy.deepcopy(random.choice(VALUES))
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[random.choice(KEYS)] = container.pop(key)
        case 3 if isinstance(container, list):
            container.insert(key, copy.deepcopy(random.choice((old, *VALUES))))
        case 4 if isinstance(old, str):
            at = random.randint(0, len(old))
            container[key] = old[:at] + random.choice(HOSTILE_TEXTS) + old[at:]
        case 5:
            container[key] = json.dumps(old) if random.random() < 0.5 else [copy.deepcopy(old)]
        case _:
            other, where = random.choice(found)
            container[key] = copy.deepcopy(other.get(where) if isinstance(other, dict) else old)


def mark(row: dict[str, Any]) -> None:
    """Puts `ASKED` into every text that the assistant does not say."""

    def marked(container: Any, key: Any) -> None:
        if isinstance(container.get(key), str):
            container[key] += ASKED

    for key in ASKED_KEYS:
        marked(row, key)
    whole = [row, asked] if isinstance(asked := row.get("request"), dict) else [row]
    keys = ("messages", "conversations", "prompt", "chosen", "rejected", "input")
    listed = (one.get(key) for one in whole for key in keys)
    for message in (message for messages in listed if isinstance(messages, list) for message in messages):
        if isinstance(message, dict):
            if message.get("role") in ("user", "system", "tool", "developer", "function"):
                marked(message, "content")
            if message.get("from") in ("human", "user", "system", "observation", "tool"):
                marked(message, "value")


def asked_of_the_oracle(
    row: dict[str, Any], judge: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[int]]] | None:
    """Ids and labels that a row of the `chat` format must give; None where the oracle does not take it."""
    known = {"role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "train", "weight"}
    if isinstance(row["messages"], str):  # as tables store a list
        row = {**row, "messages": json.loads(row["messages"])}
    for message in row["messages"]:
        if not isinstance(message.get("content"), str | list) or not known >= message.keys():
            return None
        if message.get("role") in ("function_call", "tool_call", "tool_response"):  # roles of other toolkits
            return None
        if not isinstance(message.get("train", True), bool):
            return None
        said = json.dumps(message["content"])
        if "</think>" in said and "<think>" not in said:  # reasoning to the oracle also where we take it for a quote
            return None
    try:
        examples = expected_examples(row, judge, unsupported_reasoning="inline")
    except (UntrainableError, jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None
    return [(example["input_ids"], example["labels"]) for example in examples]


def rendered(
    lines: list[bytes], format: str, tokenizer: Tokenizer, template: str, seed: int
) -> tuple[Dataset | None, str]:
    """The dataset of a file with these lines, or what is said of it."""
    Path("rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    data = DataOptions.model_validate(
        {
            "train": [{"path": "rows.jsonl", "format": format, "repeat": 0.8}],
            "eval_fraction": 0.1,
            "max_tokens": 2000 if format == "chat" else 300,
            "unsupported_reasoning": "inline",
            "bad_rows": "skip",
            "max_dropped_fraction": 1.0,
        }
    )
    try:
        return prepare(data, tokenizer, ChatTemplate(template, tokenizer.special_tokens, {}), seed), ""
    except DataError as error:
        return None, str(error)


def check(format: str, name: str, folder: Path, seed: str, count: int) -> int:
    """Renders that many rows of a format, checks all that must hold, and says how many the oracle judged."""
    random, template, tokenizer = Random(seed), template_text(name), load_tokenizer(folder)
    judge = PreTrainedTokenizerFast.from_pretrained(folder)
    judge.chat_template = template
    rows: dict[int, dict[str, Any]] = {}
    lines: list[bytes] = []
    for line in range(1, count + 1):
        row = row_of(format, random)
        for _ in range(random.choice((0, 0, 1, 1, 2, 5))):
            mutate(row, random)
        mark(row)
        lines.append(json.dumps(row).encode() if line == 1 or random.random() > 0.05 else random.choice(BROKEN))
        if lines[-1] not in BROKEN:
            rows[line] = row
    began = time.monotonic()
    dataset, said = rendered(lines, format, tokenizer, template, 1)
    assert time.monotonic() - began < 60 + count, seed
    if dataset is None:
        assert "no row is left to train on" in said or "would not be trained" in said, (seed, said)
        return 0

    # Every row is in one place.
    counts = dataset.report["rows"]
    assert counts["read"] == count == sum(counts[fate] for fate in counts if fate != "read"), (seed, counts)
    examples = defaultdict[int, list[Any]](list)
    for i in range(len(dataset.examples)):
        example = dataset.examples.example(i)
        examples[example.source.line].append(example)
    dropped = {drop["source"]["line"] for drop in dataset.dropped}
    assert examples.keys() | dropped == set(range(1, count + 1)), seed
    assert len(examples) == counts["trained"] + counts["evaluated"] + counts["left_out_by_repeat"], seed

    # Nothing that was asked is trained, and no text ends a turn.
    control, num_judged = set(tokenizer.control_ids.values()), 0
    for line, of_row in examples.items():
        for example in of_row:
            for span in (span for span in example.spans if span.turn >= 0):
                ids = example.input_ids[span.start : span.stop]
                assert ASKED not in tokenizer.decode(ids), (seed, line)
                assert [k for k, token in enumerate(ids) if token in control] == [len(ids) - 1], (seed, line)
        expected = asked_of_the_oracle(rows[line], judge) if format == "chat" else None
        if expected is not None and line not in dropped:
            found = [
                (e.input_ids, [i if w else -100 for i, w in zip(e.input_ids, e.weights, strict=True)]) for e in of_row
            ]
            assert found == expected, (seed, line)
            num_judged += 1
    return num_judged


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.fault("L84", "of damaged rows of every format each is trained, evaluated, left out, dropped or refused")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_rows_are_all_accounted_for(format: str, name: str, qwen3_folder: Path) -> None:
    num_judged = check(format, name, qwen3_folder, f"{format}-{name}", 30)
    assert num_judged > 5 or format != "chat"


@pytest.mark.soak
@pytest.mark.parametrize("format", FORMATS)
def test_thousands_of_damaged_rows_are_all_accounted_for(format: str, qwen3_folder: Path) -> None:
    seed = new_seed()
    num_judged = sum(
        check(format, name, qwen3_folder, f"{seed}-{format}-{name}-{k}", 50) for name in TEMPLATES for k in range(10)
    )
    assert num_judged > 100 or format != "chat"
