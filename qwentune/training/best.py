"""The best step of a run by its eval loss or a score, and when to wait no longer for a better one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwentune.recipe import ScoreName
from qwentune.training.checkpoints import Checkpoint


def best_step(checkpoint: Checkpoint, followed: ScoreName) -> int | None:
    """The best step up to the checkpoint's by what is followed; None where none was asked for or evaluated."""
    state = _state(checkpoint)
    best: int | None = state["best_global_step"]
    return best if was_best_by(followed, state["log_history"], best, state.get("best_metric")) else None


def was_best_by(
    followed: ScoreName, log_history: Sequence[Mapping[str, Any]], best_step: int | None, value: float | None
) -> bool:
    """Whether the best step was found by what is followed now: a recipe may follow something else since."""
    return any(row["step"] == best_step and row.get(f"eval_{followed}") == value for row in log_history)


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
