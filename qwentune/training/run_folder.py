"""The folder of a run: who holds it, how it stands, what was measured in it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwentune.durable import LAYOUT, Mark, is_empty, mark, read_mark, remove, write_text
from qwentune.errors import Problem, RunInUseError, UsageError
from qwentune.redaction import redact

METRICS = "metrics.jsonl"  # one row per logged step
EVALUATIONS = "evaluations.jsonl"  # one row per evaluation
LOG = "log.txt"  # what was said on the screen
STATUS = "status.json"
LOCK = ".lock"
TRAINED = ("adapter", "model")  # where the trained weights are published
STATUS_KEYS = {"state", "exit", "reason", "step", "resume_command"}
TRACKER_ID = "tracker_id.txt"  # of runs that began before folders were marked
State = Literal["running", "finished", "preempted", "interrupted", "failed"]


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
        if read_mark(self.path) is None:
            mark(self.path, self._id_before_marks() or uuid.uuid4().hex, what="run")
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
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield

    def refuse_other_things(self) -> None:
        """Raises UsageError where the folder is there and is neither a run's nor empty."""
        found = self._mark()
        if found is not None and found.layout > LAYOUT:
            what = f"was written by a later version (layout {found.layout}; this one writes {LAYOUT})"
            raise UsageError(Problem(str(self.path), what, "Upgrade qwentune, or name another output.dir."))
        if found is not None or not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise UsageError(Problem(str(self.path), "is no folder", "Name another output.dir."))
        try:
            names = [] if is_empty(self.path) else sorted(path.name for path in self.path.iterdir())
        except OSError as error:
            raise UsageError(Problem(str(self.path), f"cannot be read: {error.strerror}")) from None
        if names:
            what = f"holds {len(names)} other things, such as {names[0]!r}, and no run"
            raise UsageError(Problem(str(self.path), what, "Name a new or empty folder as output.dir."))

    def set_status(self, state: State, *, exit_code: int | None, reason: str, step: int, command: list[str]) -> None:
        """Replaces `status.json`, atomically."""
        status = {
            "state": state,
            "exit": exit_code,
            "reason": reason,
            "step": step,
            "resume_command": shlex.join(command),
        }
        self.write(STATUS, json.dumps(status, indent=2) + "\n")

    def mark_lost(self, reason: str, exit_code: int) -> None:
        """Puts an end and its reason into `status.json`, where a trainer died before it could or knew only half."""
        if not (self.path / STATUS).is_file():
            return  # there was no run yet
        for _ in range(50):
            try:
                with self.lock():
                    status = json.loads((self.path / STATUS).read_bytes())
                    if status["state"] in ("running", "failed"):
                        step = (self.last_metrics() or status)["step"]
                        command = shlex.split(status["resume_command"])
                        self.set_status("failed", exit_code=exit_code, reason=reason, step=step, command=command)
            except RunInUseError:
                time.sleep(0.1)  # the system is still taking apart the process that was killed
            except (OSError, ValueError, KeyError, TypeError, UsageError):
                return  # there is none that can be read
            else:
                return

    def finished_step(self) -> int | None:
        """The step whose weights the finished run has published; None while there is none."""
        try:
            status = json.loads((self.path / STATUS).read_bytes())
            return status["step"] if status["state"] == "finished" and self.trained is not None else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, text: str) -> None:
        """Replaces a file of the run, atomically; secrets are left out."""
        write_text(self.path / name, redact(text))

    @property
    def trained(self) -> Path | None:
        """The folder with the published weights, `adapter` or `model`; None while there is none."""
        return next((self.path / name for name in TRAINED if (self.path / name).is_dir()), None)

    def stored_plan(self) -> dict[str, Any] | None:
        """The plan that this run was started with; None where there is none that can be read."""
        if self._mark() is None:
            return None
        try:
            return json.loads((self.path / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def rewind(self, step: int) -> None:
        """Drops the records of steps after `step`: they belong to work that was lost and will be done again."""
        for name in (METRICS, EVALUATIONS, LOG):
            if (self.path / name).is_symlink():  # lines would be added to what it points to
                remove(self.path / name)
        for name in (METRICS, EVALUATIONS):
            kept: list[str] = []
            for line in self._lines(name):
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # the line that was being written when the run was killed
                if row["step"] <= step:
                    kept.append(line + "\n")
            if kept or (self.path / name).exists():
                self.write(name, "".join(kept))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds one record to a file of JSON lines."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync_records(self) -> None:
        """Waits until the records are on disk: a checkpoint must not outlive those of its steps."""
        for name in (METRICS, EVALUATIONS):
            if (self.path / name).exists():
                with (self.path / name).open("ab") as file:
                    os.fsync(file.fileno())

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest row of `metrics.jsonl`."""
        lines = self._lines(METRICS)
        return json.loads(lines[-1]) if lines else None

    def _mark(self) -> Mark | None:
        """The folder's mark, or the one that a run of before there were marks will have; None where it is no run's."""
        found = read_mark(self.path)
        if found is None and self._is_run_before_marks():
            return Mark("qwentune", "run", LAYOUT, self._id_before_marks() or "")
        return found if found is not None and found.what == "run" else None

    def _is_run_before_marks(self) -> bool:
        try:
            status = json.loads((self.path / STATUS).read_bytes())
            return set(status) == STATUS_KEYS and "qwentune" in status["resume_command"]
        except (OSError, ValueError, TypeError):
            return False

    def _id_before_marks(self) -> str | None:
        try:
            return (self.path / TRACKER_ID).read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):
            return None

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
