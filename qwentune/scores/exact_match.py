"""Whether the answer is the taught one, word for word; reasoning before it may differ."""

from __future__ import annotations

from qwentune.scores.case import Case, Score, given


def _exact_match(case: Case) -> float | None:
    if case.kind == "turn":
        return float(given(case).answer.strip() == case.taught.answer.strip())
    return float(given(case).text.strip() == case.taught.text.strip()) if case.kind == "completion" else None


EXACT_MATCH = Score("exact_match", _exact_match)
