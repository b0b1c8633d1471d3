"""The networks of a finished run that answer: the tuned one and, beside it, its base."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qwentune.answering.answer import Answer
from qwentune.answering.speaker import Prompt, Speaker
from qwentune.console import busy
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.sample import Message, RowError
from qwentune.errors import Problem, UsageError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.merge import load_tuned
from qwentune.exporting.package import main_mode
from qwentune.facts.documents import MEND
from qwentune.facts.generation_config import GENERATION_CONFIG, end_token_ids, read_generation_config
from qwentune.facts.media import FAMILIES
from qwentune.model.loading import silence_loading, weights_folder
from qwentune.model.senses import take_media

Whose = Literal["tuned", "base"]


def networks(run: FinishedRun, *, with_base: bool = False) -> Iterator[tuple[Whose, Any]]:
    """The tuned network of a run and, where it is asked for, its base after it.

    Never two in memory: the base of adapters is the same network without them; after full tuning the one that was given
    is let go first, so who iterates must keep none.
    """
    silence_loading()
    base = weights_folder(run.model, run.revision) if run.has_adapter or with_base else None
    network = _loaded(base, run.trained) if base is not None and run.has_adapter else _loaded(run.trained, None)
    yield "tuned", network
    if base is None or not with_base:
        return
    if run.has_adapter:
        with network.disable_adapter():
            yield "base", network
        return
    del network
    gc.collect()
    torch.cuda.empty_cache()
    yield "base", _loaded(base, None)


def _loaded(folder: Path, adapter: Path | None) -> Any:
    on_gpu = torch.cuda.is_available()
    network: Any = load_tuned(folder, adapter, None if on_gpu else torch.float32)  # few CPUs reckon in 16 bits
    whole = network if adapter is None else network.get_base_model()
    if whole.config.model_type in FAMILIES:
        take_media(whole)
    return network.to("cuda") if on_gpu else network


def speaker(run: FinishedRun, network: Any) -> Speaker:
    """What answers with a network of the run, tuned or not; UsageError where nothing says how an answer ends."""
    generation = read_generation_config(run.trained)
    if not end_token_ids(generation):
        path = run.trained / GENERATION_CONFIG
        raise UsageError(Problem(f"{path}: eos_token_id", "names no token at which an answer ends", MEND))
    return Speaker(network, run.tokenizer, generation)


class Partner:
    """The tuned model in a dialogue, with the prompt it was trained after."""

    def __init__(self, run: FinishedRun, thinking: str | None) -> None:
        if run.template is None:
            raise UsageError(Problem(str(run.folder), "was trained without a chat template, so there is no chat"))
        self.run = run
        self.mode: Any = main_mode(run.report)
        if thinking is not None and run.template.has_thinking_switch:
            self.mode = "thinking" if thinking == "on" else "non_thinking"
        ((_, network),) = networks(run)
        base = weights_folder(run.model, run.revision) if run.has_adapter else run.trained
        self.renderer = run.renderer(base, network.config.model_type)
        self.speaker = speaker(run, network)

    @busy("answering")
    def answer(self, messages: Sequence[Message], most_tokens: int) -> Answer:
        """The greedy answer to a dialogue."""
        try:
            ids, seen = self.renderer.prompt(messages, self.mode)
        except RowError as error:
            raise UsageError(Problem("the dialogue", error.what, _without_rows(error.fix))) from None
        media = None
        if seen:
            assert self.renderer.limits is not None  # else the prompt was refused
            media = RunMedia.of(seen, self.renderer.limits, self.run.tokenizer.control_ids)
        return self.speaker.answer(Prompt(ids, most_tokens, media))


def _without_rows(fix: str) -> str:
    """The mend of a medium's fault, where it was given on the command line and not in a row."""
    for said in (", or leave the row out", ", or leave such rows out with data.bad_rows=skip"):
        fix = fix.replace(said, "")
    return fix.replace("Leave the row out", "Give another file")
