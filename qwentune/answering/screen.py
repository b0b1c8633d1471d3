"""One answer on the screen while it is made: reasoning dimmed and apart from the answer, calls of tools as calls."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from qwentune import console
from qwentune.answering.call_syntax import WrittenCall, calls_in
from qwentune.answering.spoken import Part, Parts
from qwentune.data.sample import ToolCall


class Screen:
    """Shows the text of an answer piece by piece: reasoning on stderr, all else on stdout.

    Where stdout is no terminal, the answer is printed as the model has written it; where stderr is none, reasoning is
    said as a whole. Until something is shown it is said that the model is answering.
    """

    def __init__(self, *, opened: bool) -> None:
        self._as_calls = sys.stdout.isatty()
        self._parts = Parts(self._tell, opened=opened, apart=self._as_calls)
        self._last: Part | None = None
        self._reasoning: list[str] = []
        self._is_mid_line = False
        self._waiting = ExitStack()
        self._waiting.enter_context(console.busy("answering"))

    def add(self, text: str) -> None:
        """Shows what follows."""
        self._parts.add(text)

    def end(self) -> None:
        """Shows what is left, and ends the line."""
        self._parts.add("", last=True)
        self._waiting.close()
        self._end_reasoning()
        if self._is_mid_line or not self._as_calls:
            console.tell("\n", sys.stdout)

    def _tell(self, part: Part, text: str) -> None:
        self._waiting.close()
        if part == "reasoning":
            self._reasoning.append(text)
            if sys.stderr.isatty():
                console.tell(text, sys.stderr, "dim")
            self._last = part
            return
        self._end_reasoning()
        if part == "call":
            console.tell("\n" * self._is_mid_line, sys.stdout)
            (call,) = calls_in(text)
            console.tell(f"call {shown_call(call)}\n" if call.name else f"{text}\n", sys.stdout, "bold")
            self._is_mid_line = False
        elif not self._as_calls or self._last != "call" or text.strip():
            console.tell(text, sys.stdout)
            self._is_mid_line = not text.endswith("\n")
        self._last = part

    def _end_reasoning(self) -> None:
        if self._reasoning and sys.stderr.isatty():
            console.tell("\n\n", sys.stderr)
        elif self._reasoning:
            console.say(f"(thinking) {''.join(self._reasoning)}")
        self._reasoning.clear()


def shown_call(call: WrittenCall | ToolCall) -> str:
    """A call in a line: its name and arguments."""
    return f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"
