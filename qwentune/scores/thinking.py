"""Whether the answer begins with reasoning where the prompt asks for it, and only there."""

from __future__ import annotations

from qwentune.scores.case import Case, Score, given


def _reasoning_as_asked(case: Case) -> float | None:
    if case.kind != "turn" or case.asked_to_reason is None:
        return None
    return float(bool(given(case).reasoning.strip()) == case.asked_to_reason)


REASONING_AS_ASKED = Score("reasoning_as_asked", _reasoning_as_asked)
