"""Killed with kill -9 at any moment and started again by the same command, a run ends like one that nobody touched.

Under any tuning at a known step; then in a loop at random moments until the run is done. A third of the kills of the
loop come at a random moment of the first seconds of a process, a third within ten steps of the moment at which it
resumed, a third in a save.
`-m soak` kills a hundred times for each kind of tuning, with one process and with two.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, KILL_AT, KILLED, final_weights, last_states, loss_history, write_recipe
from tests.warm import Warm

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"tuning": LORA, "precision": {"weights": "bf16", "adapters": "bf16"}},
    "lora-fp32": {"tuning": LORA, "precision": {"weights": "bf16", "adapters": "fp32"}},
    "qlora": {"tuning": {**LORA, "kind": "qlora"}},
    "full": {"precision": {"weights": "bf16"}},
    "full-8bit": {"precision": {"weights": "bf16", "optimizer_state": "8bit"}},
    "evaluated": {
        "tuning": LORA, "data": {"eval_fraction": 0.1},
        "output": {"eval_every_steps": 3, "best": "loss", "early_stopping": 10**6},
    },
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full-packed-qwen3": ("qwen3", {"batch": {"micro_batch": 4}}),
    "full-moe-accumulated": ("qwen3_moe", {"data": {"packing": False}, "batch": {"micro_batch": 1}}),
    "full-bf16-qwen3": ("qwen3", {"precision": {"weights": "bf16"}, "batch": {"micro_batch": 1}}),
    "lora-dropout-qwen2": ("qwen2", {"tuning": LORA, "data": {"packing": False}, "batch": {"micro_batch": 4}}),
    "lora-fp32-on-bf16-qwen3": ("qwen3", {**KINDS["lora-fp32"], "batch": {"micro_batch": 2}}),
    "lora-packed-accumulated-qwen3": ("qwen3", {"tuning": LORA, "batch": {"micro_batch": 1}}),
    "qlora-dropout-qwen3": ("qwen3", {"tuning": {**LORA, "kind": "qlora"}, "batch": {"micro_batch": 2}}),
    "qlora-accumulated-qwen2": (
        "qwen2",
        {"tuning": {**LORA, "kind": "qlora"}, "data": {"packing": False, "eval_fraction": 0.1},
         "batch": {"micro_batch": 1}, "output": {"eval_every_steps": 7, "log_every_steps": 1}},
    ),
}  # fmt: skip
FAST = "lora-dropout-qwen2"
LAUNCH = {1: None, 2: "launch/cpu-2.yaml"}
MOST_STEPS = 10.0
LONGEST_SAVE_SECONDS = 0.2
# Writes the rows of every step, as the run takes them, to the file that the environment names.
TRAIN_AND_TELL = """
import json, os, sys
from qwentune import console, train
from qwentune.training.trainer import ExactResume
log = ExactResume.log
def log_and_tell(self, logs, start_time=None):
    log(self, logs, start_time)
    step = self.state.global_step
    if "loss" in logs and os.environ.get("RANK", "0") == "0":
        with open(os.environ["ORDER"], "a") as file:
            file.write(json.dumps([step, self.batches.schedule.rows(step - 1), self.batches.sources(step - 1)]) + "\\n")
ExactResume.log = log_and_tell
console.main(train.train)
"""


@pytest.mark.fault("A01 E34", "killed and started again: the same weights and losses, bit for bit")
@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in CASES])
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, warm: Warm, case: str) -> None:
    model_type, sections = CASES[case]
    model = add_weights(write_checkpoint(tmp_path / "model", model_type))
    recipe = write_recipe(tmp_path, model, **sections)
    run = tmp_path / "run"

    finished = warm.train(recipe)
    assert finished.code == 0, finished.said
    undisturbed = tmp_path / "undisturbed"
    shutil.move(run, undisturbed)

    assert warm.train(recipe, code=KILL_AT, given=["25"]).code == KILLED
    assert len(loss_history(run)) == 25
    resumed = warm.train(recipe)
    assert resumed.code == 0, resumed.said
    assert f"resuming {run} from step 20" in resumed.said

    history = loss_history(run)
    assert [row[0] for row in history] == list(range(1, 41))
    assert history == loss_history(undisturbed)
    assert final_weights(run) == final_weights(undisturbed)
    assert last_states(run) == last_states(undisturbed) != {}

    if case != FAST:
        return
    again = warm.train(recipe)
    assert (again.code, "already complete" in again.said) == (0, True)


class Attempt(ABC):
    """A start of a run, whose lines can be waited for and which can be killed as a whole."""

    longest_start_seconds: float

    @property
    @abstractmethod
    def said(self) -> str:
        """What it has written to stderr."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether it ended by itself."""

    @abstractmethod
    def wait(self) -> int:
        """The exit code where it is left alone."""

    @abstractmethod
    def kill(self) -> None:
        """Kill -9 for every process, at once; returns when all are gone."""

    def runs_until(self, *, seconds: float, steps: float) -> bool:
        """Waits for so many seconds or for so many steps from the first one on; False where it ended before.

        A fraction of a step is that fraction of a twentieth of a second.
        """
        deadline = time.monotonic() + seconds
        while self.said.count("\nstep ") < int(steps) and time.monotonic() < deadline:
            if self.has_ended():
                return False
            time.sleep(0.01)
        time.sleep(min(steps % 1 / 20, max(0.0, deadline - time.monotonic())))
        return True

    def resumes(self) -> bool:
        """Waits for the line that says where the run goes on; False where it ended before."""
        return self._until(lambda: "\nresuming " in f"\n{self.said}")

    def saves(self, run: Path) -> bool:
        """Waits until a checkpoint begins to be written; False where it ended before."""
        return self._until(lambda: any((run / "checkpoints").glob(".saving-*")))

    def _until(self, happens: Callable[[], bool]) -> bool:
        while not happens():
            if self.has_ended():
                return False
            time.sleep(0.005)
        return True


class ColdAttempt(Attempt):
    """Processes in a session of their own, under accelerate where they are two."""

    longest_start_seconds = 12.0

    def __init__(self, recipe: Path, ranks: int, order: Path) -> None:
        script = recipe.with_name("train_and_tell.py")
        script.write_text(TRAIN_AND_TELL)
        self.errors = recipe.with_name(f"errors-{len(list(recipe.parent.glob('errors-*')))}.txt")
        command = [sys.executable, str(script), str(recipe)]
        if (launch := LAUNCH[ranks]) is not None:
            head = ["-m", "accelerate.commands.launch", "--config_file", launch, "--main_process_port", "0"]
            command = [sys.executable, *head, str(script), str(recipe)]
        environment = ENVIRONMENT | {"ORDER": str(order)}
        with self.errors.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stderr=file, start_new_session=True)
        self.tree = psutil.Process(self.process.pid)

    @property
    def said(self) -> str:
        return self.errors.read_text()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> int:
        return self.process.wait(timeout=900)

    def kill(self) -> None:
        try:
            family = [self.tree, *self.tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=120)


class WarmAttempt(Attempt):
    """Each rank forked from a process that has imported everything, so that a hundred kills take minutes."""

    longest_start_seconds = 4.0

    def __init__(self, recipe: Path, warm: Sequence[Warm], order: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {"WORLD_SIZE": str(len(warm)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [{"RANK": str(k), "LOCAL_RANK": str(k), **ranks} if len(warm) > 1 else {} for k in range(len(warm))]
        self.runs = [
            server.start(recipe, code=TRAIN_AND_TELL, ORDER=str(order), **place)
            for server, place in zip(warm, places, strict=True)
        ]

    @property
    def said(self) -> str:
        return self.runs[0].said

    def has_ended(self) -> bool:
        return any(not psutil.pid_exists(run.pid) for run in self.runs)

    def wait(self) -> int:
        return max(run.wait(900) for run in self.runs)

    def kill(self) -> None:
        for run in self.runs:
            with suppress(ProcessLookupError):
                run.signal(signal.SIGKILL)
        for run in self.runs:
            run.wait()


def order_of(file: Path) -> list[list[object]]:
    """The rows of each step; a step that was done twice must have had the same rows both times."""
    steps: dict[int, list[object]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert steps.setdefault(row[0], row) == row, f"step {row[0]} was done again with other rows"
    return [steps[step] for step in sorted(steps)]


def evaluations_of(run: Path) -> str:
    """What the evaluations of a run gave, in their order."""
    file = run / "evaluations.jsonl"
    return file.read_text() if file.exists() else ""


def kill_until_done(
    folder: Path,
    kind: dict[str, Any],
    kills: int,
    start: Callable[[Path, Path], Attempt],
    model: Path | None = None,
) -> None:
    """`start` begins an attempt at a recipe whose order of rows goes to a file; without a model, at a tiny Qwen3.

    `kind` has sections of the recipe.
    """
    seed = int(os.environ.get("SEED", random.randrange(10_000)))
    model = model or add_weights(write_checkpoint(folder / "model", "qwen3"))
    sections: dict[str, dict[str, Any]] = {
        "optimizer": {"max_steps": 2 * kills * int(MOST_STEPS + 1)}, "data": {"max_tokens": 256},
        "batch": {"sequences_per_step": 2, "micro_batch": 1}, "output": {"save_every_steps": 5},
    }  # fmt: skip
    recipe = write_recipe(
        folder,
        model,
        **{name: {**sections.get(name, {}), **kind.get(name, {})} for name in dict.fromkeys([*kind, *sections])},
    )
    run, chance = folder / "run", random.Random(seed)
    print(f"seed {seed}")

    undisturbed = start(recipe, folder / "order.jsonl")
    assert undisturbed.wait() == 0, undisturbed.said
    expected = loss_history(run), final_weights(run), order_of(folder / "order.jsonl"), last_states(run)
    evaluations = evaluations_of(run)
    assert expected[3]
    run.rename(folder / "undisturbed")

    order, moments, in_saves = folder / "order-killed.jsonl", [], 0
    for number in range(kills):
        attempt = start(recipe, order)
        seconds, steps = chance.uniform(0, attempt.longest_start_seconds), chance.uniform(0, MOST_STEPS)
        if number == 0:  # the first leaves a checkpoint, so that there is something to resume from
            steps = MOST_STEPS - 2
            goes_on, moment = attempt.runs_until(seconds=60, steps=steps), f"{steps:.1f} steps"
        elif number % 3 == 0:
            goes_on, moment = attempt.runs_until(seconds=seconds, steps=MOST_STEPS), f"{seconds:.1f} s"
        elif number % 3 == 1:
            goes_on = attempt.resumes() and attempt.runs_until(seconds=60, steps=steps)
            moment = f"{steps:.1f} steps"
        else:
            goes_on, wait = attempt.resumes() and attempt.saves(run), chance.uniform(0, LONGEST_SAVE_SECONDS)
            time.sleep(wait)
            moment = f"{wait:.3f} s of a save"
        attempt.kill()
        assert goes_on, f"it ended by itself before kill {number + 1}: {attempt.said}"
        moments.append(moment)
        in_saves += any((run / "checkpoints").glob(".[st]*"))  # .saving-, .trash-
    print(f"killed {in_saves} times in a save; after {', '.join(moments)}")

    last = start(recipe, order)
    assert last.wait() == 0, last.said
    assert "resuming" in last.said
    assert loss_history(run) == expected[0]
    assert final_weights(run) == expected[1]
    assert last_states(run) == expected[3]
    assert order_of(order) == expected[2]
    assert evaluations_of(run) == evaluations


@pytest.mark.fault("A01 A08 E35", "the same weights, losses and order of rows, bit for bit")
@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path, warm: Warm) -> None:
    kill_until_done(tmp_path, KINDS["lora"], 10, lambda recipe, order: WarmAttempt(recipe, [warm], order))


@pytest.mark.fault("A01 A02 A08 E36", "two ranks, packed rows, evaluations, the best step: the same, bit for bit")
@pytest.mark.slow
def test_six_kills_of_two_ranks_that_evaluate_change_nothing(tmp_path: Path) -> None:
    kill_warm(tmp_path, KINDS["evaluated"], kills=6, ranks=2)


@pytest.mark.fault("A01 A08 E35", "the same weights, losses and order of rows, bit for bit")
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kills_at_random_moments_change_nothing(tmp_path: Path, kind: str, ranks: int) -> None:
    """COLD=1 starts every process anew, as a user does, and takes five times as long."""
    if "COLD" in os.environ:
        kill_until_done(tmp_path, KINDS[kind], 100, lambda recipe, order: ColdAttempt(recipe, ranks, order))
        return
    kill_warm(tmp_path, KINDS[kind], kills=100, ranks=ranks)


def kill_warm(folder: Path, kind: dict[str, Any], *, kills: int, ranks: int, model: Path | None = None) -> None:
    servers = [Warm() for _ in range(ranks)]
    try:
        kill_until_done(folder, kind, kills, lambda recipe, order: WarmAttempt(recipe, servers, order), model)
    finally:
        for server in servers:
            server.close()
