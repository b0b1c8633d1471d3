"""Two real ranks on a CPU end with the losses of one process, and hold what the plan says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, final_weights, loss_history, write_recipe
from tests.warm import Warm

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
HELD = "import runpy; runpy.run_module('tests.held', run_name='__main__')"


def losses(run: Path) -> list[float]:
    return [row[1] for row in loss_history(run)]


@pytest.mark.parametrize(
    ("launch", "kind"),
    [
        ("cpu-2", "full"),
        pytest.param("cpu-2", "lora", marks=pytest.mark.slow),
        pytest.param("zero1", "full", marks=pytest.mark.slow),
        pytest.param("zero2", "full", marks=pytest.mark.slow),
        pytest.param("zero2", "lora", marks=pytest.mark.slow),
        pytest.param("zero2-offload", "full", marks=pytest.mark.slow),
        pytest.param("zero3-offload", "full", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_like_one_process(tmp_path: Path, warm: Warm, launch: str, kind: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        tuning=LORA if kind == "lora" else {},
        optimizer={"max_steps": 6},
        batch={"micro_batch": 1},
        output={"save_every_steps": 3},
    )
    run, held = tmp_path / "run", tmp_path / "held"
    held.mkdir()
    alone = warm.train(recipe)
    assert alone.code == 0, alone.said
    shutil.move(run, tmp_path / "alone")

    together = warm.train(recipe, code=HELD, given=[str(held)], launch=launch)
    assert together.code == 0, together.said
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    manifest = json.loads((run / "checkpoints" / "step-6" / "manifest.json").read_text())
    assert manifest["facts"]["run"]["ranks"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    assert final_weights(run).keys() == final_weights(tmp_path / "alone").keys()
    if launch != "zero3-offload":  # whose tensors come and go
        for rank in (0, 1):
            holds_what_is_planned(
                json.loads((held / f"{rank}.json").read_text()), json.loads((run / "plan.json").read_text())
            )


@pytest.mark.slow
def test_two_ranks_can_be_the_first_to_train_a_built_in_model(tmp_path: Path) -> None:
    """Nothing is in the cache: rank 0 alone writes the model's weights, and both train them."""
    environment = {**ENVIRONMENT, "QWENTUNE_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "run"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/cpu-2.yaml", "-m", "qwentune.train"]
    overrides = [f"output.dir={run}", "optimizer.max_steps=2", "output.save_every_steps=2"]
    command = [sys.executable, *launcher, "recipes/quickstart.yaml", *overrides]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(losses(run)) == 2
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert final_weights(run)


def holds_what_is_planned(held: dict[str, int], plan: dict[str, Any]) -> None:
    """Parameters, gradients with DDP's and DeepSpeed's buckets, and optimizer states, to the byte."""
    terms = plan["phases"]["train_step"]["terms"]
    assert held["weights"] == terms["weights"] + terms["adapters"]
    assert held["gradients"] == terms["gradients"]
    assert held["optimizer"] == terms["optimizer"]
    # Beside what a GPU would hold; one process alone merges.
    trained = max(phase["total"] for name, phase in plan["phases"].items() if name != "merge")
    offloaded = plan["host_bytes"] // plan["gpus"] - trained
    # Blocks of pinned memory are rounded up, and a step of the optimizer takes some for a moment.
    assert held["host"] <= offloaded <= 1.4 * held["host"]
