"""The runs of a folder, each as its own files tell of it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qwentune.durable import read_mark
from qwentune.errors import Problem, UsageError
from qwentune.training.run_folder import EVALUATIONS, HOLDER, LOCK, STATUS, RunFolder

DEPTH = 4  # of folders within the one that is asked for
_HELD_BY = re.compile(rf"{HOLDER}(\d+) on (\S+) since ")


@dataclass(frozen=True)
class RunSummary:
    """How one run stands; what its files do not tell is None. `changed` is in seconds since 1970."""

    folder: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    reason: str
    changed: float


def summaries(folder: Path) -> list[RunSummary]:
    """The runs in a folder and the folders in it, the newest first.

    Raises UsageError where there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(Problem(str(folder), "is no folder", "Name the one that holds runs, as output.dir has it."))
    return sorted(map(summary, run_folders(folder)), key=lambda run: (-run.changed, run.folder))


def run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The marked folders of runs; links and hidden folders are passed over, and what stands in a run."""
    mark = read_mark(folder)
    if mark is not None and mark.what == "run":
        yield folder
        return
    if depth == 0:
        return
    inside = list[Path]()
    with suppress(OSError), os.scandir(folder) as entries:  # another user's
        inside = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in sorted(inside):
        if not path.name.startswith("."):
            yield from run_folders(path, depth - 1)


def summary(folder: Path) -> RunSummary:
    """How the run in a folder stands."""
    run = RunFolder(folder)
    status, last = run.read_json(STATUS), run.last_record() or {}
    state = str(status.get("state") or "new")
    if state == "running" and not is_held(folder):
        state = "killed"
    step = run.reached_step()
    changed = 0.0
    with suppress(OSError):  # it may be removed at this moment
        changed = (folder / STATUS).stat().st_mtime
    return RunSummary(
        folder=str(folder),
        state=state,
        step=step,
        steps=_number(status, "steps", int) or (step if state == "finished" else None),
        loss=_number(last, "loss", float),
        eval_loss=_number(run.last_record(EVALUATIONS) or {}, "loss", float),
        tokens_per_second=_number(last, "tokens_per_second", float),
        reason=str(status.get("reason") or "") if state not in ("finished", "running") else "",
        changed=changed,
    )


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder, as far as can be told from here: one of another machine is believed."""
    with suppress(OSError):
        found = _HELD_BY.match((folder / LOCK).read_text("utf-8", "replace"))
        if found is not None:
            return found[2] != socket.gethostname() or psutil.pid_exists(int(found[1]))
    return False


def _number(values: dict[str, Any], key: str, kind: type[float] | type[int]) -> Any:
    value = values.get(key)
    return value if isinstance(value, int | kind) and not isinstance(value, bool) else None
