"""What the ranks tell the supervisor above them, through the files of a folder: progress, position, exit code."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

FOLDER = "QWENTUNE_REPORTS"  # the environment variable that names the folder; only a supervisor sets it
ASK_FOR_STACK = signal.SIGUSR2


class Report:
    """The files of one rank; without a supervisor nothing is written."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        self.folder = None if folder is None else Path(folder)
        self.rank = os.environ.get("RANK", "0")
        self.num_marks = 0

    def listen(self) -> None:
        """From now on the supervisor can ask where this rank stands, even one that is stuck in code."""
        if self.folder is not None:
            stack = (self.folder / f"stack-{self.rank}").open("w")
            faulthandler.register(ASK_FOR_STACK, stack, all_threads=False)

    def pass_mark(self) -> None:
        """Counts a place in the step at which other ranks may come to wait for this one."""
        if self.folder is not None:
            self.num_marks += 1
            with suppress(OSError):  # a supervisor that has died has no use for it
                self._write_mark()

    def end(self, code: int) -> None:
        """Leaves the exit code: accelerate turns every one into 1, and tells of no rank which one it had."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"exit-{self.rank}-{code}").touch()  # in its name, for which a full disk has room

    def _write_mark(self) -> None:
        # In place and of one length: a disk that is full by now keeps the room that the first mark has taken.
        assert self.folder is not None
        file = os.open(self.folder / f"mark-{self.rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(file, b"%-20d" % self.num_marks)
        finally:
            os.close(file)


def exit_codes(folder: Path) -> dict[int, int]:
    """The exit codes of the ranks that could leave one."""
    names = [file.name.split("-") for file in folder.glob("exit-*-*")]
    return {int(rank): int(code) for _, rank, code in names}


def marks(folder: Path) -> dict[int, int]:
    """How many marks each rank that trains has passed."""
    values: dict[int, int] = {}
    for file in folder.glob("mark-*"):
        with suppress(OSError, ValueError):  # it is being written
            values[int(file.name.removeprefix("mark-"))] = int(file.read_text())
    return values


def position(folder: Path, rank: int) -> str:
    """Where a rank that was asked stands, as `file:line in function`; empty where it did not answer."""
    with suppress(OSError):
        frame = re.search(r'File "(.+)", line (\d+) in (\S+)', (folder / f"stack-{rank}").read_text())
        if frame is not None:
            return f"{frame[1]}:{frame[2]} in {frame[3]}"
    return ""
