"""The learning rate of each step, relative to its peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from qwentune.recipe import OptimizerOptions


def learning_rate_of(optimizer: OptimizerOptions, num_steps: int) -> Callable[[int], float]:
    """The factor of each of `num_steps` optimizer steps, counted from 0."""
    warmup, decay = optimizer.warmup_fraction, optimizer.decay_fraction
    return partial(
        learning_rate_factor,
        num_steps=num_steps,
        num_warmup_steps=optimizer.warmup_steps or round((warmup or 0.0) * num_steps),
        num_decay_steps=num_steps if decay is None else round(decay * num_steps),
        schedule=optimizer.schedule,
        min_factor=optimizer.min_learning_rate / optimizer.learning_rate,
    )


def learning_rate_factor(
    step: int,
    *,
    num_steps: int,
    num_warmup_steps: int,
    num_decay_steps: int,
    schedule: Literal["cosine", "linear", "wsd", "constant"],
    min_factor: float,
) -> float:
    """The factor for optimizer step `step`, counted from 0: up to 1 over the warm-up, in the end down to `min_factor`.

    It falls in the last `num_decay_steps`, or in those after the warm-up where they are fewer.
    """
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    start = max(num_warmup_steps, num_steps - num_decay_steps)
    progress = min(1.0, max(0, step - start) / max(1, num_steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_factor + (1 - min_factor) * remaining
