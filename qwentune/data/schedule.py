"""Which rows each optimizer step takes: a pure function of seed and step, so that a resumed run continues exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Schedule:
    """Epoch after epoch of shuffled rows, cut into steps of `sequences_per_step`.

    The stream does not pause between epochs; only the very last step may be short. Of `epochs` and `max_steps` one is
    given.
    """

    num_rows: int
    sequences_per_step: int
    seed: int
    epochs: float | None
    max_steps: int | None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return max(1, math.ceil(round(self.epochs * self.num_rows) / self.sequences_per_step))

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0; fewer than `sequences_per_step` in a short last one."""
        start = step * self.sequences_per_step
        stop = start + self.sequences_per_step
        if self.epochs is not None:
            stop = min(stop, max(1, round(self.epochs * self.num_rows)))
        return [int(self._order(slot // self.num_rows)[slot % self.num_rows]) for slot in range(start, stop)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _shuffled(self.num_rows, self.seed, epoch)


@lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
