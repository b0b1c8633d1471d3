"""The best step of a run by its eval loss, and when to wait no longer for a better one."""

from __future__ import annotations

import json

from qwentune.recipe import OutputOptions
from qwentune.training.checkpoints import Checkpoint


def best_step(checkpoint: Checkpoint) -> int | None:
    """The step with the lowest eval loss up to the checkpoint's; None where none was asked for or evaluated."""
    return json.loads((checkpoint.folder / "trainer_state.json").read_bytes())["best_global_step"]


def has_stopped_improving(step: int, best_step: int | None, output: OutputOptions) -> bool:
    """Whether `output.early_stopping` evaluations have passed since the best one."""
    if output.early_stopping is None or best_step is None:
        return False
    return (step - best_step) // output.eval_every_steps >= output.early_stopping
