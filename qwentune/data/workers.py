"""Processes that share work: one function over many items on all cores, its results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar, cast

from qwentune.errors import DoesNotFitError, Problem, UsageError

VARIABLE = "QWENTUNE_WORKERS"
MOST_WORKERS = 16  # more than one process can read for
FEW = 4  # items, which are done sooner than processes are started
AHEAD = 3  # items for each worker between the one that is wanted next and the last that was begun
PATIENCE_SECONDS = 5.0  # for a worker that has nothing left to do
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Item = TypeVar("Item")
Result = TypeVar("Result")
_Answer: TypeAlias = tuple[Any, Exception | None]  # the result, or what the function raised instead


def num_workers() -> int:
    """How many processes share the work: as many as this one has cores, or as `QWENTUNE_WORKERS` says.

    Raises UsageError where that is no number from 1 on.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if given.isdecimal() and int(given):
            return int(given)
        raise UsageError(Problem(VARIABLE, f"{given!r} is no number of processes", "Give 1 or more, or unset it."))
    if not sys.platform.startswith("linux"):
        return 1  # a fork is not safe elsewhere, and a process that starts from nothing reads the tokenizer again
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: tuple[int, Any] | None = None  # the item that it works on, and its number

    @property
    def is_busy(self) -> bool:
        return self.task is not None

    def begin(self, number: int, item: Any) -> None:
        try:
            self.connection.send(item)
        except OSError:
            raise self._death(item) from None
        self.task = number, item

    def answer(self) -> tuple[int, _Answer]:
        assert self.task is not None
        (number, item), self.task = self.task, None
        try:
            return number, self.connection.recv()
        except (EOFError, OSError):
            raise self._death(item) from None

    def _death(self, item: object) -> Exception:
        """What to say of it when it has ended while it worked on an item."""
        self.process.join(PATIENCE_SECONDS)
        if self.process.exitcode != -signal.SIGKILL:
            return RuntimeError(f"a process that worked on {item} ended with {self.process.exitcode}")
        what = "the process that rendered these rows was killed, as the kernel does where memory runs out"
        fix = f"Free memory, or use less: {VARIABLE}=1 renders in one process."
        return DoesNotFitError(Problem(str(item), what, fix))


class Workers(Generic[Item, Result]):
    """Applies a function to items, in this process where they are few.

    Workers are forks: they have the function, with whatever it has learnt from the first item, and share its memory.
    Items and results are pickled.
    """

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self.function = function
        self._count = num_workers()
        self._num_seen = 0  # while there are no workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # at which it ends
            if kind is not None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(PATIENCE_SECONDS)
            worker.process.kill()
            worker.process.join()

    def results(self, items: Iterable[Item]) -> Iterator[Result]:
        """The result for each item, in order; items are taken a bounded number ahead of the results.

        Raises what the function raises for an item when it is that item's turn, DoesNotFitError where a worker was
        killed.
        """
        items, first = iter(items), list[Item]()
        if self._count > 1 and not self._workers:
            first = list(islice(items, FEW - self._num_seen))
            self._num_seen += len(first)
            if first and self._num_seen == FEW:
                yield self.function(first.pop(0))
                self._start()
        rest = chain(first, items)
        yield from self._spread(rest) if self._workers else (self.function(item) for item in rest)

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("fork")
        with _ready_to_fork(), suppress(OSError):  # where no more processes may be begun, fewer share the work
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                inherited = [ours, *(worker.connection for worker in self._workers)]
                process = context.Process(target=_work, args=(self.function, theirs, inherited), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))

    def _spread(self, items: Iterator[Item]) -> Iterator[Result]:
        while any(worker.is_busy for worker in self._workers):  # with items whose results nobody waited for
            self._receive(None)
        results: dict[int, _Answer] = {}
        num_begun = num_given = 0
        ready = next(items, None)  # read while the workers work
        while ready is not None or num_given < num_begun:
            for worker in self._workers:
                if not worker.is_busy and ready is not None and num_begun < num_given + AHEAD * len(self._workers):
                    worker.begin(num_begun, ready)
                    num_begun += 1
                    ready = next(items, None)
            results.update(self._receive(0 if num_given in results else None))
            if num_given in results:
                result, error = results.pop(num_given)
                num_given += 1
                if error is not None:
                    raise error
                yield result

    def _receive(self, timeout: float | None) -> list[tuple[int, _Answer]]:
        """The answers that are there; with no timeout, waits for one."""
        busy = {worker.connection: worker for worker in self._workers if worker.is_busy}
        return [busy[cast(Connection, connection)].answer() for connection in wait(list(busy), timeout)]


@contextmanager
def _ready_to_fork() -> Generator[None]:
    """Threads of tokenizers stay behind, signals wait until a worker has its own answer to them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            # Of forks beside threads, whose locks a worker would wait for: it takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _work(function: Callable[[Any], Any], connection: Connection, inherited: Sequence[Connection]) -> None:
    """Answers each item with its result or its error until nothing more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that began the work ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for other in inherited:  # else no worker would see that the process that began the work is gone
        other.close()
    with suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            try:
                answer = function(item), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = None, error
            connection.send(answer)
