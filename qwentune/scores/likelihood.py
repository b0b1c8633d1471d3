"""How likely the model holds what is taught: the loss as training reckons it, and its exponential."""

from __future__ import annotations

import math

from qwentune.scores.case import Case, Score

LARGEST_LOSS = 700.0  # whose exponential is still a number


def _loss(case: Case) -> float:
    return case.loss


def _weight(case: Case) -> float:
    return case.weight


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, LARGEST_LOSS))


LOSS = Score("loss", _loss, _weight, in_shares=False)
PERPLEXITY = Score("perplexity", _loss, _weight, _perplexity, in_shares=False)
