"""The folder of a run: who holds it, how it stands, what was measured in it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwentune.errors import Problem, RunInUseError

METRICS = "metrics.jsonl"  # one row per logged step
EVALUATIONS = "evaluations.jsonl"  # one row per evaluation
TRAINED = ("adapter", "model")  # where the trained weights are published
State = Literal["running", "finished", "preempted", "interrupted", "failed"]


@dataclass(frozen=True)
class RunFolder:
    """One run's files; only rank 0 writes them. Everything in it is readable with a text editor."""

    path: Path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder; RunInUseError where another process does. The system frees it when this process dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                fix = "Wait for it, stop it, or choose another output.dir."
                raise RunInUseError(Problem(str(self.path), f"is in use by {holder}", fix)) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield

    def set_status(self, state: State, *, exit_code: int | None, reason: str, step: int, command: list[str]) -> None:
        """Replaces `status.json`, atomically."""
        status = {
            "state": state,
            "exit": exit_code,
            "reason": reason,
            "step": step,
            "resume_command": shlex.join(command),
        }
        self.write("status.json", json.dumps(status, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replaces a file of the run, atomically."""
        temporary = self.path / f".{name}.new"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    @property
    def trained(self) -> Path | None:
        """The folder with the published weights, `adapter` or `model`; None while there is none."""
        return next((self.path / name for name in TRAINED if (self.path / name).is_dir()), None)

    def stored_plan(self) -> dict[str, Any] | None:
        """The plan that this run was started with; None where there is none that can be read."""
        try:
            return json.loads((self.path / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def rewind(self, step: int) -> None:
        """Drops the records of steps after `step`: they belong to work that was lost and will be done again."""
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

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest row of `metrics.jsonl`."""
        lines = self._lines(METRICS)
        return json.loads(lines[-1]) if lines else None

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
