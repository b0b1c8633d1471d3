"""Training runs as real processes, and what they left behind."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.dialogues import random_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
KILLED = -signal.SIGKILL
LONGEST_SECONDS = 600  # that a command may take, also beside others
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
    longest: float = LONGEST_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Trains in a process of its own, killed with kill -9 after step `kill_at`; under accelerate with a launch file.

    FSDP2 really shards.
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
    return subprocess.run(
        [*command, str(recipe), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=longest,
        check=False,
    )


def in_a_fork(module: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE` in a folder, without a terminal, as a fork of this process: what is imported already is there.

    It begins with what the tests before it have imported, so it shows nothing of what a command imports.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        child = os.fork()
        if child == 0:
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno())):
                os.dup2(file, number)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
            )
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LONGEST_SECONDS)
            os.chdir(folder)
            os.environ.update(ENVIRONMENT | environment)
            sys.argv = [module, *arguments]
            os._exit(code_of(partial(runpy.run_module, module, run_name="__main__")))
        _, status = os.waitpid(child, 0)
        stdout.seek(0)
        stderr.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess([module, *arguments], code, stdout.read(), stderr.read())


def code_of(program: Callable[[], object]) -> int:
    """The code with which Python ends after a program, once all that it said is written."""
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


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
