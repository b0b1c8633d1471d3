"""Periods in epochs become steps once the data is known; trackers are told project and name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwentune.durable import mark
from qwentune.recipe import OptimizerOptions, OutputOptions, load_recipe
from qwentune.training.arguments import training_arguments
from qwentune.training.run_folder import RunFolder
from qwentune.training.trackers import PROJECTS, continue_record
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import loss_history, write_recipe
from tests.warm import Warm


@pytest.mark.slow
def test_epochs_between_checkpoints_and_evaluations_become_steps(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        data={"eval_fraction": 0.1, "packing": False},
        optimizer={"epochs": 2, "max_steps": None},
        output={"save_every_steps": None, "save_every_epochs": 1, "eval_every_epochs": 0.5, "keep": 9},
    )
    ended = warm.train(recipe)
    assert ended.code == 0, ended.said
    run = tmp_path / "run"
    last = int(loss_history(run)[-1][0])
    half, whole = -(-last // 4), -(-last // 2)
    assert f"output.save_every_epochs: every {whole} steps" in ended.said
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    assert saved == [whole, last]
    evaluated = [int(line.split(",")[0].split(":")[1]) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert evaluated == [step for step in range(1, last + 1) if step % half == 0 or step == last]
    resolved = (run / "recipe.resolved.yaml").read_text()
    (line,) = (line for line in resolved.splitlines() if "eval_every_epochs" in line)
    assert line.startswith("  eval_every_epochs: 0.5  # ")
    assert line.endswith(f": every {half} steps")
    assert load_recipe(run / "recipe.resolved.yaml").recipe == load_recipe(recipe).recipe


def test_trackers_are_told_project_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"WANDB_PROJECT": "of the shell"})
    mark(tmp_path, "run")
    continue_record(RunFolder(tmp_path), OutputOptions())
    assert os.environ["WANDB_PROJECT"] == "of the shell"
    output = OutputOptions(report_to=["wandb", "clearml"], project="mine", run_name="first")
    continue_record(RunFolder(tmp_path), output)
    assert {os.environ[name] for name in PROJECTS} == {"mine"}
    assert os.environ["CLEARML_TASK"] == "first"


def test_the_arguments_of_a_run_hold_project_name_and_periods(tmp_path: Path) -> None:
    arguments = training_arguments(
        OptimizerOptions(), OutputOptions(save_every_steps=None, save_every_epochs=0.5, project="mine"),
        name="first", periods={"save_every_epochs": 12}, staging=tmp_path, num_steps=50, micro_batch=1, accumulation=1,
        evaluates=True, deepspeed_bf16=False, shards_weights=False, seed=1, on_gpu=False,
    )  # fmt: skip
    assert (arguments.project, arguments.run_name) == ("mine", "first")
    assert (arguments.save_steps, arguments.eval_steps) == (12, 100)
