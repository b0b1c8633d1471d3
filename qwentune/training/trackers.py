"""Experiment trackers as observers: one record over all starts of a run, and none that can end it."""

from __future__ import annotations

import os
import re
import uuid
from typing import Any

from transformers import TrainerCallback

from qwentune import console
from qwentune.training.run_folder import RunFolder

RUN_ID = "tracker_id.txt"
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def continue_record(folder: RunFolder) -> None:
    """Tells the trackers by their environment variables which record is this run's, unless the user has.

    The record's id is drawn at the first start and stays in the run folder. MLflow and ClearML take no id for a new
    record: they begin another one with each start.
    """
    path = folder.path / RUN_ID
    run_id = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch("[A-Za-z0-9_-]{1,128}", run_id):  # none yet, or damaged
        run_id = uuid.uuid4().hex
        folder.write(RUN_ID, run_id + "\n")
    for tracker in ("WANDB", "SWANLAB"):
        os.environ.setdefault(f"{tracker}_RUN_ID", run_id)
        os.environ.setdefault(f"{tracker}_RESUME", "allow")
    os.environ.setdefault("COMET_EXPERIMENT_KEY", run_id)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))


class Observer(TrainerCallback):
    """A tracker whose failures are a warning, said once; from then on it sees nothing more."""

    def __init__(self, tracker: TrainerCallback) -> None:
        self.tracker = tracker
        self.failed = False


def _observed(event: str) -> Any:
    def call(self: Observer, *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # whatever a tracker raises, the run does not depend on it
            self.failed = True
            name = type(self.tracker).__name__.removesuffix("Callback")
            console.say(f"warning: the tracker {name} failed and is left out: {type(error).__name__}: {error}")

    return call


for _event in EVENTS:
    setattr(Observer, _event, _observed(_event))


def observe(callbacks: list[TrainerCallback]) -> None:
    """Puts an Observer around each tracker of transformers in the list."""
    for place, callback in enumerate(callbacks):
        if type(callback).__module__ == "transformers.integrations.integration_utils":
            callbacks[place] = Observer(callback)
