"""`qwentune chat RUN`: talk to the tuned model as it was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, Problem, UsageError

if TYPE_CHECKING:
    from qwentune.answering.answer import Answer
    from qwentune.data.sample import MediaKind

MAX_NEW_TOKENS = 1024


def chat(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    message: Annotated[str | None, typer.Option(help="Print one greedy answer to this and end; else you chat.")] = None,
    thinking: Annotated[
        str | None, typer.Option(help="Whether it reasons first: on or off; else as most turns were trained.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    image: Annotated[list[Path] | None, typer.Option(help="A picture before the first message.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound before the first message.")] = None,
) -> None:
    """Talk to the tuned model, with its own template and stop tokens."""
    files: dict[MediaKind, list[Path]] = {"image": image or [], "audio": audio or []}
    console.end(console.run(lambda: run_chat(run, message, thinking, as_json, files)))


def run_chat(
    folder: Path,
    message: str | None,
    thinking: str | None,
    as_json: bool,
    files: Mapping[MediaKind, Sequence[Path]] = MappingProxyType({}),
) -> int:
    """Answers one message, or a dialogue on stdin, whose first message shows the files; the exit code."""
    from qwentune.data.sample import Medium, Message
    from qwentune.exporting.finished import open_run
    from qwentune.exporting.speakers import Partner

    if thinking not in (None, "on", "off"):
        raise UsageError(Problem("--thinking", f"{thinking!r} is neither on nor off"))
    missing = [(kind, file) for kind, some in files.items() for file in some if not file.exists()]
    if missing:
        fix = "A path counts from the folder in which the command is started."
        raise UsageError([Problem(f"--{kind}", f"{str(file)!r}: there is no such file", fix) for kind, file in missing])
    with console.busy("loading"):
        partner = Partner(open_run(folder), thinking)
    media = tuple(Medium(kind, file, 0, f"--{kind}") for kind, some in files.items() for file in some)
    if message is not None:
        answer = partner.answer([Message("user", message, media=media)], MAX_NEW_TOKENS)
        if as_json:
            print(json.dumps({"answer": answer.answer, "stopped": answer.stopped, "tokens": answer.tokens}), flush=True)
        else:
            _print(answer)
        return EXIT_OK
    history: list[Message] = []
    console.say("Type a message; an empty line ends the chat.")
    while console.is_read() and (line := sys.stdin.readline().strip()):
        history.append(Message("user", line, media=() if history else media))
        answer = partner.answer(history, MAX_NEW_TOKENS)
        _print(answer)
        history.append(Message("assistant", answer.answer, reasoning=answer.reasoning or None))
    return EXIT_OK


def _print(answer: Answer) -> None:
    if answer.reasoning:
        console.say(f"(thinking) {answer.reasoning}")
    print(answer.answer, flush=True)
    if not answer.stopped:
        console.say(f"(cut after {answer.tokens} tokens)")


if __name__ == "__main__":
    console.main(chat)
