"""What the ranks tell the supervisor above them, through the files of a folder: progress, position, exit, crash."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import signal
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from qwentune.durable import mark, read_mark, remove
from qwentune.errors import Problem, UsageError

PREFIX = "qwentune-reports-"
FOLDER = "QWENTUNE_REPORTS"  # the environment variable that names the folder; only a supervisor sets it
ASK_FOR_STACK = signal.SIGUSR2
BATCHES = os.path.join("data", "layout", "batch.py")
OUR_FILES = f"{Path(__file__).parents[1]}{os.sep}"


@contextmanager
def folder_of_reports() -> Generator[Path]:
    """A folder for the reports of one run; those that killed supervisors of this user left behind go now.

    Each is held by a lock that the system frees with its supervisor, also where that one's process id is unknown here.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = old.name.removeprefix(PREFIX).partition("-")[0]
        with suppress(OSError):
            if pid.isdigit() and not psutil.pid_exists(int(pid)) and _is_own(old) and read_mark(old) is not None:
                with _held(old):
                    remove(old)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as name, ExitStack() as lock:
        with suppress(OSError):  # a file system without locks
            lock.enter_context(_held(Path(name)))
        mark(Path(name))
        yield Path(name)


@contextmanager
def _held(folder: Path) -> Generator[None]:
    """Holds a folder; raises OSError where another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_own(folder: Path) -> bool:
    return folder.lstat().st_uid == os.getuid() and not folder.is_symlink()


def refuse_another_users() -> None:
    """Raises UsageError where the folder of reports is not this user's: who owns it reads and steers."""
    folder = os.environ.get(FOLDER)
    if folder is not None and os.path.lexists(folder) and not _is_own(Path(folder)):
        what = f"the folder of reports {folder!r} belongs to another user"
        raise UsageError(Problem(FOLDER, what, f"Unset {FOLDER}; `qwentune train` sets it itself."))


class Report:
    """The files of one rank; without a supervisor, or in another user's folder, nothing is written."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        self.folder = Path(folder) if folder is not None and os.path.isdir(folder) and _is_own(Path(folder)) else None
        self.rank = os.environ.get("RANK", "0")
        self.num_marks = 0

    def keep_crash(self) -> None:
        """From now on a crash in a library, or of a file that is gone under a map, leaves its name and place."""
        if self.folder is None:
            return
        with suppress(OSError):  # it is a comfort, and no reason to end a run
            faulthandler.enable((self.folder / f"crash-{self.rank}").open("w"), all_threads=False)

    def listen(self) -> None:
        """From now on the supervisor can ask where this rank stands, even one that is stuck in code."""
        if self.folder is not None:
            stack = (self.folder / f"stack-{self.rank}").open("w")
            faulthandler.register(ASK_FOR_STACK, stack, all_threads=True)

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


def has_begun(folder: Path, rank: int) -> bool:
    """Whether a rank runs."""
    return (folder / f"crash-{rank}").exists()


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
    """Where a rank that was asked stands, as `file:line in function`; empty where it did not answer.

    Of one that waits for a batch, where the thread that makes it stands.
    """
    current, others = list[str](), list[list[str]]()
    with suppress(OSError):
        for thread in re.split(r"(?m)^(?=Current thread |Thread )", (folder / f"stack-{rank}").read_text()):
            if thread.startswith("Current"):
                current = _calls(thread)
            else:
                others.append(_calls(thread))
    if any(f"{BATCHES}:" in call for call in current):
        making = [calls for calls in others if any(re.search(rf"{BATCHES}:\d+ in _make$", call) for call in calls)]
        current = (making or [current])[0]
    return current[0] if current else ""


def crash(folder: Path, rank: int) -> str:
    """What a rank crashed of, and where: `Bus error in file:line in function`; empty where it did not."""
    with suppress(OSError):
        error = re.match(r"Fatal Python error: (.+)", (folder / f"crash-{rank}").read_text())
        if error is not None:
            frames = _frames(folder / f"crash-{rank}") or ["a library"]
            ours = [frame for frame in frames if frame.startswith(OUR_FILES)]  # says more than a line of numpy's
            return f"{error[1]} in {(ours or frames)[0]}"
    return ""


def _frames(stack: Path) -> list[str]:
    """`file:line in function` of each call, the innermost first; none where nothing was written."""
    with suppress(OSError):
        return _calls(stack.read_text())
    return []


def _calls(stack: str) -> list[str]:
    found = re.findall(r'File "(.+)", line (\d+) in (\S+)', stack)
    return [f"{file}:{line} in {function}" for file, line, function in found]
