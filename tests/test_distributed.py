"""Two real ranks on a CPU end with the losses of one process, under DDP and under DeepSpeed ZeRO-2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, final_weights, loss_history, train, write_recipe

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def losses(run: Path) -> list[float]:
    return [row[1] for row in loss_history(run)]


@pytest.mark.parametrize(
    ("launch", "kind"),
    [
        ("cpu-2", "full"),
        pytest.param("cpu-2", "lora", marks=pytest.mark.slow),
        pytest.param("zero1", "full", marks=pytest.mark.slow),
        pytest.param("zero2", "full", marks=pytest.mark.slow),
        pytest.param("zero2", "lora", marks=pytest.mark.soak),
        pytest.param("zero2-offload", "full", marks=pytest.mark.slow),
        pytest.param("zero3-offload", "full", marks=pytest.mark.soak),
    ],
)
def test_two_ranks_train_like_one_process(tmp_path: Path, launch: str, kind: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        tuning=LORA if kind == "lora" else {},
        optimizer={"max_steps": 6},
        batch={"micro_batch": 1},
        output={"save_every_steps": 3},
    )
    run = tmp_path / "run"
    alone = train(recipe)
    assert alone.returncode == 0, alone.stderr
    shutil.move(run, tmp_path / "alone")

    together = train(recipe, launch=f"launch/{launch}.yaml")
    assert together.returncode == 0, together.stderr
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    manifest = json.loads((run / "checkpoints" / "step-6" / "manifest.json").read_text())
    assert manifest["facts"]["run"]["number of ranks"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    assert final_weights(run).keys() == final_weights(tmp_path / "alone").keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "kind"),
    [("cpu-2", "full"), ("zero1", "full"), ("zero2", "full"), ("zero2", "lora"), ("zero2-offload", "full")],
)
def test_each_rank_holds_what_the_plan_says(tmp_path: Path, launch: str, kind: str) -> None:
    """Parameters, gradients with DDP's and DeepSpeed's buckets, and optimizer states, to the byte."""
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    tuning = LORA if kind == "lora" else {}
    recipe = write_recipe(tmp_path, model, tuning=tuning, batch={"micro_batch": 1}, optimizer={"max_steps": 2})
    held = tmp_path / "held"
    held.mkdir()
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"launch/{launch}.yaml"]
    command = [sys.executable, *launcher, "tests/held.py", str(held), str(recipe)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    terms = plan["phases"]["train_step"]["terms"]
    host_bytes = plan["host_bytes"] // plan["gpus"] - plan["peak_bytes"]  # beside what a GPU would hold
    planned = {
        "weights": terms["weights"] + terms["adapters"],
        "gradients": terms["gradients"],
        "optimizer": terms["optimizer"],
    }
    for rank in (0, 1):
        found = json.loads((held / f"{rank}.json").read_text())
        host = found.pop("host")
        assert host <= host_bytes <= 1.3 * host  # blocks of pinned memory are rounded up
        assert found == planned
