"""The scores of one or two models on the same questions, source by source, and the record of each question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwentune.answering.answer import Answer
from qwentune.evaluating.intervals import Floats, drawn_means, interval
from qwentune.evaluating.questions import Question
from qwentune.scores import SCORES
from qwentune.scores.case import Case, Score

EXAMPLES = "examples.jsonl"  # one row per question, in the run folder
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


def compared(asked: Sequence[Question], tuned: Sequence[Case], base: Sequence[Case] | None) -> dict[str, Any]:
    """By source: its rows, each model's scores, the intervals of both and of their difference, and of how many places
    each score is the mean."""
    found: dict[str, Any] = {}
    for file in dict.fromkeys(question.source.file for question in asked):
        places = [k for k, question in enumerate(asked) if question.source.file == file]
        lines = np.array([asked[k].source.line for k in places])
        models = [[cases[k] for k in places] for cases in (tuned, base) if cases is not None]
        found[file] = _of_source(lines, models)
    return {"schema": 1, "sources": found}


def _of_source(lines: np.ndarray[Any, Any], models: Sequence[Sequence[Case]]) -> dict[str, Any]:
    """Of the questions of one source, each from the row of a line; the tuned model comes first."""
    source: dict[str, Any] = {
        "rows": len(np.unique(lines)),
        "counts": {},
        "base": {} if models[1:] else None,
        "tuned": {},
        "intervals": {},
    }
    for score in SCORES:
        marks = [[score.of(case) for case in cases] for cases in models]
        applies = [k for k, mark in enumerate(marks[0]) if mark is not None]
        if not applies:
            continue
        weights = np.array([score.weight(models[0][k]) for k in applies])
        _, rows = np.unique(lines[applies], return_inverse=True)
        values = np.array([[of[k] for k in applies] for of in marks], dtype=np.float64)
        sums = np.stack([_by_row(rows, each * weights) for each in values])
        source["counts"][score.name] = len(applies)
        _add(source, score, sums, _by_row(rows, weights))
    return source


def _by_row(rows: np.ndarray[Any, Any], values: Floats) -> Floats:
    """The sums of the values that fall to each row."""
    return np.bincount(rows, values).astype(np.float64)


def _add(source: dict[str, Any], score: Score, sums: Floats, weights: Floats) -> None:
    shown = np.vectorize(score.shown, otypes=[np.float64])
    draws = shown(drawn_means(sums, weights))
    values = shown(sums.sum(-1) / weights.sum())
    intervals: dict[str, Any] = {"base": None, "tuned": None, "difference": None}
    for whose, value, drawn in zip(("tuned", "base"), values, draws, strict=False):
        source[whose][score.name] = float(value)
        intervals[whose] = interval(drawn, len(weights), SHARE if score.in_shares else None)
    if len(draws) == 2:
        bounds = DIFFERENCE if score.in_shares else None
        intervals["difference"] = interval(draws[0] - draws[1], len(weights), bounds)
    source["intervals"][score.name] = intervals


def records(asked: Sequence[Question], tuned: Sequence[Case], base: Sequence[Case] | None) -> list[dict[str, Any]]:
    """A row for each question, the highest loss of the tuned model first: rows that are wrong are found there."""
    order = sorted(range(len(asked)), key=lambda k: tuned[k].loss, reverse=True)
    return [
        {
            "source": {"file": asked[k].source.file, "line": asked[k].source.line},
            "turn": asked[k].turn if asked[k].turn >= 0 else None,
            **_record(tuned[k]),
            "taught": None if tuned[k].answer is None else _parts(asked[k].taught),
            "base": None if base is None else _record(base[k]),
        }
        for k in order
    ]


def _record(case: Case) -> dict[str, Any]:
    marks = {score.name: score.of(case) for score in SCORES if score.in_shares}
    return {
        "loss": case.loss,
        **({"answer": None} if case.answer is None else _parts(case.answer)),
        "scores": {name: mark for name, mark in marks.items() if mark is not None},
    }


def _parts(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.answer, **({"reasoning": answer.reasoning} if answer.reasoning else {})}


def in_words(value: float, score: str, count: int) -> str:
    """A mean of `count` places; of what is right or wrong, how many are right."""
    in_shares = {one.name for one in SCORES if one.in_shares}
    whole = round(value * count)
    return f"{whole}/{count}" if score in in_shares and abs(value * count - whole) < 1e-6 else f"{value:.4g}"


def in_brackets(bounds: Sequence[float]) -> str:
    """An interval."""
    return f"[{bounds[0]:.4g}, {bounds[1]:.4g}]"
