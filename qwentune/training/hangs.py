"""Finds the rank that hangs while others wait for it: from outside, by the system's word and by what ranks report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qwentune.errors import EXIT_BUG
from qwentune.training import reports

STOPPED_SECONDS = 60.0  # for a rank that the system has stopped
LATE_SECONDS = 600.0  # for one that runs but passes no mark, unless ten times its usual delay is longer
LEFT_SECONDS = 3.0  # for one that stays when the others have ended with an error; torchrun gives it 30
ANSWER_SECONDS = 0.5


@dataclass
class Delay:
    """The marks that the ranks have passed, since when, and the longest time for which one kept others waiting."""

    marks: dict[int, int]
    since: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def late_rank(self, marks: dict[int, int], *, stopped: bool) -> int | None:
        """The rank for which others have waited for longer than slow steps explain; none while one is stopped."""
        now, marks = time.monotonic(), {**self.marks, **marks}
        apart = len(set(self.marks.values())) > 1
        if marks != self.marks or stopped:
            if apart and not stopped:
                self.longest = max(self.longest, now - self.since)
            self.marks, self.since = marks, now
        elif apart and now - self.since > max(LATE_SECONDS, 10 * self.longest):
            return min(marks, key=marks.__getitem__)
        return None


class HangWatch:
    """Watches over the ranks of one run, whose reports are in `folder`; to be asked twice a second or so."""

    def __init__(self, folder: Path, ranks: Iterable[int]) -> None:
        self.folder = folder
        self.delay = Delay(dict.fromkeys(ranks, 0))
        self.stopped: dict[int, float] = {}
        self.left: dict[int, float] = {}

    def find(self, trainers: Sequence[psutil.Process]) -> str | None:
        """Which rank hangs, for how long and where, in words; None while none does."""
        ranks = dict(map(_rank_and_status, trainers))
        self.stopped = _since(self.stopped, [r for r, status in ranks.items() if status == psutil.STATUS_STOPPED])
        if (rank := _longer(self.stopped, STOPPED_SECONDS)) is not None and len(self.stopped) < len(ranks):
            return f"Rank {rank} has stood still for {STOPPED_SECONDS:.0f} s while others wait for it"
        if (rank := self.delay.late_rank(reports.marks(self.folder), stopped=bool(self.stopped))) is not None:
            seconds = time.monotonic() - self.delay.since
            return (
                f"Rank {rank} has not come on for {seconds:.0f} s while others wait for it{self._place(rank, trainers)}"
            )
        codes = reports.exit_codes(self.folder)
        alive = [r for r, status in ranks.items() if status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
        self.left = _since(self.left, [r for r in alive if r not in codes and EXIT_BUG in codes.values()])
        if (rank := _longer(self.left, LEFT_SECONDS)) is not None:
            return f"Rank {rank} did not come on until the others gave up{self._place(rank, trainers)}"
        return None

    def _place(self, rank: int, trainers: Sequence[psutil.Process]) -> str:
        for process in trainers:
            with suppress(psutil.Error):
                if _rank_and_status(process)[0] == rank:
                    process.send_signal(reports.ASK_FOR_STACK)
        time.sleep(ANSWER_SECONDS)
        place = reports.position(self.folder, rank)
        return f" (in {place})" if place else ""


def _rank_and_status(trainer: psutil.Process) -> tuple[int, str]:
    """The rank of a training process, -1 where it is gone, and how the system says that it stands."""
    try:
        return int(trainer.environ().get("RANK", "0")), trainer.status()
    except psutil.Error:
        return -1, psutil.STATUS_DEAD


def _since(before: dict[int, float], ranks: list[int]) -> dict[int, float]:
    return {rank: before.get(rank, time.monotonic()) for rank in ranks}


def _longer(since: dict[int, float], seconds: float) -> int | None:
    return next((rank for rank, start in since.items() if time.monotonic() - start > seconds), None)
