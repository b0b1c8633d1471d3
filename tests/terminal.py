"""Commands on a pseudo-terminal: what a person sees, and for how long there is nothing to see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ENVIRONMENT

ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
CTRL_C, LINE_END = "\x03", "\n"


@dataclass(frozen=True)
class Screen:
    """What a command showed, without and with its escapes; its code; the longest time without anything new."""

    code: int
    text: str
    raw: str
    longest_silence: float

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the text, which has it."""
        found = re.search(pattern, self.text)
        assert found is not None, f"{pattern!r} is not in:\n{self.text}"
        return found[1]


def on_terminal(
    command: Sequence[str],
    folder: Path,
    *,
    typed: Sequence[tuple[str, str]] = (),
    columns: int = 100,
    seconds: float = 240,
    environment: Mapping[str, str] | None = None,
) -> Screen:
    """Runs a command on a terminal, and types each of `typed` once the words before it are on the screen.

    The start of Python, before anything is shown, counts as no silence.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**ENVIRONMENT, **os.environ, "TERM": "xterm-256color", **(environment or {})},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown, left = b"", [*typed]
    began = last = time.monotonic()
    longest = 0.0
    while time.monotonic() - began < seconds:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            new = os.read(ours, 1 << 16)
        except OSError:  # the last process has closed the terminal
            break
        now = time.monotonic()
        longest, last = max(longest, now - last if shown else 0.0), now
        shown += new
        if left and left[0][0] in ESCAPES.sub("", shown.decode(errors="replace")):
            os.write(ours, left.pop(0)[1].encode())
    else:
        process.kill()
    os.close(ours)
    raw = shown.decode(errors="replace")
    return Screen(process.wait(timeout=30), ESCAPES.sub("", raw).replace("\r\n", "\n"), raw, longest)
