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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil

from tests.runs import ENVIRONMENT

ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
CTRL_C, LINE_END = "\x03", "\n"


@dataclass(frozen=True)
class Screen:
    """What a command showed, without and with its escapes; its code; the longest silence.

    A silence is the seconds without anything new in which the command ran or slept. Those in which it was ready to run
    and other programs had the cores are none of its own, so that a silence is as long on a busy machine as on an idle
    one. The start of Python, before anything is shown, counts as none.
    """

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
    seconds: float = 900,
    environment: Mapping[str, str] | None = None,
) -> Screen:
    """Runs a command on a terminal, and types each of `typed` once the words before it are on the screen."""
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
    silence = longest = 0.0
    threads = threads_of(process.pid)
    while time.monotonic() - began < seconds:
        is_new = bool(select.select([ours], [], [], 0.1)[0])
        now, before, threads = time.monotonic(), threads, threads_of(process.pid)
        silence += own_seconds(before, threads, now - last)
        last = now
        if not is_new:
            continue
        try:
            new = os.read(ours, 1 << 16)
        except OSError:  # the last process has closed the terminal
            break
        longest, silence = max(longest, silence if shown else 0.0), 0.0
        shown += new
        if left and left[0][0] in ESCAPES.sub("", shown.decode(errors="replace")):
            os.write(ours, left.pop(0)[1].encode())
    else:
        process.kill()
    os.close(ours)
    raw = shown.decode(errors="replace")
    return Screen(process.wait(timeout=300), ESCAPES.sub("", raw).replace("\r\n", "\n"), raw, longest)


Threads: TypeAlias = dict[str, tuple[float, float]]


def threads_of(pid: int) -> Threads:
    """For how many seconds each thread of a process and of those below it ran, and waited for a core, by thread.

    Empty where the system does not tell.
    """
    found: Threads = {}
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                with suppress(OSError):  # the thread has ended
                    ran, waited, _ = file.read_text().split()
                    found[file.parent.name] = int(ran) / 1e9, int(waited) / 1e9
    return found


def own_seconds(before: Threads, after: Threads, elapsed: float) -> float:
    """The seconds of a short time in which a command ran or slept, instead of waiting for a core."""
    busiest = longest_wait = 0.0
    for thread, (ran, waited) in after.items():
        ran_before, waited_before = before.get(thread, (0.0, 0.0))
        busiest = max(busiest, ran - ran_before)
        longest_wait = max(longest_wait, waited - waited_before)
    return max(busiest, elapsed - longest_wait)
