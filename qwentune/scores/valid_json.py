"""Whether the answer is JSON, an object or a list, where the taught one is."""

from __future__ import annotations

from qwentune.answering.answer import Answer
from qwentune.answering.call_syntax import json_or_none
from qwentune.scores.case import Case, Score, given


def _valid_json(case: Case) -> float | None:
    if case.kind not in ("turn", "completion") or not _is_json(case.taught):
        return None
    return float(_is_json(given(case)))


def _is_json(answer: Answer) -> bool:
    return json_or_none(answer.answer) is not None


VALID_JSON = Score("valid_json", _valid_json)
