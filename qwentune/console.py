"""How commands meet the terminal: data on stdout, messages on stderr, errors without tracebacks, exit codes.

What is said, logged and shown passes here, and leaves its secrets.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

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

_unlogged: list[str] = []  # said before there was a log
_log: Path | None = None


def say(message: str, *, by_any_rank: bool = False) -> None:
    """Writes a message to stderr, without secrets, and to the log; as a rule only rank 0 of a run speaks."""
    if by_any_rank or os.environ.get("RANK", "0") == "0":
        message = shown(message)
        with suppress(OSError, ValueError):  # the terminal may be gone; that is no reason to end a run
            print(message, file=sys.stderr, flush=True)
        log(message)


def show(text: str) -> None:
    """Prints data on stdout."""
    print(redact(text), flush=True)


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
