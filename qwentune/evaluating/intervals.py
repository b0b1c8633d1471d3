"""How far a mean over few rows may be from that over many: percentiles of the bootstrap, rows drawn whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_DRAWS = 4000
SEED = 20_261_201
MOST_AT_ONCE = 2**22  # rows of draws that are in memory together

Floats = NDArray[np.float64]


def drawn_means(sums: Floats, weights: Floats) -> Floats:
    """The means of rows drawn at random, so many as there are, with replacement: (k, NUM_DRAWS) for `sums` (k, n).

    A mean is the sum of the rows' `sums` over that of their `weights` (n,). The k of one draw are of the same rows.
    """
    num_rows = len(weights)
    random = np.random.default_rng(SEED)
    means = np.empty((len(sums), NUM_DRAWS))
    size = max(1, MOST_AT_ONCE // num_rows)
    for start in range(0, NUM_DRAWS, size):
        rows = random.integers(num_rows, size=(min(size, NUM_DRAWS - start), num_rows))
        means[:, start : start + len(rows)] = sums[:, rows].sum(-1) / weights[rows].sum(-1)
    return means


def interval(draws: Floats, num_rows: int, bounds: tuple[float, float] | None) -> list[float]:
    """Between which values `LEVEL` of the draws lie.

    Rows that all agree leave nothing to draw, which is no proof: where the values have `bounds`, there may be as many
    rows at the other bound as would be missed by all of these once in 40 times. For shares that is the exact interval
    of Clopper and Pearson.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    if bounds is None or high - low > 1e-12:
        return [low, high]
    missed = 1 - ((1 - LEVEL) / 2) ** (1 / num_rows)
    return [low - missed * (low - bounds[0]), high + missed * (bounds[1] - high)]
