"""Whether the answer ends by itself."""

from __future__ import annotations

from qwentune.scores.case import Case, Score


def _stopped(case: Case) -> float | None:
    return None if case.answer is None else float(case.answer.stopped)


STOPPED = Score("stopped", _stopped)
