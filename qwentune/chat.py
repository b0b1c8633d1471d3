"""`qwentune chat RUN`: talk to the tuned model as it was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwentune import console
from qwentune.errors import EXIT_INTERRUPTED, EXIT_OK, DataError, Problem, UsageError

if TYPE_CHECKING:
    from qwentune.answering.answer import Answer
    from qwentune.answering.speaker import Prompt, Speaker
    from qwentune.data.sample import Json, MediaKind, Message, ToolCall
    from qwentune.exporting.speakers import Partner

MAX_NEW_TOKENS = 1024  # of one answer; in a chat an answer may have what is left of the context
LARGEST_TOOLS_BYTES = 2**24


@dataclass(frozen=True)
class Choices:
    """How a chat goes: what an answer is made after, how its tokens are chosen, what is shown."""

    thinking: str | None = None
    as_json: bool = False
    files: Mapping[MediaKind, Sequence[Path]] = field(default_factory=dict["MediaKind", "Sequence[Path]"])
    system: str | None = None
    tools: Path | None = None
    with_base: bool = False
    drawn: Literal["greedy", "sample"] | None = None  # None: one message greedily, a chat as the checkpoint says
    max_tokens: int | None = None


def chat(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    message: Annotated[str | None, typer.Option(help="Print one greedy answer to this and end; else you chat.")] = None,
    thinking: Annotated[
        str | None, typer.Option(help="Whether it reasons first: on or off; else as most turns were trained.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    system: Annotated[str | None, typer.Option(help="A system text; else the recipe's, where it has one.")] = None,
    tools: Annotated[Path | None, typer.Option(help="A JSON file with a list of tools that it may call.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer after the tuned one's.")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens as the checkpoint's generation_config.json says.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most tokens of an answer; else {MAX_NEW_TOKENS:,}, in a chat what the context has."),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture before the first message.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound before the first message.")] = None,
) -> None:
    """Talk to the tuned model, with its own template and stop tokens."""
    files: dict[MediaKind, list[Path]] = {"image": image or [], "audio": audio or []}

    def start() -> int:
        if greedy and sample:
            raise UsageError(Problem("--greedy", "stands beside --sample", "Give one of them."))
        drawn = "greedy" if greedy else "sample" if sample else None
        return run_chat(run, message, Choices(thinking, as_json, files, system, tools, base, drawn, max_tokens))

    console.end(console.run(start))


def run_chat(folder: Path, message: str | None, choices: Choices) -> int:
    """Answers one message, or a dialogue on stdin, whose first message shows the files; the exit code."""
    from qwentune.bounded import refuse_half_characters, refuse_name
    from qwentune.data.sample import Medium, Message

    for option, text in (("--message", message), ("--system", choices.system)):
        refuse_half_characters(option, text or "")
    if choices.thinking not in (None, "on", "off"):
        raise UsageError(Problem("--thinking", f"{choices.thinking!r} is neither on nor off"))
    refuse_name("--tools", choices.tools or ".")
    missing = [(kind, file) for kind, some in choices.files.items() for file in some if not file.exists()]
    if missing:
        fix = "A path counts from the folder in which the command is started."
        raise UsageError([Problem(f"--{kind}", f"{str(file)!r}: there is no such file", fix) for kind, file in missing])
    tools = _tools(choices.tools) if choices.tools is not None else ()
    media = tuple(Medium(kind, file, 0, f"--{kind}") for kind, some in choices.files.items() for file in some)
    with console.busy("loading"):
        from qwentune.exporting.finished import open_run
        from qwentune.exporting.speakers import Partner

        partner = Partner(open_run(folder), choices.thinking, with_base=choices.with_base, once=message is not None)
    history = [] if choices.system is None else [Message("system", choices.system)]
    if message is None:
        return _Talk(partner, choices, history, tools).run(media)
    question = Message("user", message, media=media)
    prompt = partner.prompt([*history, question], choices.max_tokens or MAX_NEW_TOKENS, tools)
    answers: dict[str, Answer] = {}
    for whose, speaker in partner.speakers():
        answers[whose], interrupted = _answer(speaker, prompt, choices, whose, usual="greedy")
        del speaker  # before the next one is loaded
        if interrupted:
            return EXIT_INTERRUPTED
    if choices.as_json:
        _print_json(answers)
    return EXIT_OK


def _print_json(answers: Mapping[str, Answer]) -> None:
    """Prints an object with the tuned model's answer, and the base's where there is one."""
    found = {whose: {"answer": a.answer, "stopped": a.stopped, "tokens": a.tokens} for whose, a in answers.items()}
    print(json.dumps({**found["tuned"], **({"base": found["base"]} if "base" in found else {})}), flush=True)


def _tools(file: Path) -> tuple[dict[str, Json], ...]:
    """The tools of a file, as a row has them."""
    from qwentune.bounded import UnreadableError, read_bytes
    from qwentune.data.formats.messages.calls import read_tools
    from qwentune.data.reading.row_reader import RowReader
    from qwentune.data.reading.strict_json import JsonFaultError, parse_json
    from qwentune.data.sample import Source

    try:
        value = parse_json(read_bytes(file, LARGEST_TOOLS_BYTES).decode())
    except (UnreadableError, JsonFaultError, UnicodeDecodeError) as error:
        raise UsageError(Problem(f"--tools: {file}", str(error), "It is a list of tools in JSON.")) from None
    if not isinstance(value, list):
        raise UsageError(Problem(f"--tools: {file}", "is no list", "It is a list of tools in JSON."))
    reader = RowReader(Source(str(file), 1))
    found, _ = read_tools({"tools": value}, reader)
    if reader.problems:
        raise DataError(reader.problems, "Nothing was started.")
    return tuple(found)


@dataclass
class _Talk:
    """A dialogue on stdin; what was said so far is what the template is given."""

    partner: Partner
    choices: Choices
    history: list[Message]
    tools: Sequence[dict[str, Json]]

    def run(self, media: Sequence[Any]) -> int:
        """Answers until an empty line, or the end of what is typed."""
        from qwentune.answering.screen import shown_call
        from qwentune.data.sample import Message

        console.say(f"Type a message; an empty line ends the chat.{self._ways()}")
        while console.is_read() and (line := _typed("> ")):
            before = len(self.history)
            self.history.append(Message("user", line, media=tuple(media)))
            calls = self._answered()
            if calls is None:
                del self.history[before:]
                continue
            media = ()
            while calls:
                for call in calls:
                    result = _typed(f"result of {shown_call(call)}: ", always=True)
                    if not result:
                        return EXIT_OK
                    self.history.append(Message("tool", result, extra={"name": call.name}))
                calls = self._answered() or ()
        return EXIT_OK

    def _ways(self) -> str:
        """How tokens are chosen, where it is by chance."""
        from qwentune.facts.generation_config import read_generation_config, samples, sampling

        generation = read_generation_config(self.partner.run.trained)
        if self.choices.drawn == "greedy" or not (self.choices.drawn or samples(generation)):
            return ""
        drawn = ", ".join(f"{name} {value:g}" for name, value in sampling(generation).items() if name in generation)
        return f" Answers are drawn ({drawn or 'temperature 1'}); --greedy takes the likeliest."

    def _answered(self) -> tuple[ToolCall, ...] | None:
        """Adds the tuned model's answer to what was said; the calls in it, None where there was no answer."""
        from qwentune.answering.call_syntax import CALL_OPENING
        from qwentune.data.sample import Message

        prompt = self.partner.prompt(self.history, self.choices.max_tokens, self.tools)
        answers: dict[str, Answer] = {}
        for whose, speaker in self.partner.speakers():
            answers[whose], interrupted = _answer(speaker, prompt, self.choices, whose, usual="sample")
            if interrupted:
                break
        if self.choices.as_json:
            _print_json(answers)
        tuned = answers["tuned"]
        calls = [call.taken for call in tuned.calls]
        taken = tuple(call for call in calls if call is not None)
        if not tuned.answer.strip():
            return None
        words = tuned.answer
        if taken and len(taken) == len(calls):  # what cannot be read stays in the words, as a server leaves it
            words = words.partition(CALL_OPENING)[0].strip()
        else:
            taken = ()
        self.history.append(Message("assistant", words, reasoning=tuned.reasoning or None, tool_calls=taken))
        return taken


def _answer(
    speaker: Speaker, prompt: Prompt, choices: Choices, whose: str, *, usual: Literal["greedy", "sample"]
) -> tuple[Answer, bool]:
    """One answer, shown while it is made, and whether Ctrl-C has ended it."""
    from qwentune.answering.screen import Screen
    from qwentune.answering.speaker import GREEDY, opens
    from qwentune.facts.generation_config import samples, sampling

    drawn = choices.drawn or ("sample" if usual == "sample" and samples(speaker.generation) else "greedy")
    choice = GREEDY if drawn == "greedy" else sampling(speaker.generation)
    if choices.as_json:
        with console.busy("answering"):
            return speaker.tell(prompt, lambda _: None, choice)
    if choices.with_base:
        console.show(f"{whose}:")
    screen = Screen(opened=opens(prompt.ids, speaker.tokenizer))
    answer, interrupted = speaker.tell(prompt, screen.add, choice)
    screen.end()
    if interrupted:
        console.say("(stopped)")
    elif not answer.stopped:
        console.say(f"(cut after {answer.tokens} tokens{'' if choices.max_tokens else '; --max-tokens allows more'})")
    return answer, interrupted


def _typed(asked: str, *, always: bool = False) -> str:
    """The next line that is typed, with the arrow keys where it is on a terminal; empty at the end of all."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if always:
            console.say(asked)
        return sys.stdin.readline().strip()
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - `input` takes it
    try:
        return input(console.visible(asked)).strip()
    except EOFError:
        print(flush=True)
        return ""


if __name__ == "__main__":
    console.main(chat)
