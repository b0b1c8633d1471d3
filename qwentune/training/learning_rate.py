"""The learning rate of each step, relative to its peak."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    *,
    num_steps: int,
    num_warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    min_factor: float,
) -> float:
    """The factor for optimizer step `step`, counted from 0: up to 1 over the warm-up, then down to `min_factor`."""
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_factor + (1 - min_factor) * remaining
