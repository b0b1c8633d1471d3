"""The best step of a run by its eval loss, and when to wait no longer for a better one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qwentune.training.checkpoints import Checkpoint


def best_step(checkpoint: Checkpoint) -> int | None:
    """The step with the lowest eval loss up to the checkpoint's; None where none was asked for or evaluated."""
    return _state(checkpoint)["best_global_step"]


def evaluated_steps(checkpoint: Checkpoint) -> list[int]:
    """The steps up to the checkpoint's after which the run was evaluated."""
    return [row["step"] for row in _state(checkpoint)["log_history"]]


def has_stopped_improving(evaluated: Sequence[int], best_step: int | None, patience: int | None) -> bool:
    """Whether `patience` evaluations have passed since the best one; never where there is no patience to lose."""
    if patience is None or best_step is None:
        return False
    return sum(step > best_step for step in evaluated) >= patience


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.folder / "trainer_state.json").read_bytes())
