"""`qwentune export RUN`: a folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.durable import mark, remove, replace_folder
from qwentune.errors import EXIT_OK, Problem, UsageError, UserError

if TYPE_CHECKING:
    from qwentune.exporting.finished import FinishedRun

VERIFIED_TEXTS = ("Hello", "1 + 1 =", "你好，世界", "def f(x):\n    return")
# Shares of the largest logit.
TOLERANCE_FP32 = 1e-4
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0")
TOLERANCE_16_BIT = 0.05  # a merged weight is rounded once more than an adapter beside it


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into the base weights.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load what was written, and compare what it computes with the run.")
    ] = False,
    gguf: Annotated[
        str | None, typer.Option("--gguf", metavar="TYPE", help="Write a file for llama.cpp: f32, f16, bf16 or q8_0.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", help="The folder to write; else RUN/export, RUN/merged with --merge, RUN/gguf-TYPE."),
    ] = None,
) -> None:
    """Package a finished run: weights, tokenizer, template, generation config, model card."""
    console.end(console.run(lambda: run_export(run, merge, verify, output, gguf)))


def run_export(folder: Path, merge: bool, verify: bool, output: Path | None, gguf: str | None = None) -> int:
    """Writes the package, whole or not at all; the exit code."""
    from qwentune.bounded import refuse_name
    from qwentune.exporting.exported import write_export
    from qwentune.exporting.finished import open_run

    refuse_name("-o", output or ".")
    if gguf is not None:
        _refuse_without_gguf(gguf)
    with console.busy("looking at the run"):
        run = open_run(folder)
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
                write_export(run, staging, merge=merge)
            if verify:
                with console.busy("verifying"):
                    _verify(run, staging)
        replace_folder(staging, target)
    finally:
        remove(staging)
    console.say(f"exported to {target}")
    if gguf is not None:
        _tell_of_gguf(run, target)
    else:
        _tell_how_to_serve(run, target)
    return EXIT_OK


def _refuse_without_gguf(kind: str) -> None:
    from importlib.util import find_spec

    if kind not in GGUF_KINDS:
        raise UsageError(Problem("--gguf", f"{kind!r} is none of {', '.join(GGUF_KINDS)}"))
    if find_spec("gguf") is None:
        raise UsageError(Problem("--gguf", "the package gguf is not installed", "pip install 'qwentune[gguf]'"))


def _write_gguf(run: FinishedRun, kind: str, verify: bool, target: Path) -> None:
    from qwentune.exporting.exported import copy_model_card
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
    from qwentune.exporting.exported import media_options
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


def _verify(run: FinishedRun, exported: Path) -> None:
    """Loads the exported weights beside the run's own, compares their logits, and says the largest difference.

    Raises UserError where it is more than rounding explains, or no number at all.
    """
    import torch

    from qwentune.exporting.media_prompts import media_prompts
    from qwentune.exporting.merge import largest_logit_difference, load_tuned
    from qwentune.model.loading import silence_loading, weights_folder

    silence_loading()
    base = weights_folder(run.model, run.revision) if run.has_adapter else run.trained
    reference = load_tuned(base, run.trained if run.has_adapter else None)
    is_adapter = (exported / "adapter_config.json").exists()
    candidate = load_tuned(base if is_adapter else exported, exported if is_adapter else None)
    texts = [{"input_ids": torch.tensor([ids])} for ids in run.tokenizer.encode(VERIFIED_TEXTS)]
    media = media_prompts(run, base, reference.config.model_type)
    difference, scale = largest_logit_difference(reference, candidate, [*texts, *media.values()])
    shown = ", ".join([f"{len(texts)} texts", *media])
    console.say(f"verified: largest difference of logits {difference:.1e} of {scale:.1f} on {shown}")
    allowed = TOLERANCE_FP32 if next(candidate.parameters()).dtype.itemsize == 4 else TOLERANCE_16_BIT
    if not difference <= allowed * scale:
        what = f"its logits differ from the run's by {difference:.1e}, more than {allowed * scale:.1e}"
        raise UserError(Problem(str(exported), what, "Nothing was exported; please report it."))


if __name__ == "__main__":
    console.main(export)
