"""Signals at every moment: saved at the next step, or ended at once where nothing is lost; the right exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, final_weights, loss_history, write_recipe
from tests.warm import PAUSED, TRAIN, Warm

pytestmark = pytest.mark.slow

# Sends a signal to itself when a function of the trainer is called for the second time, and goes on.
SIGNAL_IN = """
import os, sys
from importlib import import_module
from qwentune import console, train
place, name, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
module, _, owner = place.partition(":")
target = import_module(module)
target = getattr(target, owner) if owner else target
real, calls = getattr(target, name), []
def signalled(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    return real(*args, **kwargs)
setattr(target, name, signalled)
console.main(train.train)
"""
SIGNAL_AT_THE_START = """
import os, signal
from qwentune.training.run_folder import RunFolder
add_event = RunFolder.add_event
def added_then_signalled(self, event, *args, **kwargs):
    add_event(self, event, *args, **kwargs)
    if event == "start":
        os.kill(os.getpid(), signal.SIGTERM)
RunFolder.add_event = added_then_signalled
"""
MOMENTS = {
    "a save": ("qwentune.training.checkpoints:Checkpoints", "publish"),
    "an evaluation": ("qwentune.training.trainer:ExactResume", "evaluate"),
    "the loading of a batch": ("qwentune.data.layout.batch:TrainBatches", "__getitem__"),
    "the backward pass": ("qwentune.training.trainer:ExactResume", "training_step"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with evaluations and saves."""
    folder = tmp_path_factory.mktemp("signals")
    model = add_weights(write_checkpoint(folder / "model", "qwen2"))
    return write_recipe(
        folder, model, data={"eval_fraction": 0.1, "max_tokens": 256}, optimizer={"max_steps": 12},
        output={"save_every_steps": 3, "eval_every_steps": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, warm: Warm) -> tuple[object, object]:
    """The losses and weights of the run that nobody signalled."""
    run = recipe.parent / "run"
    assert warm.train(recipe).code == 0
    result = loss_history(run), final_weights(run)
    run.rename(recipe.parent / "undisturbed")
    return result


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


@pytest.mark.fault("D25 D26", "two SIGTERMs in a save, an evaluation or a step: one whole checkpoint, exit 75")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_with_one_whole_checkpoint(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path, moment: str
) -> None:
    run = tmp_path / "run"
    place, name = MOMENTS[moment]
    stopped = warm.train(
        recipe, f"output.dir={run}", code=SIGNAL_IN, given=[place, name, str(int(signal.SIGTERM))]
    )  # fmt: skip
    assert stopped.code == 75, stopped.said
    step = status(run)["step"]
    assert status(run)["state"] == "preempted"
    assert (run / "latest").read_text() == f"checkpoints/step-{step}\n"
    assert not list((run / "checkpoints").glob(".*"))

    assert warm.train(recipe, f"output.dir={run}").code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed


@pytest.mark.fault("D28", "SIGUSR1 (Slurm), SIGHUP (ssh drop): saved, exit 75; SIGSTOP and SIGCONT change nothing")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_the_signals_of_slurm_and_of_a_lost_terminal_save(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    started = warm.start(recipe, f"output.dir={run}", code=PAUSED + TRAIN)
    started.pauses()
    started.signal(number)
    started.signal(signal.SIGCONT)
    assert started.wait() == 75, started.said
    assert status(run)["exit"] == 75

    again = warm.train(recipe, f"output.dir={run}")
    assert (again.code, loss_history(run), final_weights(run)) == (0, *undisturbed)


@pytest.mark.fault("D27", "once: saved, the command that goes on is printed, exit 130; twice: ended at once, exit 130")
def test_one_ctrl_c_saves_and_two_end_at_once(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = warm.start(recipe, f"output.dir={run}", code=PAUSED + TRAIN)
    started.pauses()
    started.signal(signal.SIGINT)
    started.signal(signal.SIGCONT)
    assert started.wait() == 130, started.said
    assert status(run)["state"] == "interrupted"
    assert "continue with: qwentune train " in started.said

    impatient = warm.train(
        recipe, f"output.dir={run}", code=SIGNAL_IN,
        given=["qwentune.training.trainer:ExactResume", "training_step", str(int(signal.SIGINT))],
    )  # fmt: skip
    assert impatient.code == 130
    assert "saved step" not in impatient.said

    assert warm.train(recipe, f"output.dir={run}").code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed


@pytest.mark.fault("D23", "a signal while the model is loaded: nothing is lost, exit 75, status.json says preempted")
def test_a_signal_before_the_first_step_is_in_the_status(recipe: Path, warm: Warm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = warm.start(recipe, f"output.dir={run}")
    started.until((run / "status.json").exists)
    started.signal(signal.SIGTERM)
    assert started.wait() == 75, started.said
    assert (status(run)["state"], status(run)["exit"]) == ("preempted", 75)
    assert not started.said.count("bug")


def test_a_signal_as_soon_as_a_run_says_that_it_runs_is_in_the_status(recipe: Path, warm: Warm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = warm.train(recipe, f"output.dir={run}", code=SIGNAL_AT_THE_START + TRAIN)
    assert ended.code == 75, ended.said
    assert (status(run)["state"], status(run)["exit"]) == ("preempted", 75)


@pytest.mark.fault("D28", "a terminal that is gone: the run goes on, its words are in log.txt")
def test_a_run_whose_screen_is_gone_goes_on(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    blind = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2); " + TRAIN
    assert warm.train(recipe, f"output.dir={run}", code=blind).code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed
    said = (run / "log.txt").read_text()
    assert "step 12/12" in said
    assert "done: " in said


@pytest.mark.fault("D28", "the shell that started a run under nohup ends: the run goes on")
def test_a_run_outlives_the_shell_that_started_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = f"nohup {sys.executable} -m qwentune.train {recipe} output.dir={run} optimizer.max_steps=300"
    shell = f"{train} >/dev/null 2>&1 & while [ ! -e {run}/metrics.jsonl ]; do sleep 0.05; done"
    subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, check=True, timeout=300)
    deadline = time.monotonic() + 300
    while status(run)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (status(run)["state"], status(run)["step"]) == ("finished", 300)


@pytest.mark.fault("D23", "a signal while `qwentune train` still plans: nothing was begun, exit 75")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_a_supervisor_that_still_plans(number: int, code: int) -> None:
    plans = f"""
import os
from qwentune import console, supervise
supervise.run = lambda *arguments: os.kill(os.getpid(), {int(number)})
console.main(supervise.train)
"""
    ended = subprocess.run(
        [sys.executable, "-c", plans, "recipe.yaml"], env=ENVIRONMENT, capture_output=True, check=False
    )
    assert ended.returncode == code, ended.stderr
