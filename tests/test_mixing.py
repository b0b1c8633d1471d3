"""Several sources in one epoch: each row stands there as often as its source's `repeat` says, the same every time."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


def mixed(
    folder: Path, sources: dict[str, tuple[int, float]], seed: int = 0, num_turns: int = 1, **options: Any
) -> Dataset:
    """The data of files with so many rows, each with its `repeat`; every turn makes an example of its own."""
    for name, (num_rows, _) in sources.items():
        rows: list[dict[str, Any]] = []
        for k in range(num_rows):
            turn = [{"role": "user", "content": f"{name} {k}"}, {"role": "assistant", "content": "a"}]
            turn[1]["reasoning_content"] = "because"  # which Qwen3 leaves out of the history
            rows.append({"messages": turn * num_turns})
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"path": name, "repeat": repeat} for name, (_, repeat) in sources.items()]
    data = DataOptions.model_validate({"train": train, **options})
    tokenizer = load_tokenizer(folder)
    return prepare(data, tokenizer, chat_template(data, tokenizer), seed)


def seen(dataset: Dataset) -> Counter[str]:
    """How often each row is trained in an epoch."""
    return Counter(str(dataset.examples.source(int(i))) for i in dataset.examples.train)


def of(rows: Counter[str], name: str) -> dict[str, int]:
    return {row: count for row, count in rows.items() if row.startswith(name)}


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    repeats=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_each_row_is_seen_as_often_as_its_source_says(
    qwen3_folder: Path, sizes: list[int], repeats: list[float], seed: int
) -> None:
    sources = {f"{k}.jsonl": (size, repeat) for k, (size, repeat) in enumerate(zip(sizes, repeats, strict=False))}
    sources["whole.jsonl"] = (2, 1.0)
    rows = seen(mixed(qwen3_folder, sources, seed))
    for name, (size, repeat) in sources.items():
        counts = of(rows, name)
        assert abs(sum(counts.values()) - repeat * size) <= 0.5
        assert {counts.get(f"{name}:{line + 1}", 0) for line in range(size)} <= {math.floor(repeat), math.ceil(repeat)}


def test_packed_rows_hold_the_mixture(qwen3_folder: Path) -> None:
    dataset = mixed(qwen3_folder, {"twice.jsonl": (9, 2.0), "half.jsonl": (10, 0.5)}, max_tokens=100)
    held = Counter(
        str(dataset.examples.source(i)) for row in range(len(dataset.train)) for i in dataset.train.examples_of(row)
    )
    assert held == seen(dataset)
    assert (sum(of(held, "twice").values()), sum(of(held, "half").values())) == (18, 5)


def test_a_dialogue_is_repeated_with_all_its_examples(qwen3_folder: Path) -> None:
    counts = seen(mixed(qwen3_folder, {"rows.jsonl": (8, 0.5)}, num_turns=3))
    assert sorted(counts.values()) == [3, 3, 3, 3]


def test_the_half_is_the_same_for_a_seed_and_another_for_another(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"one.jsonl": (40, 0.5), "two.jsonl": (40, 0.5)}
    first = mixed(qwen3_folder, sources)
    monkeypatch.setenv("QWENTUNE_CACHE", "another-cache")  # so that it is rendered again
    again = mixed(qwen3_folder, sources)
    assert again.examples.train.tolist() == first.examples.train.tolist()
    assert again.content == first.content
    assert seen(mixed(qwen3_folder, sources, seed=1)) != seen(first)
    halves = [{row.split(":")[1] for row in of(seen(first), name)} for name in sources]
    assert halves[0] != halves[1]


def test_what_is_held_out_is_not_trained_however_often_its_source_is_repeated(qwen3_folder: Path) -> None:
    dataset = mixed(qwen3_folder, {"rows.jsonl": (20, 2.5)}, eval_fraction=0.2)
    held_out = {str(dataset.examples.source(int(i))) for i in dataset.examples.evaluation}
    counts = seen(dataset)
    assert len(held_out) == len(dataset.examples.evaluation) == 4
    assert not held_out & set(counts)
    assert Counter(counts.values()) == {2: 8, 3: 8}


@pytest.mark.parametrize(("most", "repeat"), [(1, 1.0), (7, 0.5), (20, 2.0), (30, 1.0)])
def test_of_a_source_only_its_first_rows_are_read(qwen3_folder: Path, most: int, repeat: float) -> None:
    mixed(qwen3_folder, {"rows.jsonl": (20, 1.0)})  # writes the file
    with Path("rows.jsonl").open("a") as file:
        file.write("{ this row is broken, and never reached\n" if most <= 20 else "")
    train = [{"path": "rows.jsonl", "max_rows": most, "repeat": repeat}]
    data = DataOptions.model_validate({"train": train})
    tokenizer = load_tokenizer(qwen3_folder)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), 0)
    counts = seen(dataset)
    assert dataset.report["rows"]["read"] == min(most, 20)
    assert {int(row.rpartition(":")[2]) for row in counts} <= set(range(1, min(most, 20) + 1))
    assert abs(counts.total() - repeat * min(most, 20)) <= 0.5


def test_a_repeat_that_takes_no_row_is_named(qwen3_folder: Path) -> None:
    with pytest.raises(DataError, match=r"no row is left to train on\n.*repeat"):
        mixed(qwen3_folder, {"rows.jsonl": (3, 0.1)})


def test_a_source_of_which_no_row_is_trained_is_named_among_others(qwen3_folder: Path) -> None:
    dataset = mixed(qwen3_folder, {"small.jsonl": (3, 0.1), "large.jsonl": (30, 0.1)})
    assert sum(seen(dataset).values()) == 3
    (warning,) = (warning for warning in dataset.report["warnings"] if "small.jsonl" in warning)
    assert "no row of small.jsonl is trained: repeat 0.1 of 3 rounds to none. Raise its repeat" in warning
    assert not [warning for warning in dataset.report["warnings"] if "large.jsonl" in warning]


def test_a_source_that_is_held_out_whole_is_named(qwen3_folder: Path) -> None:
    sources = {f"{k}.jsonl": (1, 1.0) for k in range(4)}
    dataset = mixed(qwen3_folder, sources, eval_fraction=0.25)
    (held_out,) = (dataset.examples.source(int(i)).file for i in dataset.examples.evaluation)
    (warning,) = (warning for warning in dataset.report["warnings"] if "no row of" in warning)
    assert f"no row of {held_out} is trained: data.eval_fraction=0.25 holds out all" in warning
