"""Training runs as real processes, and what they left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.dialogues import random_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
KILLED = -signal.SIGKILL
# Kills the process right after the metrics of a step are written: the worst place, for what is known is not yet saved.
KILL_AT = """
import os, signal, sys
from qwentune import console, train
from qwentune.training.progress import Recorder
logged, last = Recorder.logged, int(sys.argv.pop(1))
def logged_then_killed(self, row):
    logged(self, row)
    if row["step"] == last:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.logged = logged_then_killed
console.main(train.train)
"""
# accelerate is told to shard on a CPU.
FSDP2 = "from tests.fsdp2 import pretend; pretend()\n"


def write_recipe(folder: Path, model: Path | str, **sections: Any) -> Path:
    """A recipe for a short run on generated dialogues; `sections` are laid over it."""
    data = folder / "rows.jsonl"
    if not data.exists():
        rows = random_rows(3, 60, hostile=False, lists=False)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "model": str(model),
        "tuning": {"kind": "full"},
        "data": {"train": str(data), "max_tokens": 512, "max_dropped_fraction": 0.9},
        "batch": {"sequences_per_step": 4},
        "optimizer": {"max_steps": 40, "learning_rate": 1e-3},
        "output": {"dir": str(folder / "run"), "save_every_steps": 10},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(
    recipe: Path,
    *arguments: str,
    kill_at: int | None = None,
    launch: str | None = None,
    largest_file_bytes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Trains in a process of its own, killed with kill -9 after step `kill_at`; under accelerate with a launch file.

    With `largest_file_bytes` a larger file cannot be written, as on a full disk. FSDP2 really shards.
    """
    module = ["-m", "qwentune.train"]
    shards = launch is not None and Path(launch).stem == "fsdp2"
    if kill_at is not None:
        script = recipe.parent / "kill_at.py"
        script.write_text(FSDP2 + KILL_AT if shards else KILL_AT)
        module = [str(script), str(kill_at)]
    elif shards:
        module = ["tests/fsdp2.py"]
    launcher = [] if launch is None else ["-m", "accelerate.commands.launch", "--config_file", launch]
    command = [sys.executable, *launcher, *module]
    limit = None
    if largest_file_bytes is not None:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    return subprocess.run(
        [*command, str(recipe), *arguments],
        env=ENVIRONMENT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def loss_history(run: Path) -> list[tuple[float, ...]]:
    """What must not differ between two equal runs, per logged step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple(row[key] for key in ("step", "loss", "learning_rate", "grad_norm", "update_ratio", "tokens"))
        for row in rows
    ]


def last_states(run: Path) -> dict[str, bytes]:
    """What the optimizer holds at the end, exact values and moments, file by file."""
    folder = run / (run / "latest").read_text().strip()
    names = ("optimizer*.pt", "*_optim_states.pt")  # the second by DeepSpeed
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.rglob(name))}


def final_weights(run: Path) -> dict[str, bytes]:
    """The trained weights, file by file."""
    folder = run / ("adapter" if (run / "adapter").exists() else "model")
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
