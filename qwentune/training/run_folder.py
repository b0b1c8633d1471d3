"""The folder of a run: who holds it, how it stands, what was measured in it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwentune import console
from qwentune.durable import LAYOUT, Mark, is_empty, mark, read_json, read_mark, remove, write_text
from qwentune.errors import FULL, Problem, RunInUseError, UsageError, counted
from qwentune.redaction import redact, redacted

METRICS = "metrics.jsonl"  # one row per logged step
EVALUATIONS = "evaluations.jsonl"  # one row per evaluation
SAMPLES = "samples.jsonl"  # one row per held-out prompt that an evaluation has answered
EVENTS = "events.jsonl"  # one row per start, save and end, those of lost work too
RECORDS = (METRICS, EVALUATIONS, SAMPLES)
LOG = "log.txt"  # what was said on the screen
STATUS = "status.json"
LOCK = ".lock"
HOLDER = "process "  # begins what stands in it
TRAINED = ("adapter", "model")  # where the trained weights are published
STATUS_KEYS = {"state", "exit", "reason", "step", "resume_command"}
TRACKER_ID = "tracker_id.txt"  # of runs that began before folders were marked
State = Literal["running", "finished", "preempted", "interrupted", "failed"]
Event = Literal["start", "resume", "save", "preempted", "interrupted", "failed", "finished"]
MOST_LOOKS = 10  # at a folder that a lock is in, and no mark
LONGEST_REASON = 1000  # characters, where status.json is written over in the room that it has


@dataclass(frozen=True)
class RunFolder:
    """One run's files; only rank 0 writes them. Everything in it is readable with a text editor."""

    path: Path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder and marks it as a run's; the system frees it when this process dies.

        Raises RunInUseError where another process holds it, UsageError where the folder is no run's.
        """
        self.refuse_other_things()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / LOCK
        if lock.is_symlink():  # written through, it would empty the file that it points to
            remove(lock)
        with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                fix = "Wait for it, stop it, or choose another output.dir."
                raise RunInUseError(Problem(str(self.path), f"is in use by {holder}", fix)) from None
            if read_mark(self.path) is None:
                self._begin()
            holder = f"{HOLDER}{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            with suppress(OSError):  # on a full disk nobody reads who holds it
                os.ftruncate(file.fileno(), os.pwrite(file.fileno(), holder.encode(), 0))
            yield

    def refuse_other_things(self) -> None:
        """Raises UsageError where the folder is there and is neither a run's nor empty."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UsageError(Problem(str(self.path), "is no folder", "Name another output.dir."))
        names, found = self._looked()
        for _ in range(MOST_LOOKS):
            if found is not None or LOCK not in names:
                break
            time.sleep(0.1)  # another start may hold it, and be about to mark it
            names, found = self._looked()
        if found is not None and found.layout > LAYOUT:
            what = f"was written by a later version (layout {found.layout}; this one writes {LAYOUT})"
            raise UsageError(Problem(str(self.path), what, "Upgrade qwentune, or name another output.dir."))
        if names and found is None:
            what = f"holds {counted(len(names), 'other thing{|s}')}, such as {names[0]!r}, and no run"
            raise UsageError(Problem(str(self.path), what, "Name a new or empty folder as output.dir."))

    def _looked(self) -> tuple[list[str], Mark | None]:
        """The names in a folder that is there and not new, and its mark."""
        try:
            is_new = not self.path.exists() or self._is_new()
            names = [] if is_new else sorted(file.name for file in self.path.iterdir())
        except OSError as error:
            raise UsageError(Problem(str(self.path), f"cannot be read: {error.strerror}")) from None
        return names, self._mark()  # only now: another start may have marked it meanwhile

    def set_status(self, state: State, *, exit_code: int | None, reason: str, step: int, command: list[str]) -> None:
        """Replaces `status.json`, atomically; on a full disk in the room that it has already."""
        status = {
            "state": state,
            "exit": exit_code,
            "reason": reason,
            "step": step,
            "resume_command": shlex.join(map(redact, command)),
        }
        try:
            self.write_json(STATUS, status)
        except OSError as error:
            if error.errno not in FULL or (self.path / STATUS).is_symlink():
                raise
            short = redacted({**status, "reason": redact(reason)[:LONGEST_REASON]})
            with (self.path / STATUS).open("r+b", buffering=0) as file:
                file.write(json.dumps(short, indent=2).encode() + b"\n")
                file.truncate()

    def set_live(self, **live: float | int | None) -> None:
        """Puts into `status.json` how far a run is that goes on; a disk that does not take it keeps the old one."""
        with suppress(OSError):
            self.write_json(STATUS, {**self.read_json(STATUS), **live})

    def mark_lost(self, reason: str, exit_code: int, command: list[str]) -> bool:
        """Puts an end into `status.json` that a trainer could not write, or of which it knew only half; whether it did.

        Without a reason only a run that is said to go on is marked. `command` continues it where the file has none.
        """
        if not (self.path / STATUS).is_file():
            return False  # there was no run yet
        for _ in range(50):
            try:
                with self.lock():
                    status = self.read_json(STATUS)
                    if status.get("state") not in ("running", None, *(["failed"] if reason else [])):
                        return False
                    with suppress(ValueError):
                        command = shlex.split(str(status.get("resume_command") or "")) or command
                    reason = reason or f"ended with exit code {exit_code}, and could not write so itself"
                    step = self.reached_step()
                    self.set_status("failed", exit_code=exit_code, reason=reason, step=step, command=command)
                    self.add_event("failed", step)
            except RunInUseError:
                time.sleep(0.1)  # the system is still taking apart the process that was killed
            except (OSError, UsageError):
                return False
            else:
                return True
        return False

    def finished_step(self) -> int | None:
        """The step whose weights the finished run has published; None while there is none."""
        status = self.read_json(STATUS)
        step = status.get("step")
        is_finished = status.get("state") == "finished" and isinstance(step, int) and self.trained is not None
        return step if is_finished else None

    def write(self, name: str, text: str) -> None:
        """Replaces a text of the run, atomically; secrets are left out."""
        self.write_clean(name, redact(text))

    def write_clean(self, name: str, text: str) -> None:
        """Replaces a text of the run from which secrets were kept already."""
        with _about(self.path / name):  # half a character, as of a file's name, is written as an escape
            write_text(self.path / name, text.encode("utf-8", "backslashreplace").decode())

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a file of JSON; secrets are left out of its texts, not of what is written of them."""
        self._write_values(name, [value], indent=2)

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        """Replaces a file of JSON lines; otherwise as `write_json`."""
        self._write_values(name, rows, indent=None)

    @property
    def trained(self) -> Path | None:
        """The folder with the published weights, `adapter` or `model`; None while there is none."""
        return next((self.path / name for name in TRAINED if (self.path / name).is_dir()), None)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a file of JSON; an empty one where there is none, or no file that can be read."""
        return read_json(self.path / name)

    def stored_plan(self) -> dict[str, Any] | None:
        """The plan that this run was started with; None where there is none that can be read."""
        return None if self._mark() is None else self.read_json("plan.json") or None

    def rewind(self, step: int) -> None:
        """Drops the records of steps after `step`: they belong to work that was lost and will be done again."""
        for name in (*RECORDS, EVENTS, LOG):
            if (self.path / name).is_symlink():  # lines would be added to what it points to
                remove(self.path / name)
        for name in RECORDS:
            if (self.path / name).exists():
                rows, damaged = self._records(name)
                if damaged:
                    console.say(f"warning: {damaged} lines of {self.path / name} cannot be read and are left out")
                self.write_rows(name, [row for row in rows if row["step"] <= step])

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds one record to a file of JSON lines: all of it, or nothing where there is no room."""
        line = json.dumps(redacted(row)).encode() + b"\n"
        with _about(self.path / name), (self.path / name).open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    def add_event(self, event: Event, step: int, **facts: Any) -> None:
        """Notes what befell the run after a step; a disk that does not take it is no reason to end."""
        with suppress(OSError):
            self.append(EVENTS, {"event": event, "step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts})

    def sync_records(self) -> None:
        """Waits until the records are on disk: a checkpoint must not outlive those of its steps."""
        for name in RECORDS:
            if (self.path / name).exists():
                with _about(self.path / name), (self.path / name).open("ab") as file:
                    os.fsync(file.fileno())

    def records(self, name: str = METRICS) -> list[dict[str, Any]]:
        """Every row of a file of records that can be read; each has a `step`."""
        with suppress(OSError):
            return self._records(name)[0]
        return []

    def last_record(self, name: str = METRICS) -> dict[str, Any] | None:
        """The newest row of a file of records that can be read."""
        with suppress(OSError):
            return next(filter(None, map(_record, reversed(self._lines(name)))), None)
        return None

    def losses(self) -> list[float]:
        """The loss of every record that can be read."""
        return [row["loss"] for row in self.records() if isinstance(row.get("loss"), float)]

    def reached_step(self) -> int:
        """The step of the newest record, else of the status, else 0."""
        step = (self.last_record() or self.read_json(STATUS)).get("step")
        return step if isinstance(step, int) else 0

    def _begin(self) -> None:
        """Marks the folder, and the weights that a run of before there were marks has published."""
        if self.read_json(STATUS).get("state") == "finished" and self.trained is not None:
            mark(self.trained)
        mark(self.path, self._id_before_marks() or uuid.uuid4().hex)

    def _is_new(self) -> bool:
        """Whether nothing is in the folder but the lock of a start that has not come further yet."""
        lock = self.path / LOCK
        if not lock.is_file():
            return is_empty(self.path)
        held_by = lock.read_bytes()[: len(HOLDER)]
        return is_empty(self.path, besides=LOCK) and HOLDER.encode().startswith(held_by)

    def _mark(self) -> Mark | None:
        """The folder's mark, or the one that a run of before there were marks will have; None where it is no run's."""
        found = read_mark(self.path)
        if found is None and self._is_run_before_marks():
            return Mark("qwentune", "run", LAYOUT, self._id_before_marks() or "")
        return found if found is not None and found.what == "run" else None

    def _is_run_before_marks(self) -> bool:
        status = self.read_json(STATUS)
        return set(status) == STATUS_KEYS and "qwentune" in str(status["resume_command"])

    def _id_before_marks(self) -> str | None:
        with suppress(OSError, ValueError):
            name = (self.path / TRACKER_ID).read_text(encoding="utf-8").strip()
            return name if re.fullmatch("[A-Za-z0-9_-]{1,128}", name) else None
        return None

    def _write_values(self, name: str, values: Iterable[Any], indent: int | None) -> None:
        lines = [json.dumps(value, indent=indent, ensure_ascii=False) + "\n" for value in redacted(list(values))]
        self.write_clean(name, "".join(lines))

    def _records(self, name: str) -> tuple[list[dict[str, Any]], int]:
        """The records of a file of JSON lines, and how many lines before the last are none.

        The last is torn where the run was killed, or its disk full, while it was written.
        """
        rows: list[dict[str, Any]] = []
        bad: list[int] = []
        lines = self._lines(name)
        for number, line in enumerate(lines):
            if (row := _record(line)) is not None:
                rows.append(row)
            else:
                bad.append(number)
        return rows, sum(number < len(lines) - 1 for number in bad)

    def _lines(self, name: str) -> list[bytes]:
        return (self.path / name).read_bytes().split(b"\n") if (self.path / name).exists() else []


def _record(line: bytes) -> dict[str, Any] | None:
    """The row that a line is; None where it is none."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of the file that it is about, where it comes without: writes' do."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
