"""Which rows each optimizer step takes: a pure function of seed and step, so that a resumed run continues exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qwentune.recipe import BatchOptions, OptimizerOptions, OutputOptions


@dataclass(frozen=True)
class Schedule:
    """Epoch after epoch of shuffled rows, cut into steps of `sequences_per_step`.

    `rows_per_epoch` are the sizes of blocks of rows that follow each other: epoch k takes block k, and after the last
    the first again. The stream does not pause between epochs; only the very last step may be short. Of `epochs` and
    `max_steps` one is given.
    """

    rows_per_epoch: tuple[int, ...]
    sequences_per_step: int
    seed: int
    epochs: float | None
    max_steps: int | None

    @classmethod
    def of(
        cls, rows_per_epoch: tuple[int, ...], batch: BatchOptions, optimizer: OptimizerOptions, seed: int
    ) -> Schedule:
        """The schedule that these sections of a recipe ask for."""
        return cls(rows_per_epoch, batch.sequences_per_step, seed, optimizer.epochs, optimizer.max_steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return self.steps_of(self.epochs)

    def steps_of(self, epochs: float) -> int:
        """Whole optimizer steps that these passes over the data take."""
        return math.ceil(self._num_slots(epochs) / self.sequences_per_step)

    def periods(self, output: OutputOptions) -> dict[str, int]:
        """The optimizer steps of each period that `output` gives in epochs, by its key there."""
        given = {"save_every_epochs": output.save_every_epochs, "eval_every_epochs": output.eval_every_epochs}
        return {key: self.steps_of(epochs) for key, epochs in given.items() if epochs is not None}

    def remarks(self, optimizer: OptimizerOptions, output: OutputOptions) -> list[str]:
        """What only the number of steps tells of these sections of a recipe, in words."""
        found = [f"output.{key}: every {steps} steps" for key, steps in self.periods(output).items()]
        warmup = optimizer.warmup_steps or 0
        if warmup >= self.num_steps:
            found.append(
                f"warning: optimizer.warmup_steps: {warmup} steps are not fewer than the {self.num_steps} of the run: "
                "the learning rate never arrives. Lower it, or train longer"
            )
        return found

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0; fewer than `sequences_per_step` in a short last one."""
        start = step * self.sequences_per_step
        stop = start + self.sequences_per_step
        if self.epochs is not None:
            stop = min(stop, self._num_slots(self.epochs))
        return [self._row(slot) for slot in range(start, stop)]

    def _num_slots(self, epochs: float) -> int:
        rounds, rest = divmod(epochs, len(self.rows_per_epoch))
        slots = rounds * sum(self.rows_per_epoch)
        for size in self.rows_per_epoch:
            slots += min(rest, 1.0) * size
            rest = max(0.0, rest - 1.0)
        return max(1, round(slots))

    def _row(self, slot: int) -> int:
        rounds, place = divmod(slot, sum(self.rows_per_epoch))
        start = 0
        for block, size in enumerate(self.rows_per_epoch):
            if place < start + size:
                epoch = rounds * len(self.rows_per_epoch) + block
                return start + int(_shuffled(size, self.seed, epoch)[place - start])
            start += size
        raise AssertionError("a place lies in one of the blocks")


@lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
