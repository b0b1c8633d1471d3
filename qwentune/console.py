"""How commands meet the terminal: data on stdout, messages on stderr, errors without tracebacks, exit codes."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import typer

from qwentune.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError


def say(message: str) -> None:
    """Writes a message to stderr; only the leading process of a run speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(message), file=sys.stderr, flush=True)


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
        handle, name = tempfile.mkstemp(prefix="qwentune-", suffix=".txt")
        os.close(handle)
        Path(name).write_text(traceback.format_exc(), encoding="utf-8")
        say(f"A bug in qwentune: {type(error).__name__}: {error}\n    The traceback is in {name}; please report it.")
        return EXIT_BUG


def main(command: Callable[..., None]) -> None:
    """Runs one command as a program of its own: `python -m qwentune.<verb>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def end(code: int) -> None:
    """Ends the process with `code`."""
    raise typer.Exit(code)
