"""The networks of a finished run that answer: the tuned one and, beside it, its base."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from qwentune.answering.answer import Answer
from qwentune.answering.speaker import Prompt, Speaker
from qwentune.console import busy, say
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.sample import Json, Message, RowError
from qwentune.errors import Problem, UsageError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.merge import load_tuned
from qwentune.exporting.package import main_mode
from qwentune.exporting.processors import is_whole
from qwentune.exporting.room import Memory, Room, room
from qwentune.facts.documents import MEND
from qwentune.facts.generation_config import GENERATION_CONFIG, end_token_ids, read_generation_config
from qwentune.facts.media import FAMILIES
from qwentune.facts.present import free_host_bytes, present_gpus
from qwentune.model.loading import read_config, silence_loading, weights_folder
from qwentune.model.senses import take_media

Whose: TypeAlias = Literal["tuned", "base"]


def networks(run: FinishedRun, *, with_base: bool = False, judged: Room | None = None) -> Iterator[tuple[Whose, Any]]:
    """The tuned network of a run and, where it is asked for, its base after it.

    Never two in memory: the base of adapters is the same network without them; after full tuning the one that was given
    is let go first, so who iterates must keep none. Raises DoesNotFitError where one has no room and is not `judged`.
    """
    silence_loading()
    base = weights_folder(run.model, run.revision) if run.has_adapter or with_base else None
    first = base if base is not None and run.has_adapter else run.trained
    network = _loaded(run, first, judged or _judged(run, [first]))
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
    yield "base", _loaded(run, base, _judged(run, [base]))


def _judged(run: FinishedRun, folders: Sequence[Path]) -> Room:
    """How networks are loaded here: on the first card, else on the host; says what is not as usual."""
    memory = Memory("this machine's memory", free_host_bytes(), is_gpu=False)
    if torch.cuda.is_available():
        cards = present_gpus()
        free = torch.cuda.mem_get_info()[0] if cards is None else cards.cards[0].total_bytes
        memory = Memory("the GPU's memory", free, is_gpu=True)
    found = room(run, folders, memory)
    if found.remark:
        say(f"warning: {found.remark}")
    return found


def _loaded(run: FinishedRun, folder: Path, judged: Room) -> Any:
    """The network of a folder, with the run's adapter where it has one."""
    adapter = run.trained if run.has_adapter else None
    dtype = torch.float32 if judged.form == "fp32" else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = load_tuned(folder, adapter, dtype, device=device, four_bit=judged.form == "4 bits")
    whole = network if adapter is None else network.get_base_model()
    if whole.config.model_type in FAMILIES:
        take_media(whole)
    return network


def speaker(run: FinishedRun, network: Any) -> Speaker:
    """What answers with a network of the run, tuned or not; UsageError where nothing says how an answer ends."""
    generation = read_generation_config(run.trained)
    if not end_token_ids(generation):
        path = run.trained / GENERATION_CONFIG
        raise UsageError(Problem(f"{path}: eos_token_id", "names no token at which an answer ends", MEND))
    return Speaker(network, run.tokenizer, generation)


class Partner:
    """The tuned model in a dialogue, with the prompt it was trained after, and its base if asked.

    `once`: for one message, so that what full tuning made of a base can go before the base is loaded. Raises
    DoesNotFitError where there is no room for what must be in memory at once.
    """

    def __init__(self, run: FinishedRun, thinking: str | None, *, with_base: bool = False, once: bool = False) -> None:
        if run.template is None:
            raise UsageError(Problem(str(run.folder), "was trained without a chat template, so there is no chat"))
        self.run, self.with_base = run, with_base
        self.mode: Any = main_mode(run.report)
        if thinking is not None and run.template.has_thinking_switch:
            self.mode = "thinking" if thinking == "on" else "non_thinking"
        elif thinking is not None:
            say(f"warning: --thinking {thinking} changes nothing: the chat template has no such switch")
        silence_loading()
        base = weights_folder(run.model, run.revision) if run.has_adapter or with_base else run.trained
        first = base if run.has_adapter else run.trained
        config = read_config(first, has_media=not run.has_adapter or is_whole(run.trained))
        self.renderer = run.renderer(first, config.model_type)
        apart = with_base and not run.has_adapter
        self._judged = _judged(run, [run.trained, base] if apart and not once else [first])
        self.context = self._judged.tokens  # of a prompt and its answer together
        self._networks: dict[Whose, Any] = {}
        if not (apart and once):
            ((_, self._networks["tuned"]),) = networks(run, judged=self._judged)
        if apart and not once:
            self._networks["base"] = _loaded(run, base, self._judged)

    def speakers(self) -> Iterator[tuple[Whose, Speaker]]:
        """The tuned model and, where it was asked for, its base after it; who iterates keeps none."""
        if not self._networks:
            for whose, network in networks(self.run, with_base=self.with_base, judged=self._judged):
                found = speaker(self.run, network)
                del network
                yield whose, found
                del found
            return
        yield "tuned", speaker(self.run, self._networks["tuned"])
        if self.with_base and self.run.has_adapter:
            with self._networks["tuned"].disable_adapter():
                yield "base", speaker(self.run, self._networks["tuned"])
        elif self.with_base:
            yield "base", speaker(self.run, self._networks["base"])

    def prompt(
        self, messages: Sequence[Message], most_tokens: int | None, tools: Sequence[dict[str, Json]] = ()
    ) -> Prompt:
        """What the answer to a dialogue goes on from; None: the answer may have what is left of the context."""
        try:
            ids, seen = self.renderer.prompt(messages, self.mode, tools)
        except RowError as error:
            raise UsageError(Problem("the dialogue", error.what, _without_rows(error.fix))) from None
        left = self.context - len(ids)
        if left < 1:
            what = f"has {len(ids):,} tokens, and there is room for {self.context:,}"
            raise UsageError(
                Problem("the dialogue", what, "Make it shorter, or begin a new one."), "The chat has ended."
            )
        media = None
        if seen:
            assert self.renderer.limits is not None  # else the prompt was refused
            media = RunMedia.of(seen, self.renderer.limits, self.run.tokenizer.control_ids)
        return Prompt(ids, left if most_tokens is None else min(most_tokens, left), media)

    @busy("answering")
    def answer(self, messages: Sequence[Message], most_tokens: int) -> Answer:
        """The tuned model's greedy answer to a dialogue."""
        _, found = next(self.speakers())
        return found.answer(self.prompt(messages, most_tokens))


def _without_rows(fix: str) -> str:
    """The mend of a medium's fault, where it was given on the command line and not in a row."""
    for said in (", or leave the row out", ", or leave such rows out with data.bad_rows=skip"):
        fix = fix.replace(said, "")
    return fix.replace("Leave the row out", "Give another file")
