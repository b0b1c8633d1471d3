"""Hub datasets: a split is fetched once and read as a file of its own; where it cannot be, both ways out are named."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from qwentune.data.dataset import chat_template, prepare, prepared
from qwentune.data.reading.files import read_rows
from qwentune.data.reading.hub import is_hub_dataset, kept_file
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError, Problem
from qwentune.recipe import DataOptions
from tests.checkpoints import write_checkpoint
from tests.fake_hub import fake_hub
from tests.runs import ENVIRONMENT, write_recipe


def called(question: str, **arguments: Any) -> dict[str, Any]:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"messages": [{"role": "user", "content": question}, call]}


ROWS = [called("a", city="Rome"), called("b", number=1)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hub is asked for; it has `ROWS`, as a table that fills what a row does not have with nulls."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str, revision: str | None, **_: Any) -> Any:
        asked.append((name, configuration, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def read(path: str) -> tuple[list[tuple[str, Any]], list[Problem]]:
    problems: list[Problem] = []
    return [(str(row.source), row.value) for row in read_rows(path, problems)], problems


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("someone/some-data", ("someone/some-data", None, "train", None)),
        ("someone/some-data-2.5:test", ("someone/some-data-2.5", None, "test", None)),
        ("someone/some_data:main:validation", ("someone/some_data", "main", "validation", None)),
        ("someone/some-data@v1.0", ("someone/some-data", None, "train", "v1.0")),
        ("someone/some-data@refs/pr/3:main:test", ("someone/some-data", "main", "test", "refs/pr/3")),
    ],
)
def test_a_split_is_fetched_once_and_its_rows_are_the_lines_of_a_file(
    path: str, asked: tuple[Any, ...], loads: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = read(path)
    assert first == ([(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])], [])
    assert [json.loads(line) for line in kept_file(path).read_text().splitlines()] == ROWS
    assert str(kept_file(path)) in capsys.readouterr().err
    assert read(path) == first
    assert loads == [asked]


def test_a_run_trains_on_it_and_a_plan_does_not_fetch_it(loads: list[tuple[Any, ...]], qwen3_folder: Path) -> None:
    options = DataOptions.model_validate({"train": [{"path": "someone/some-data"}]})
    tokenizer = load_tokenizer(qwen3_folder)
    template = chat_template(options, tokenizer)
    assert prepared(options, tokenizer, template, 0) is None
    assert loads == []
    dataset = prepare(options, tokenizer, template, 0)
    sources = [str(dataset.examples.source(i)) for i in range(len(dataset.examples))]
    assert sources == ["someone/some-data:1", "someone/some-data:2"]
    assert prepare(options, tokenizer, template, 0).content == dataset.content
    assert prepared(options, tokenizer, template, 0) is not None
    assert len(loads) == 1


@pytest.mark.fault("I70", "a hub dataset that cannot be fetched is named with both ways out; exit 3")
def test_a_hub_that_is_not_asked_is_an_error_with_both_ways_out(qwen3_folder: Path) -> None:
    options = DataOptions.model_validate({"train": [{"path": "someone/some-data:test"}]})
    with pytest.raises(DataError) as refused:
        prepare(options, load_tokenizer(qwen3_folder), None, 0)
    (problem,) = refused.value.problems
    assert refused.value.exit_code == 3
    assert problem.where == "someone/some-data:test"
    assert "as a hub dataset it cannot be fetched: Couldn't reach 'someone/some-data'" in problem.what
    assert "Unset HF_HUB_OFFLINE" in problem.fix
    assert "hf download --repo-type dataset someone/some-data --local-dir data" in problem.fix
    assert not kept_file("someone/some-data:test").exists()


def test_an_unknown_split_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split, **__: load_dataset("json", data_files="rows.jsonl", split=split)
    )
    assert read("someone/some-data")[0] == [("someone/some-data:1", ROWS[0]), ("someone/some-data:2", ROWS[1])]
    rows, (problem,) = read("someone/some-data:tset")
    assert rows == []
    assert "Unknown split \"tset\". Should be one of ['train']" in problem.what


def test_a_row_that_json_has_no_form_for_is_named_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "day": None}, {"text": "b", "day": datetime.datetime(2026, 1, 2)}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    read_back, (problem,) = read("someone/some-data")
    assert (read_back, problem.where) == ([], "someone/some-data:2")
    assert "its column 'day' holds a value of the type datetime" in problem.what
    assert not list(Path("cache").rglob("*.jsonl"))
    assert not list(Path("cache").rglob(".fetching-*"))


READ = """
import json, sys
from qwentune.data.reading.files import read_rows
for path in sys.argv[1:]:
    problems = []
    rows = [row.value for row in read_rows(path, problems)]
    print(json.dumps([rows, [[problem.what, problem.fix] for problem in problems]]))
"""


def read_from(endpoint: str, *paths: str) -> list[tuple[list[Any], list[tuple[str, str]]]]:
    """Rows and problems of each path, read by a process of its own; without an `endpoint` it asks no hub."""
    environment = {**ENVIRONMENT, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0" if endpoint else "1"}
    environment |= {"HF_HOME": str(Path("hf").resolve()), "QWENTUNE_CACHE": str(Path("cache").resolve())}
    command = [sys.executable, "-c", READ, *paths]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in said.splitlines()]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_the_hub_itself_gives_each_revision_its_rows_and_says_what_it_does_not_have() -> None:
    old, new = (
        {"train.jsonl": lines(*ROWS)},
        {"train.jsonl": lines({"text": "new"}), "test.jsonl": lines({"text": "t"})},
    )
    with fake_hub("someone/some-data", {"v1": old, "main": new}) as endpoint:
        paths = ("", "@v1", ":test", "@v2", "@v1:test")
        latest, first, test, unknown, unsplit = read_from(endpoint, *(f"someone/some-data{path}" for path in paths))
        ((_, (other,)),) = read_from(endpoint, "someone/other")
    assert (latest, first, test) == ([[{"text": "new"}], []], [ROWS, []], [[{"text": "t"}], []])
    ((what, fix),) = unknown[1]
    assert "Revision 'v2' doesn't exist for dataset 'someone/some-data' on the Hub" in what
    assert "hf download --repo-type dataset someone/some-data --revision v2 --local-dir data" in fix
    assert "Unknown split \"test\". Should be one of ['train']" in unsplit[1][0][0]
    assert "'someone/other' doesn't exist on the Hub or cannot be accessed" in other[0]
    kept, (rows, (failed,)) = read_from("", "someone/some-data@v1", "someone/some-data@v3")
    assert kept == first, "what was fetched is not asked for again"
    assert rows == [], "of another revision, which the cache of datasets holds"
    assert "as a hub dataset it cannot be fetched" in failed[0]


@pytest.mark.parametrize(
    "path",
    ["data", "data/rows", "rows/data.jsonl", "a/b/c", "../data", "a/b:c:d:e", "~/data", "a/", "a/b@", "a/b@v1.jsonl"],
)
def test_what_is_no_hub_dataset(path: str) -> None:
    Path("data").mkdir()
    assert not is_hub_dataset(path)


def test_a_plan_counts_the_steps_and_tokens_of_a_hub_model_whose_tokenizer_and_data_are_at_hand(tmp_path: Path) -> None:
    snapshots = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-8B"
    write_checkpoint(snapshots / "snapshots" / "0", "qwen3")
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("0")
    recipe = write_recipe(
        tmp_path, "Qwen/Qwen3-8B", tuning={"kind": "lora"}, optimizer={"epochs": 1, "max_steps": None}
    )
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "hf"), "QWENTUNE_CACHE": str(tmp_path / "cache")}

    def said(*command: str) -> dict[str, Any]:
        ended = subprocess.run(
            [sys.executable, "-m", *command, "--json"], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    planned = ("qwentune.plan", str(recipe), "--gpu", "h200")
    unknown = said(*planned)
    assert unknown["optimizer_steps"] is unknown["expansion_factor"] is None
    report = said("qwentune.preview", str(recipe))
    plan = said(*planned)
    steps = plan["optimizer_steps"]
    assert steps > 0
    assert plan["expansion_factor"] == report["expansion_factor"] > 1
    assert said(*planned, "optimizer.epochs=2")["optimizer_steps"] == 2 * steps
