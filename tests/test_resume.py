"""Killed anywhere and started again with the same command, a run ends bit-identical to one that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import KILLED, final_weights, loss_history, train, write_recipe

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full-packed-qwen3": ("qwen3", {"batch": {"micro_batch": 4}}),
    "full-moe-accumulated": ("qwen3_moe", {"data": {"packing": False}, "batch": {"micro_batch": 1}}),
    "lora-dropout-qwen2": ("qwen2", {"tuning": LORA, "data": {"packing": False}, "batch": {"micro_batch": 4}}),
    "lora-packed-accumulated-qwen3": ("qwen3", {"tuning": LORA, "batch": {"micro_batch": 1}}),
    "qlora-dropout-qwen3": ("qwen3", {"tuning": {**LORA, "kind": "qlora"}, "batch": {"micro_batch": 2}}),
    "qlora-accumulated-qwen2": (
        "qwen2",
        {"tuning": {**LORA, "kind": "qlora"}, "data": {"packing": False, "eval_fraction": 0.1},
         "batch": {"micro_batch": 1}, "output": {"eval_every_steps": 7, "log_every_steps": 1}},
    ),
}  # fmt: skip
FAST = "lora-dropout-qwen2"


@pytest.mark.fault("A01 E34", "killed and started again: the same weights and losses, bit for bit")
@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in CASES])
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, case: str) -> None:
    model_type, sections = CASES[case]
    model = add_weights(write_checkpoint(tmp_path / "model", model_type))
    recipe = write_recipe(tmp_path, model, **sections)
    run = tmp_path / "run"

    finished = train(recipe)
    assert finished.returncode == 0, finished.stderr
    undisturbed = tmp_path / "undisturbed"
    shutil.move(run, undisturbed)

    assert train(recipe, kill_at=25).returncode == KILLED
    assert len(loss_history(run)) == 25
    resumed = train(recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {run} from step 20" in resumed.stderr

    history = loss_history(run)
    assert [row[0] for row in history] == list(range(1, 41))
    assert history == loss_history(undisturbed)
    assert final_weights(run) == final_weights(undisturbed)

    if case != FAST:
        return
    again = train(recipe)
    assert (again.returncode, "already complete" in again.stderr) == (0, True)
