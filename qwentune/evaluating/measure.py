"""What one network makes of questions: its loss on what is taught, and its own answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwentune.answering.answer import Answer
from qwentune.answering.speaker import Speaker
from qwentune.console import busy
from qwentune.data.dataset import Dataset
from qwentune.data.layout.batch import Ahead, EvalBatches
from qwentune.data.layout.rows import Rows
from qwentune.data.layout.tower_inputs import stays_on_cpu
from qwentune.errors import NotFiniteError, Problem
from qwentune.evaluating.questions import Question
from qwentune.model.head import LossHead
from qwentune.scores.case import Case


def measured(
    asked: Sequence[Question], dataset: Dataset, speaker: Speaker, *, whose: str, most_tokens: int | None = None
) -> list[Case]:
    """What the network makes of each question; NotFiniteError where a loss is no number.

    Answers have `most_tokens` at most, or as many as the taught ones suggest.
    """
    losses = _losses(asked, dataset, speaker.network, whose)
    answers = _answers(asked, dataset, speaker, whose, most_tokens)
    return [
        Case(question.kind, question.taught, *loss, answer, question.asked_to_reason)
        for question, loss, answer in zip(asked, losses, answers, strict=True)
    ]


def _losses(asked: Sequence[Question], dataset: Dataset, network: Any, whose: str) -> list[tuple[float, float]]:
    """Mean loss of each question's trained tokens, and what these weigh; each example stands in a row of its own."""
    of_example: dict[int, list[int]] = {}
    for k, question in enumerate(asked):
        of_example.setdefault(question.example, []).append(k)
    rows = Rows(dataset.examples, tuple(((i,),) for i in of_example), (len(of_example),), dataset.media)
    batches = EvalBatches(rows, 0, 1)
    made = batches if rows.media is None else Ahead(batches)
    head = LossHead(network, "full")
    found: list[tuple[float, float]] = [(math.nan, 0.0)] * len(asked)
    try:
        with busy(f"loss of the {whose} model", len(of_example)) as state:
            for row, (i, places) in enumerate(of_example.items()):
                given = made[row]
                batch = {n: t if stays_on_cpu(n, given) else t.to(network.device) for n, t in given.items()}
                losses = head.each(network, batch).double().cpu().numpy()
                _, weights = dataset.examples.tokens(i)
                for k in places:
                    found[k] = _mean(losses, weights, asked[k], whose)
                state.done += 1
    finally:
        head.head.forward = head.logits  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _mean(
    losses: NDArray[np.float64], weights: NDArray[np.float32], question: Question, whose: str
) -> tuple[float, float]:
    """Of an example's losses, one for each trained token in order, the mean over a question's, and what these weigh."""
    trained = np.flatnonzero(weights)
    own = (trained < question.stop) & (trained >= _first_trained(question, weights))
    weighs = weights[trained[own]].astype(np.float64)
    mean = float((losses[own] * weighs).sum() / weighs.sum())
    if not math.isfinite(mean):
        what = f"the loss of the {whose} model is not finite: {mean}"
        raise NotFiniteError(Problem(str(question.source), what), "Nothing was written.")
    return mean, float(weighs.sum())


def _first_trained(question: Question, weights: NDArray[np.float32]) -> int:
    """Where what carries loss begins: of a cut code before what is asked for, where all of it is trained."""
    return int(np.flatnonzero(weights)[0]) if question.kind == "middle" else question.start


def _answers(
    asked: Sequence[Question], dataset: Dataset, speaker: Speaker, whose: str, most_tokens: int | None
) -> list[Answer | None]:
    places = [k for k, question in enumerate(asked) if question.kind != "text"]
    prompts = [asked[k].prompt(dataset, most_tokens) for k in places]
    found: list[Answer | None] = [None] * len(asked)
    with busy(f"answers of the {whose} model", len(prompts)) as state:
        for place, answer in speaker.answers(prompts):
            found[places[place]] = answer
            state.done += 1
    return found
