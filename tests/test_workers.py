"""Rows are rendered by all cores: the same comes of them whatever the number, and nothing hangs when one dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwentune.data import blocks, workers
from qwentune.data.blocks import MOST_ROWS, Block, read_blocks
from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.layout.store import DTYPES
from qwentune.data.reading.files import RowCount, content_of
from qwentune.data.rendering import render
from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.grammar import Grammar
from qwentune.data.rendering.turn import Turn
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.data.workers import FEW, Workers
from qwentune.errors import DataError, DoesNotFitError, UsageError
from qwentune.recipe import DataOptions, DataSource

COUNTS = (1, 2, 3)
SOURCES = {"train": [{"path": "chats.jsonl"}, {"path": "texts.jsonl"}], "eval": [{"path": "held.jsonl"}]}


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four rows, and workers from the second block on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks, "MOST_ROWS", 4)
    monkeypatch.setattr(workers, "FEW", 1)


def chat(k: int) -> dict[str, Any]:
    """A dialogue that Qwen3 rewrites; some have tools' results, bars, or too many tokens."""
    messages: list[dict[str, Any]] = []
    for turn in range(1 + k % 4):
        answer = {"role": "assistant", "content": f"answer {k} {turn} |" + " long" * (400 * (k == 9))}
        answer |= {"reasoning_content": f"because {k}"} if turn % 2 else {}
        messages += [{"role": "user", "content": f"question {k % 20} <|im_end|>" + "é" * (k % 3)}, answer]
    return {"messages": messages}


def write_rows(path: str, rows: list[Any]) -> None:
    Path(path).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def write_sources(*, wrong: bool) -> None:
    chats: list[Any] = [chat(k) for k in range(30)]
    if wrong:
        chats[6], chats[13] = '{"messages": [\n', {"messages": [{"role": "nobody", "content": "?"}]}
        chats[22] = {"messages": [{"role": "user", "content": 5}]}
    write_rows("chats.jsonl", chats)
    write_rows("texts.jsonl", [{"text": f"text {k % 15}"} for k in range(18)])
    write_rows("held.jsonl", [chat(k) for k in range(3, 9)])


def rendered(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch, cache: str = "", **options: Any) -> Dataset:
    monkeypatch.setenv("QWENTUNE_WORKERS", str(count))
    monkeypatch.setenv("QWENTUNE_CACHE", str(Path.cwd() / f"cache{count}{cache}"))
    data = DataOptions.model_validate({"max_tokens": 512, "max_dropped_fraction": 0.5, **SOURCES, **options})
    tokenizer = load_tokenizer(folder)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 0)


def all_of(dataset: Dataset) -> tuple[Any, ...]:
    arrays = tuple(getattr(dataset.examples, name).tobytes() for name in DTYPES)
    rest = (dataset.examples.file_names, dataset.control_ids_used, dataset.content, dataset.fingerprint)
    return (*arrays, *rest, dataset.report, dataset.dropped)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of all workers that are started."""
    found: list[int] = []
    start = Workers._start

    def noting(self: Workers[Any, Any]) -> None:
        start(self)
        found.extend(worker.process.pid or 0 for worker in self._workers)

    monkeypatch.setattr(Workers, "_start", noting)
    return found


@pytest.mark.parametrize("wrong", [False, True])
def test_store_and_report_are_the_same_for_any_number_of_workers(
    wrong: bool, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    write_sources(wrong=wrong)
    datasets = [all_of(rendered(qwen3_folder, count, monkeypatch, bad_rows="skip")) for count in COUNTS]
    assert len(set(started)) == 2 + 3
    assert datasets[1:] == datasets[:-1]
    report = datasets[0][-2]
    assert report["rows"]["read"] == 54
    assert report["rows"]["refused"] == 3 * wrong
    assert report["dropped"]["too long"] == 2
    assert report["duplicates"] > 0 < report["eval_overlap"]
    assert report["forged_control_tokens"] > 0


def test_wrong_rows_are_named_in_their_order_by_any_number_of_workers(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(wrong=True)
    told: list[Any] = []
    for count in COUNTS:
        with pytest.raises(DataError) as refused:
            rendered(qwen3_folder, count, monkeypatch)
        told.append(refused.value.problems)
    assert told[0] == told[1] == told[2]
    assert [problem.where.split(":")[1] for problem in told[0]] == ["7", "14", "23"]


def test_few_rows_start_no_process(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, started: list[int]) -> None:
    monkeypatch.setattr(workers, "FEW", 100)
    write_sources(wrong=False)
    rendered(qwen3_folder, 2, monkeypatch)
    assert not started


@pytest.mark.parametrize("row_bytes", [200, 3_000, 20_000, 100_000, 300_000])
def test_rows_of_any_length_are_shared_by_their_bytes_of_which_few_are_in_flight(
    row_bytes: int, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    monkeypatch.setattr(blocks, "MOST_ROWS", MOST_ROWS)
    monkeypatch.setattr(workers, "FEW", FEW)
    texts = [f"{k} ".ljust(row_bytes, "x") for k in range(6_000_000 // row_bytes)]
    write_rows("long.jsonl", [{"text": text} for text in texts])
    in_flight: list[int] = []  # bytes of the rows that were read and not given back, after each block

    def read() -> Iterator[Block]:
        for block in read_blocks(DataSource(path="long.jsonl"), 0, content_of("long.jsonl"), RowCount()):
            num_read.append(sum(len(value) for _, value in block.rows))
            in_flight.append(sum(num_read) - len(given) * row_bytes)
            yield block

    num_read, given = list[int](), list[str]()
    with Workers[Block, list[str]](lambda block: [pickle.loads(value)["text"] for _, value in block.rows]) as several:
        several._count = 2
        for some in several.results(read()):
            given += some
    assert given == texts
    assert len(started) == 2
    assert max(in_flight) < 3_000_000


@pytest.mark.parametrize("count", COUNTS)
def test_a_source_that_is_not_read_off_as_the_rule_has_it_is_rendered_by_the_rule(
    count: int, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(wrong=False)
    write_rows("chats.jsonl", [chat(k) for k in range(6)])
    honest = rendered(qwen3_folder, 1, monkeypatch, "honest")
    learn = render.learn

    class Erring:
        """Leaves the end out of what is trained of the sixth row and those after it of one file."""

        def __init__(self, grammar: Grammar) -> None:
            self.grammar = grammar

        def turns(self, dialogue: Dialogue) -> list[Turn] | None:
            turns, source = self.grammar.turns(dialogue), dialogue.conversation.source
            if turns is None or source.file != "held.jsonl" or source.line < 6:
                return turns
            return [replace(turn, target=turn.target[:-1]) for turn in turns]

    def err(*arguments: Any) -> Any:
        grammar = learn(*arguments)
        return grammar and Erring(grammar)

    monkeypatch.setattr(render, "learn", err)
    dataset = rendered(qwen3_folder, count, monkeypatch)
    assert dataset.content == honest.content
    assert dataset.examples.versions.tolist() == honest.examples.versions.tolist()
    assert dataset.report["rows"] == honest.report["rows"]
    (said,) = set(dataset.report["warnings"]) - set(honest.report["warnings"])
    assert "held.jsonl are rendered turn by turn" in said
    assert "held.jsonl:6" in said


# --- workers


def results(function: Callable[[int], Any], items: range = range(20), count: int = 2) -> Iterator[Any]:
    with Workers[int, Any](function) as several:
        several._count = count
        yield from several.results(iter(items))


def in_a_worker(function: Callable[[int], Any]) -> Callable[[int], Any]:
    here = os.getpid()
    return lambda item: item if os.getpid() == here else function(item)


def test_results_come_in_the_order_of_the_items_which_are_read_a_little_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1, 201):
            read.append(item)
            yield item

    def slow(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 7 == 0))
        return item, os.getpid()

    with Workers[int, tuple[int, int]](slow) as several:
        several._count = 3
        pids: set[int] = set()
        for number, (item, pid) in enumerate(several.results(items()), start=1):
            assert item == number
            assert len(read) <= number + 3 * workers.AHEAD + 1
            pids.add(pid)
        assert len(pids) > 1
        assert [item for item, _ in several.results(iter(range(50)))] == list(range(50))  # of the next source


def test_what_is_raised_for_an_item_is_raised_at_its_turn_and_work_can_go_on() -> None:
    def odd(item: int) -> int:
        if item == 11:
            raise ValueError(f"no {item}")
        return item

    with Workers[int, int](odd) as several:
        several._count = 3
        seen: list[int] = []
        with pytest.raises(ValueError, match="no 11") as raised:
            seen.extend(several.results(iter(range(30))))
        assert "in odd" in "".join(raised.value.__notes__)  # where in the worker
        assert list(several.results(iter(range(10)))) == list(range(10))


@pytest.mark.fault("A07", "of a process that rendered rows: those rows are named; exit 4, and no other lives on")
@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), DoesNotFitError, "was killed.*QWENTUNE_WORKERS=1"),
        (lambda: os._exit(3), RuntimeError, "worked on 5 ended with 3"),
    ],
)
def test_a_worker_that_dies_ends_the_work_with_its_name(
    end: Callable[[], None], error: type[Exception], words: str, started: list[int]
) -> None:
    def die_at(item: int) -> int:
        if item == 5:
            end()
        return item

    with pytest.raises(error, match=f"(?s){words}"):
        list(results(in_a_worker(die_at)))
    assert not [pid for pid in started if psutil.pid_exists(pid)]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C counts, also where the tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all_at_once_and_is_left_to_the_first_process(started: list[int]) -> None:
    def interrupted(item: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it to all
        return item

    assert list(results(in_a_worker(interrupted))) == list(range(20))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(results(in_a_worker(lambda item: time.sleep(60))))
    assert time.monotonic() - begun < 50
    assert not [pid for pid in started if psutil.pid_exists(pid)]


@pytest.mark.fault("A07", "the processes that rendered rows for it end too")
def test_workers_do_not_outlive_the_process_that_began_the_work() -> None:
    script = """if True:
        import os, signal
        from qwentune.data import workers
        workers.FEW = 1
        with workers.Workers(lambda item: os.getpid()) as several:
            several._count = 2
            print(*{pid for pid in several.results(iter(range(50)))} - {os.getpid()}, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False)
    pids = list(map(int, run.stdout.split()))
    assert run.returncode == -signal.SIGKILL
    assert pids
    until = time.monotonic() + 120
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("allowed", [0, 1])
def test_where_processes_may_not_be_begun_fewer_share_the_work(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, begun = os.fork, list[int]()

    def refusing() -> int:
        if len(begun) == allowed:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begun.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", refusing)
    assert list(results(lambda item: -item, count=3)) == [-item for item in range(20)]
    assert len(begun) == allowed


@pytest.mark.parametrize("given", ["0", "two", "-1"])
def test_a_number_of_workers_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_WORKERS", given)
    with pytest.raises(UsageError, match=r"QWENTUNE_WORKERS.*no number of processes"):
        workers.num_workers()
