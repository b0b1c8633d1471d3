"""`qwentune chat RUN`: talk to the tuned model as it was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, Problem, UsageError

if TYPE_CHECKING:
    from qwentune.data.media.seen import Seen
    from qwentune.data.sample import MediaKind, Message
    from qwentune.exporting.finished import FinishedRun

MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Answer:
    """One reply; `stopped` is false where the length limit ended it."""

    reasoning: str
    answer: str
    stopped: bool
    tokens: int


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

    if thinking not in (None, "on", "off"):
        raise UsageError(Problem("--thinking", f"{thinking!r} is neither on nor off"))
    missing = [(kind, file) for kind, some in files.items() for file in some if not file.exists()]
    if missing:
        fix = "A path counts from the folder in which the command is started."
        raise UsageError([Problem(f"--{kind}", f"{str(file)!r}: there is no such file", fix) for kind, file in missing])
    with console.busy("loading"):
        speaker = Speaker(open_run(folder), thinking)
    media = tuple(Medium(kind, file, 0, f"--{kind}") for kind, some in files.items() for file in some)
    if message is not None:
        answer = speaker.answer([Message("user", message, media=media)])
        if as_json:
            print(json.dumps({"answer": answer.answer, "stopped": answer.stopped, "tokens": answer.tokens}), flush=True)
        else:
            _print(answer)
        return EXIT_OK
    history: list[Message] = []
    console.say("Type a message; an empty line ends the chat.")
    while console.is_read() and (line := sys.stdin.readline().strip()):
        history.append(Message("user", line, media=() if history else media))
        answer = speaker.answer(history)
        _print(answer)
        history.append(Message("assistant", answer.answer, reasoning=answer.reasoning or None))
    return EXIT_OK


def _print(answer: Answer) -> None:
    if answer.reasoning:
        console.say(f"(thinking) {answer.reasoning}")
    print(answer.answer, flush=True)
    if not answer.stopped:
        console.say(f"(cut after {answer.tokens} tokens)")


def _without_rows(fix: str) -> str:
    """The mend of a medium's fault, where it was given on the command line and not in a row."""
    for said in (", or leave the row out", ", or leave such rows out with data.bad_rows=skip"):
        fix = fix.replace(said, "")
    return fix.replace("Leave the row out", "Give another file")


class Speaker:
    """The tuned model with the prompt it was trained after."""

    def __init__(self, run: FinishedRun, thinking: str | None) -> None:
        import torch

        from qwentune.exporting.merge import load_tuned
        from qwentune.exporting.package import main_mode
        from qwentune.facts.documents import MEND
        from qwentune.facts.generation_config import GENERATION_CONFIG, end_token_ids, read_generation_config
        from qwentune.model.loading import silence_loading, weights_folder

        if run.template is None:
            raise UsageError(Problem(str(run.folder), "was trained without a chat template, so there is no chat"))
        silence_loading()
        self.run = run
        self.mode: Any = main_mode(run.report)
        if thinking is not None and run.template.has_thinking_switch:
            self.mode = "thinking" if thinking == "on" else "non_thinking"
        base = weights_folder(run.model, run.revision) if run.has_adapter else run.trained
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_tuned(base, run.trained if run.has_adapter else None)
        self.model: Any = model.to(device)
        self.renderer = run.renderer(base, model.config.model_type)
        generation = read_generation_config(run.trained)
        self.stops = end_token_ids(generation)
        self.pad: int = generation.get("pad_token_id", run.tokenizer.end_of_text_id)
        if not self.stops:
            path = run.trained / GENERATION_CONFIG
            raise UsageError(Problem(f"{path}: eos_token_id", "names no token at which an answer ends", MEND))

    @console.busy("answering")
    def answer(self, messages: list[Message]) -> Answer:
        """The greedy answer to a dialogue."""
        import torch

        from qwentune.data.sample import RowError

        try:
            prompt, media = self.renderer.prompt(messages, self.mode)
        except RowError as error:
            raise UsageError(Problem("the dialogue", error.what, _without_rows(error.fix))) from None
        with torch.no_grad():
            generated = self.model.generate(
                **self._given(prompt, media),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=self.stops,
                pad_token_id=self.pad,
            )[0, len(prompt) :].tolist()
        stopped = bool(generated) and generated[-1] in self.stops
        prompted = self.run.tokenizer.decode(prompt[-8:])
        text = self.run.tokenizer.decode(generated[:-1] if stopped else generated)
        reasoning, answer = split_answer(text, opened=prompted.endswith("<think>\n"))
        return Answer(reasoning, answer, stopped, len(generated))

    def _given(self, prompt: list[int], media: Sequence[Seen]) -> dict[str, Any]:
        """A prompt on the model's device."""
        import torch

        from qwentune.data.layout.media_batch import as_prompt
        from qwentune.data.layout.media_table import RunMedia

        device, dtype = self.model.device, self.model.dtype
        if not media:
            ids = torch.tensor([prompt], device=device)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert self.renderer.limits is not None  # else the prompt was refused
        shown = as_prompt(prompt, RunMedia.of(media, self.renderer.limits, self.run.tokenizer.control_ids))
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in shown.items()
        }


def split_answer(text: str, *, opened: bool) -> tuple[str, str]:
    """Reasoning and answer of what a model wrote; `opened`: its prompt ended inside the block."""
    if not (opened or text.lstrip().startswith("<think>")) or "</think>" not in text:
        return "", text
    reasoning, answer = text.split("</think>", 1)
    return reasoning.replace("<think>", "", 1).strip("\n"), answer.lstrip("\n")


if __name__ == "__main__":
    console.main(chat)
