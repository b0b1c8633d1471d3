"""Two ranks under `qwentune train`: they stop together, and a lost one is named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, train, write_recipe

pytestmark = pytest.mark.slow

# The supervisor with the launch file and the number of processes of two ranks on a CPU.
SUPERVISE = """
import sys
from pathlib import Path
from qwentune.supervise import supervise
sys.exit(supervise(sys.argv[1:], Path("launch/cpu-2.yaml"), 2))
"""


def started(recipe: Path, run: Path) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
    """The supervisor, and the training processes by rank, once the first step is done."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(recipe)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "qwentune.train" in child.cmdline() and "RANK" in child.environ():
            ranks[int(child.environ()["RANK"])] = child
    assert ranks.keys() == {0, 1}
    return process, ranks


def recipe_of_many_steps(folder: Path) -> Path:
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    return write_recipe(
        folder, model, optimizer={"max_steps": 2000}, batch={"micro_batch": 1}, output={"save_every_steps": 10_000}
    )


def test_a_signal_to_the_supervisor_stops_both_ranks_at_one_step(tmp_path: Path) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert not [rank for rank in ranks.values() if rank.is_running()]
    step = json.loads((run / "status.json").read_text())["step"]
    files = {path.name for path in (run / "checkpoints" / f"step-{step}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files

    resumed = train(recipe, f"optimizer.max_steps={step + 2}", "--allow-change", "optimizer.max_steps",
                    launch="launch/cpu-2.yaml")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {step}" in resumed.stderr


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_and_the_other_is_gone_soon(tmp_path: Path, lost: int) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    ranks[lost].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    assert f"Lost rank {lost}: ended without a word" in errors
    assert not [rank for rank in ranks.values() if rank.is_running()]


def test_no_trainer_is_left_where_the_launcher_alone_is_killed(tmp_path: Path) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    launcher = psutil.Process(process.pid).children()[0]
    launcher.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "launcher was killed" in errors
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=30)
    assert not alive
