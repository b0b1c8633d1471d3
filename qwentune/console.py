"""How commands meet the terminal: data on stdout, messages on stderr, errors without tracebacks, exit codes.

What is said, logged and shown passes here, and leaves its secrets.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from qwentune.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    FULL,
    DoesNotFitError,
    Problem,
    UsageError,
    UserError,
    machine_error,
)
from qwentune.redaction import redact, redacted
from qwentune.streams import run_program

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
COLUMNS = 80  # of a page, where no terminal says how wide it is
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 2.0, 30.0  # of what takes its time, where there is no terminal
# Words that say how something stands are told apart by colour too, on a terminal that has any.
STYLES = {
    "bold red": r"^DOES NOT FIT\b",
    "bold green": r"^FITS\b(?! TIGHTLY)",
    "bold yellow": r"^FITS TIGHTLY\b|^\[!\]",
    "yellow": r"^warning:",
}
# Loggers of libraries whose warnings no user can act on; what they report as errors passes.
NOISY = (
    "DeepSpeed",  # that it found no GPU
    "bitsandbytes.backends.cpu.ops",
    "transformers.distributed.tensor_parallel",  # of layers that it would not split, though nobody asked it to
    "transformers.modeling_utils",  # of keys, which are proved by us
    "transformers.trainer_utils",  # of new periods, which count all the same
)

_unlogged: list[str] = []  # said before there was a log
_log: Path | None = None


def say(message: str, *, by_any_rank: bool = False) -> None:
    """Writes a message to stderr, without secrets, and to the log; as a rule only rank 0 of a run speaks."""
    if by_any_rank or os.environ.get("RANK", "0") == "0":
        message = shown(message)
        with suppress(OSError, ValueError):  # the terminal may be gone; that is no reason to end a run
            _print(message, sys.stderr)
        log(message)


def show(text: str) -> None:
    """Prints data on stdout."""
    _print(redact(text), sys.stdout)


def tell(piece: str, stream: Any, style: str = "") -> None:
    """Writes a piece of a line as it comes: on a terminal in a style and with control characters written out."""
    if not stream.isatty():
        print(piece, end="", file=stream, flush=True)
        return
    from rich.text import Text

    terminal(stream).print(Text(visible(piece), style=style), end="")


def say_next(*command: str) -> None:
    """Says on a terminal which command is the next sensible one."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        say(f"next: {shlex.join(command)}")


def width(stream: Any) -> int:
    """The columns of the terminal behind a stream; 80 where there is none."""
    return max(40, terminal(stream).width) if stream.isatty() else COLUMNS


def is_animated(stream: Any) -> bool:
    """Whether a line on this stream can be drawn over."""
    return stream.isatty() and not terminal(stream).is_dumb_terminal


def terminal(stream: Any) -> Console:
    """The stream as rich writes to it: in colour only where it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _print(text: str, stream: Any) -> None:
    if not stream.isatty():
        print(text, file=stream, flush=True)
        return
    from rich.text import Text

    styled = Text(text)
    for style, words in STYLES.items():
        styled.highlight_regex(f"(?m){words}", style)
    terminal(stream).print(styled)


class Busy:
    """What goes on at this moment, and how far it has come; told by `busy`."""

    now: Busy | None = None

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.done = 0

    def __str__(self) -> str:
        if self.total is not None:
            return f"{self.what} {self.done:,}/{self.total:,}"
        return f"{self.what} {self.done:,}" if self.done else self.what


@contextmanager
def busy(what: str, total: int | None = None) -> Generator[Busy]:
    """Shows on stderr that something goes on: a live line on a terminal, else a plain one after some seconds.

    Who is busy may count `done` up, to `total` where it is known. Inside another the words of this one are shown.
    """
    state, outer = Busy(what, total), Busy.now
    Busy.now = state
    if outer is not None or os.environ.get("RANK", "0") != "0":
        try:
            yield state
        finally:
            if Busy.now is state:  # else the outer one has ended by an error, and took this along
                Busy.now = outer
        return
    try:
        with _live_line() if is_animated(sys.stderr) else _plain_lines():
            yield state
    finally:
        Busy.now = None


def told(what: str, items: Iterable[T]) -> Generator[T]:
    """The items, while it is shown how many have come."""
    with busy(what) as state:
        for item in items:
            state.done += 1
            yield item


@contextmanager
def _live_line() -> Generator[None]:
    from rich.live import Live
    from rich.spinner import Spinner

    spinner = Spinner("dots")

    def drawn() -> Spinner:
        spinner.update(text=shown(f"{Busy.now} …"))
        return spinner

    with Live(
        get_renderable=drawn, console=terminal(sys.stderr), refresh_per_second=5, transient=True, redirect_stdout=False
    ):
        yield


@contextmanager
def _plain_lines() -> Generator[None]:
    ended = Event()
    thread = Thread(target=_tell, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell(ended: Event) -> None:
    seconds = FIRST_WORD_SECONDS
    while not ended.wait(seconds) and Busy.now is not None:
        say(f"{Busy.now} …")
        seconds = NEXT_WORD_SECONDS


def show_json(value: Any, indent: int | None = 2) -> None:
    """Prints a value as JSON, also where stdout has no more than ASCII."""
    encoding = (sys.stdout.encoding or "").lower()
    print(json.dumps(redacted(value), indent=indent, ensure_ascii=not encoding.startswith("utf")), flush=True)


def is_read() -> bool:
    """Whether what is printed still arrives somewhere."""
    buffer = sys.stdout.buffer
    return getattr(getattr(buffer, "raw", buffer), "error", None) is None


def log(message: str) -> None:
    """Adds a message to the log alone; it is kept until there is one."""
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in shown(message).splitlines()]
    if _log is None:
        _unlogged.extend(lines)
        return
    _write(_log, lines)


def log_to(path: Path) -> None:
    """Names the log: what was said so far and all that will be said is added to it."""
    global _log
    _log = path
    _write(path, _unlogged)
    _unlogged.clear()


def _write(path: Path, lines: list[str]) -> None:
    with suppress(OSError), path.open("a", encoding="utf-8") as file:  # what ails the disk is said on the screen
        file.writelines(lines)


def shown(text: str) -> str:
    """The text as it may be shown: without secrets, control and bidi characters written out."""
    return visible(redact(text))


def visible(text: str) -> str:
    """The text with control and bidi characters written out, so that data cannot steer a terminal; emoji stay whole."""
    if text.isprintable():
        return text
    return "".join(
        character if character in "\n\t\u200d" or character.isprintable() else f"\\u{ord(character):04x}"
        for character in text
    )


def run(command: Callable[[], int]) -> int:
    """The exit code of a command, its error said in words; only a bug of ours leaves a traceback, in a file."""
    try:
        return command()
    except UserError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped")
        return EXIT_INTERRUPTED
    except Exception as error:  # the one place where a bug becomes a message
        if os.environ.get("QWENTUNE_TRACEBACK"):
            raise
        if (known := machine_error(error)) is not None:
            _say_of_any_rank(str(known))
            return known.exit_code
        where = _kept(traceback.format_exc())
        _say_of_any_rank(
            f"A bug in qwentune: {type(error).__name__}: {error}\n    The traceback is in {where}; please report it."
        )
        return EXIT_BUG


def _say_of_any_rank(words: str) -> None:
    """Says what this rank may be the only one to know."""
    rank = os.environ.get("RANK", "0")
    say(words if rank == "0" else f"rank {rank}: {words}", by_any_rank=True)


def _kept(report: str) -> str:
    """Where a traceback was written; what keeps it from being written is no reason for another one."""
    try:
        handle, name = tempfile.mkstemp(prefix="qwentune-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(redact(report))
    except OSError as error:
        return f"no file ({error.strerror}; QWENTUNE_TRACEBACK=1 shows it)"
    return name


def main(command: Callable[..., None]) -> None:
    """Runs one command as a program of its own: `python -m qwentune.<verb>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    program(app)


def program(app: typer.Typer) -> NoReturn:
    """Runs the command line; data that did not reach stdout is an error, unless nobody wanted to read more of it."""
    if not sys.warnoptions:  # of libraries to programmers; who asks for them with -W or PYTHONWARNINGS gets them
        warnings.simplefilter("ignore")
    for name in NOISY:  # a filter, for its library may set the level anew
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    code, error = run_program(app)
    if error is not None and not isinstance(error, BrokenPipeError):
        kind = DoesNotFitError if error.errno in FULL else UsageError
        failure = kind(Problem("stdout", f"cannot be written: {error.strerror}"), "What was printed is not whole.")
        say(str(failure))
        code = code or failure.exit_code
    sys.exit(code)


def end(code: int) -> None:
    """Ends the process with `code`."""
    raise typer.Exit(code)
