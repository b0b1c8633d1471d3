"""Killed at any file operation of a save, the run still has a whole checkpoint, and the next start cleans up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from qwentune.training.checkpoints import MANIFEST, Checkpoints
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import KILL_AT, KILLED, final_weights, loss_history, write_recipe
from tests.warm import TRAIN, Warm

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # that Python announces to an audit hook


def write_files(checkpoints: Checkpoints, step: int) -> Path:
    checkpoints.begin(step)
    written = checkpoints.staging(step) / f"checkpoint-{step}"
    (written / "shards").mkdir(parents=True)
    (written / "model.safetensors").write_text(f"weights {step}")
    (written / "shards" / "rank0").write_text(f"state {step}")
    return written


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.publish(write_files(checkpoints, step), step, {"run": {}})


def die_at(operation: int) -> None:
    """Kills this process before its file operation number `operation`, fsync among them."""
    numbers = count()

    def operate() -> None:
        if next(numbers) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS:
            operate()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        operate()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(audit)


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Does something in a child that is killed before file operation `operation`; whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at(operation)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


def crash_points(folder: Path) -> Iterator[Checkpoints]:
    """A run folder for every file operation of a save of step 40, killed there; 10 to 30 were saved before."""
    for operation in range(1000):
        checkpoints = Checkpoints(folder / str(operation), keep=2)
        checkpoints.folder.mkdir(parents=True)
        for step in (10, 20, 30):
            save(checkpoints, step)
        if not killed_at(operation, lambda: save(checkpoints, 40)):  # noqa: B023 - runs at once
            return
        yield checkpoints


@pytest.mark.fault("A02 A03 A04 A05", "the old checkpoint or the new one, whole; leftovers are swept at the next start")
def test_a_save_killed_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    steps: list[int] = []
    for checkpoints in crash_points(tmp_path):
        newest, skipped = checkpoints.newest()
        assert newest is not None
        assert not skipped, "a half-written checkpoint is never offered"
        steps.append(newest.step)

        checkpoints.sweep()
        names = {path.name for path in checkpoints.folder.iterdir()}
        assert all(name.startswith("step-") for name in names)
        assert (checkpoints.run / "latest").read_text() == f"checkpoints/step-{newest.step}\n"
        assert f"step-{30 if newest.step == 30 else 40}" in names
        assert (newest.folder / "model.safetensors").read_text() == f"weights {newest.step}"

        checkpoints.publish(write_files(checkpoints, 40), 40, {"run": {}})  # the resumed run comes by here again
        assert {path.name for path in checkpoints.folder.iterdir()} == {"step-30", "step-40"}
    assert len(steps) >= 30, len(steps)
    assert steps == sorted(steps), "once the new checkpoint is there it stays"
    assert {30, 40} == set(steps)


@pytest.mark.fault("A09", "the checkpoint with empty files is passed over, the one before it is taken")
def test_files_that_a_power_cut_left_empty_are_not_trusted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (10, 20):
        checkpoints.publish(write_files(checkpoints, step), step, {"run": {}})
    for file in checkpoints.published(20).rglob("*"):
        if file.is_file() and file.name != MANIFEST:
            file.write_bytes(b"")
    newest, skipped = checkpoints.newest()
    assert newest is not None
    assert (newest.step, len(skipped)) == (10, 1)


@pytest.mark.fault("C19", "a quota that stops a save: exit 4 with the reason, nothing half-written stays")
@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_reason_and_the_same_command_goes_on(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 12})
    run = tmp_path / "run"
    assert warm.train(recipe).code == 0
    undisturbed = loss_history(run), final_weights(run)
    run.rename(tmp_path / "undisturbed")

    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"  # below the weights
    full = warm.train(recipe, code=limited + TRAIN)
    assert full.code == 4, full.said
    assert "step 10 could not be saved" in full.said
    assert "Traceback" not in full.said
    assert not list((run / "checkpoints").iterdir())

    assert warm.train(recipe).code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed


@pytest.mark.fault("B14", "no checkpoint verifies: each with its reason, exit 5; --fresh moves the folder aside")
@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_with_each_reason(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model)
    run = tmp_path / "run"
    assert warm.train(recipe, code=KILL_AT, given=["25"]).code == KILLED
    for folder in (run / "checkpoints").iterdir():
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    refused = warm.train(recipe)
    assert refused.code == 5
    for step in (10, 20):
        assert f"step-{step}/model.safetensors" in refused.said
    assert "--fresh" in refused.said

    anew = warm.train(recipe, "--fresh", "optimizer.max_steps=2")
    assert anew.code == 0, anew.said
    assert len(loss_history(run)) == 2
    assert [path.name for path in tmp_path.glob("run.*")], "the old folder was moved aside"
