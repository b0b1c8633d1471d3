"""Experiment trackers as observers: one record over all starts of a run, and none that can end it."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from qwentune import console
from qwentune.durable import run_id
from qwentune.recipe import OutputOptions
from qwentune.training.run_folder import RunFolder

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


# What the trackers read a project from; trackio is told by transformers' arguments, TensorBoard has none.
PROJECTS = ("WANDB_PROJECT", "SWANLAB_PROJECT", "COMET_PROJECT_NAME", "MLFLOW_EXPERIMENT_NAME", "CLEARML_PROJECT")


def continue_record(folder: RunFolder, output: OutputOptions) -> None:
    """Tells the trackers by their environment variables which record is this run's, unless the user has.

    The record has the run's id. MLflow and ClearML take no id for a new record: they begin another one with each start.
    Project and name count as the recipe says them, whatever the environment says.
    """
    if output.project is not None:
        os.environ.update(dict.fromkeys(PROJECTS, output.project))
    if output.run_name is not None:
        os.environ["CLEARML_TASK"] = output.run_name  # the others are told by transformers' arguments
    record = run_id(folder.path)
    for tracker in ("WANDB", "SWANLAB"):
        os.environ.setdefault(f"{tracker}_RUN_ID", record)
        os.environ.setdefault(f"{tracker}_RESUME", "allow")
    os.environ.setdefault("COMET_EXPERIMENT_KEY", record)
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
