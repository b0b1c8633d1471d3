"""`qwentune serve RUN`: an OpenAI-compatible server of the tuned model, as it was trained."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.request import ProxyHandler, build_opener

import typer

from qwentune import console
from qwentune.errors import EXIT_INTERRUPTED, Problem, UsageError

if TYPE_CHECKING:
    from qwentune.exporting.finished import FinishedRun
    from qwentune.exporting.serving import Address, Artefact

PACKAGES = ("fastapi", "uvicorn", "openai")  # that `transformers serve` needs besides our own
POLL_SECONDS, PROBE_SECONDS = 0.2, 2.0
PATIENCE_SECONDS = 20.0  # for a server that was told to end


def serve(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    host: Annotated[
        str, typer.Option(help="Where it listens; 0.0.0.0: on every network of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 8000,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a dialogue, for which vLLM keeps room; else what the model allows."),
    ] = None,
) -> None:
    """Serve the tuned model by vLLM where it is installed, else by transformers, in the way it was trained."""
    console.end(console.run(lambda: run_serve(run, host, port, context)))


def run_serve(folder: Path, host: str, port: int, context: int | None = None) -> int:
    """Starts the server and waits for its end; its exit code."""
    from qwentune.exporting.serving import Address

    address = Address(host, port)
    _refuse_busy(address)
    with console.busy("looking at the run"):
        from qwentune.exporting.finished import open_run

        run = open_run(folder)
        server = _server(run)
    served = _artefact(run, server)
    if context is not None:
        served = replace(served, context=min(context, served.context or context))
    with tempfile.TemporaryDirectory(prefix="qwentune-") as place:
        if server == "transformers":  # which names a model by the path that it is given
            Path(place, served.name).symlink_to(served.folder.resolve())
            served = replace(served, folder=Path(served.name))
        return _serve(run, served, server, address, place if server == "transformers" else None)


def _refuse_busy(address: Address) -> None:
    """Raises UsageError where nothing can listen there."""
    try:
        family, kind, number, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (socket.gaierror, UnicodeError):  # of a name that is no name of a host
        raise UsageError(Problem("--host", f"{address.host!r} is no address of this machine")) from None
    except OSError as error:
        what = f"{address.port} cannot be used on {address.host}: {error.strerror}"
        raise UsageError(Problem("--port", what, "Name another with --port, or another address with --host.")) from None


def _server(run: FinishedRun) -> str:
    """Which server is used here; UsageError where none is installed that takes the run's model."""
    from importlib.util import find_spec

    import torch

    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
    from qwentune.facts.documents import read_object
    from qwentune.facts.media import FAMILIES

    if torch.cuda.is_available() and _program("vllm") is not None:
        return "vLLM"
    family = FAMILIES.get(read_object(checkpoint_folder(run.model, run.revision) / "config.json").get("model_type", ""))
    sees = family is not None and family.vision is not None
    missing = [name for name in (*PACKAGES, *["torchvision"] * sees) if find_spec(name) is None]
    if missing:
        what = f"`transformers serve` needs {', '.join(missing)}, not installed here"
        belongs = f" torchvision (for a model that sees; the one that belongs to torch {torch.__version__})"
        raise UsageError(Problem("serve", what, f"pip install 'qwentune[serve]'{belongs if sees else ''}"))
    return "transformers"


def _program(name: str) -> str | None:
    """A program that is installed with this Python, else one on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _artefact(run: FinishedRun, server: str) -> Artefact:
    """What the server is given: the adapter where it takes one, else a whole model."""
    from qwentune.exporting.cached import served_folder
    from qwentune.exporting.folder import media_options
    from qwentune.exporting.serving import artefact, commands

    def of(merge: bool) -> Artefact:
        folder = served_folder(run, merge=merge)
        options = media_options(run, folder) if server == "vLLM" else []
        return artefact(run, folder, {option.name: option.value for option in options})

    if run.has_adapter and server == "vLLM":
        found = of(merge=False)
        if server in commands(found):
            return found
        console.say(f"vLLM does not take the adapter as it is: {found.unservable or 'its rank is too high'}")
    return of(merge=True)


def _serve(run: FinishedRun, served: Artefact, server: str, address: Address, place: str | None) -> int:
    """Runs the server in the folder `place`, else in this one; says when and how it can be asked."""
    from qwentune.data.at_hand import first_question
    from qwentune.exporting.serving import commands, request
    from qwentune.training.signals import die_with_parent, take_over

    command = commands(served, address)[server]
    program, *arguments = shlex.split(command)
    console.say(f"starting {command}{f', in {place}' if place else ''}")
    received: list[int] = []
    previous = take_over(lambda number, _: received.append(number))
    # A session of its own: else Ctrl-C would reach it twice, from the terminal and from here.
    process = subprocess.Popen(
        [_program(program) or program, *arguments],
        cwd=place,
        env={"PYTHONUNBUFFERED": "1", **os.environ},
        stdout=sys.stderr.fileno(),
        start_new_session=True,
        # Asked to end, not killed, for only the server itself can then end what it has started.
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )
    try:
        with console.busy("starting the server"):
            while process.poll() is None and not received and not _answers(address):
                time.sleep(POLL_SECONDS)
        if process.poll() is None and not received:
            console.say(f"ready: {address.url}/v1, model {served.name!r}; Ctrl-C ends it")
            question = first_question(run.data) or "Hello"
            console.say(f"ask it what it was taught: {request(served, server, question, address)}")
        return _end(process, received)
    finally:
        _kill(process)
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _answers(address: Address) -> bool:
    """Whether the server says that it is well."""
    try:
        with build_opener(ProxyHandler({})).open(f"{address.url}/health", timeout=PROBE_SECONDS) as answer:
            return answer.status == 200
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes], received: list[int]) -> int:
    """The exit code of the server, 130 after Ctrl-C; it is given each signal that comes, and killed where it stays."""
    deadline, is_interrupted = None, False
    while True:
        try:
            code = process.wait(timeout=POLL_SECONDS)
            return EXIT_INTERRUPTED if is_interrupted else code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if received:
                is_interrupted |= received[0] == signal.SIGINT
                process.send_signal(received.pop(0))
                deadline = deadline or time.monotonic() + PATIENCE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it has started: vLLM's engines hold the card."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    console.main(serve)
