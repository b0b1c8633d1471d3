"""`qwentune export RUN`: a folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.durable import mark, remove, replace_folder
from qwentune.errors import EXIT_OK, Problem, UsageError

if TYPE_CHECKING:
    from qwentune.exporting.finished import FinishedRun

GGUF_KINDS = ("f32", "f16", "bf16", "q8_0")


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into the base weights.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load what was written, and compare what it computes with the run.")
    ] = False,
    gguf: Annotated[
        str | None, typer.Option("--gguf", metavar="TYPE", help="Write a file for llama.cpp: f32, f16, bf16 or q8_0.")
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Of a model that also sees, write what reads text, as its own model."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The folder to write; else RUN/export, RUN/merged with --merge, RUN/gguf-TYPE."
        ),
    ] = None,
) -> None:
    """Package a finished run: weights, tokenizer, template, generation config, model card."""
    console.end(console.run(lambda: run_export(run, merge, verify, output, gguf, text_only=text_only)))


def run_export(
    folder: Path, merge: bool, verify: bool, output: Path | None, gguf: str | None = None, *, text_only: bool = False
) -> int:
    """Writes the package, whole or not at all; the exit code."""
    from qwentune.bounded import refuse_name
    from qwentune.exporting.finished import open_run
    from qwentune.exporting.folder import write_folder
    from qwentune.pages.run_page import RunPage
    from qwentune.training.run_folder import RunFolder

    refuse_name("-o", output or ".")
    if gguf is not None:
        _refuse_without_gguf(gguf)
    with console.busy("looking at the run"):
        run = open_run(folder)
    if text_only and run.has_adapter and not (merge or gguf):
        what = "adapters are for the whole model that their base is"
        raise UsageError(
            Problem("--text-only", what, "Add --merge: the base's own text part is then written with them.")
        )
    target = output or folder / (f"gguf-{gguf}" if gguf else "merged" if merge else "export")
    if os.path.lexists(target):
        raise UsageError(Problem(str(target), "exists already", "Remove it, or name another folder with -o."))
    staging = target.with_name(f".{target.name}.writing")
    remove(staging)
    mark(staging)
    try:
        if gguf is not None:
            _write_gguf(run, gguf, verify, staging)
        else:
            with console.busy("writing the package"):
                write_folder(run, staging, merges=merge, text_only=text_only)
            if verify:
                with console.busy("verifying"):
                    from qwentune.exporting.verify import verify as verified

                    for found in verified(run, staging):
                        console.say(found)
        replace_folder(staging, target)
    finally:
        remove(staging)
    console.say(f"exported to {target}")
    if gguf is not None:
        _tell_of_gguf(run, target)
    else:
        _tell_how_to_serve(run, target)
    RunPage(RunFolder(run.folder)).write()
    return EXIT_OK


def _refuse_without_gguf(kind: str) -> None:
    from importlib.util import find_spec

    if kind not in GGUF_KINDS:
        raise UsageError(Problem("--gguf", f"{kind!r} is none of {', '.join(GGUF_KINDS)}"))
    if find_spec("gguf") is None:
        raise UsageError(Problem("--gguf", "the package gguf is not installed", "pip install 'qwentune[gguf]'"))


def _write_gguf(run: FinishedRun, kind: str, verify: bool, target: Path) -> None:
    from qwentune.exporting.folder import copy_model_card
    from qwentune.exporting.gguf_file import verify_gguf
    from qwentune.exporting.gguf_run import write_run_gguf
    from qwentune.model.loading import silence_loading

    silence_loading()
    with console.busy("writing the GGUF file"):
        written = write_run_gguf(run, kind, target)
    if written.without_tower:
        console.say("the file holds what reads and writes text; the vision tower is left out")
    if verify:
        with console.busy("verifying"):
            error = verify_gguf(written.path, written.tensors)
        console.say(f"verified: {len(written.tensors)} tensors read again, largest error {error:.1e} of their largest")
    copy_model_card(run, target)


def _tell_of_gguf(run: FinishedRun, target: Path) -> None:
    """Says what is done with the file, here and in its model card."""
    from qwentune.exporting.gguf_run import gguf_commands
    from qwentune.exporting.package import serving_flags

    (path,) = target.glob("*.gguf")
    flags = serving_flags(run.report)
    found = gguf_commands(path, run.data.max_tokens, flags, run.folder.resolve().name)
    for purpose, command in found.items():
        console.say(f"{purpose}: {command}")
    console.say("Ollama has chat templates of its own: the model may see other prompts there than it was taught on")
    card = target / "README.md"
    if card.exists():
        fenced = "\n".join(f"To {purpose}:\n\n```sh\n{command}\n```\n" for purpose, command in found.items())
        card.write_text(f"{card.read_text(encoding='utf-8')}\n## llama.cpp\n\n{fenced}", encoding="utf-8")


def _tell_how_to_serve(run: FinishedRun, target: Path) -> None:
    """Says the command of each server that takes the folder, here and in its model card."""
    from qwentune.data.at_hand import first_question
    from qwentune.exporting.folder import media_options
    from qwentune.exporting.serving import artefact, commands, request

    options = media_options(run, target)
    served = artefact(run, target, {option.name: option.value for option in options})
    found = commands(served)
    if not found:
        again = shlex.join(["qwentune", "export", str(run.folder), "--merge"])
        console.say(f"warning: servers do not take it as it is: {served.unservable}; {again} makes one model of it")
        return
    lines = [f"{server}: {command}" for server, command in found.items()]
    console.say("serve it as it was trained:")
    for line in lines:
        console.say(f"  {line}")
    for option in options:
        console.say(f"  --{option.name} says {option.source}; other servers than vLLM have no such option")
    question = first_question(run.data) or "Hello"
    console.say(f"and ask it what it was taught: {request(served, next(iter(found)), question)}")
    card = target / "README.md"
    if card.exists():
        fenced = "\n".join(f"{server}:\n\n```sh\n{command}\n```\n" for server, command in found.items())
        card.write_text(f"{card.read_text(encoding='utf-8')}\n## Serving\n\n{fenced}", encoding="utf-8")


if __name__ == "__main__":
    console.main(export)
