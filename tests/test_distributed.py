"""Two real ranks on a CPU end with the losses of one process, under DDP and under DeepSpeed ZeRO-2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import final_weights, loss_history, train, write_recipe

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def losses(run: Path) -> list[float]:
    return [row[1] for row in loss_history(run)]


@pytest.mark.parametrize(
    ("launch", "kind"),
    [
        ("cpu-2", "full"),
        pytest.param("cpu-2", "lora", marks=pytest.mark.slow),
        pytest.param("cpu-zero2", "full", marks=pytest.mark.slow),
        pytest.param("cpu-zero2", "lora", marks=pytest.mark.soak),
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
