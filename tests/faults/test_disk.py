"""Disks that are full, small, broken or gone: the reason in words, old checkpoints intact, the same command goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qwentune.training.checkpoints import Checkpoints
from qwentune.training.run_folder import LONGEST_REASON, RunFolder
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, KILL_AT, KILLED, final_weights, loss_history, write_recipe
from tests.warm import TRAIN, Warm

pytestmark = pytest.mark.slow

# Publishes step 2 of the run folder that the command line names, as a trainer does, without importing torch.
PUBLISH = """
import sys
from pathlib import Path
from qwentune.training.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
written = checkpoints.staging(2) / "checkpoint-2"
written.mkdir(parents=True)
for name in ("model.safetensors", "optimizer.pt"):
    (written / name).write_text(name + " 2")
checkpoints.publish(written, 2, {"run": {}})
"""
CALLS = ("openat", "write", "fsync", "rename", "unlink,unlinkat,rmdir")
# Does something to the run folder once step 5 is logged, and lets the run go on.
AFTER_STEP_5 = """
import os
from qwentune.training.progress import Recorder
logged = Recorder.logged
def logged_and_more(self, row):
    logged(self, row)
    if row["step"] == 5:
        happens(self.folder.path)
Recorder.logged = logged_and_more
"""
FILL = """
def happens(run):
    with (run.parent / "another.program").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
"""
ROOT = Path(__file__).parents[2]
MOVE = """
def happens(run):
    run.rename(run.parent / "elsewhere")
"""
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of its own; skipped where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps, saved after each third."""
    folder = tmp_path_factory.mktemp("disk")
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    return write_recipe(
        folder, model, data={"max_tokens": 256}, optimizer={"max_steps": 9}, output={"save_every_steps": 3}
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, warm: Warm) -> tuple[object, object]:
    """The losses and weights of a run on a good disk."""
    run = recipe.parent / "run"
    assert warm.train(recipe).code == 0
    return loss_history(run), final_weights(run)


def fill(disk: Path) -> None:
    """Takes all the room that is left, to the last byte."""
    with (disk / "another.program").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def append_200_rows(run: RunFolder) -> None:
    for step in range(8, 208):
        run.append("metrics.jsonl", {"step": step, "loss": 1 / step})


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.fault("C17", "refused before step 1 with what is needed, exit 4")
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    recipe: Path, warm: Warm, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        refused = warm.train(recipe, f"output.dir={disk / 'run'}")
        assert refused.code == 4, refused.said
        assert "GiB of disk" in refused.said
        assert list(disk.iterdir()) == []


@pytest.mark.fault(
    "C18", "exit 4 with what is free; the checkpoints before it are whole; with space the same command goes on"
)
def test_a_disk_that_another_program_fills_ends_the_run_and_space_lets_it_go_on(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 40_000) as disk:
        run = disk / "run"
        full = warm.train(recipe, f"output.dir={run}", code=FILL + AFTER_STEP_5 + TRAIN)
        assert full.code == 4, full.said
        assert "No space left" in full.said
        assert "A bug" not in full.said
        assert steps_of(run) == ["step-3"]

        (disk / "another.program").unlink()
        again = warm.train(recipe, f"output.dir={run}")
        assert again.code == 0, again.said
        assert "from step 3" in again.said
        assert (loss_history(run), final_weights(run)) == undisturbed


@pytest.mark.fault(
    "C90", "exit 4 with what is free, also by the supervisor; the record is whole lines, the status says failed"
)
@pytest.mark.parametrize("supervised", [False, True])
def test_a_disk_that_fills_while_records_are_written_ends_the_run_in_words(
    recipe: Path, warm: Warm, tmp_path: Path, supervised: bool
) -> None:
    long = ["optimizer.max_steps=60", "output.save_every_steps=100", "output.log_every_steps=1"]
    with small_disk(tmp_path / "disk", 40_000) as disk:
        run = disk / "run"
        if supervised:  # whose own files are on that disk too
            command = [sys.executable, "-m", "qwentune.cli", "train", str(recipe), f"output.dir={run}", *long]
            environment = {**ENVIRONMENT, "TMPDIR": str(disk), "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 500)
            fill(disk)
            said, code = process.communicate(timeout=300)[1], process.returncode
        else:
            full = warm.train(recipe, f"output.dir={run}", *long, code=FILL + AFTER_STEP_5 + TRAIN)
            said, code = full.said, full.code
        assert code == 4, said
        assert "No space left" in said
        assert "A bug" not in said
        assert "Traceback" not in said
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["exit"]) == ("failed", 4)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert status["step"] == len(rows) < 60
        assert not [path for path in run.rglob(".*") if path.name.endswith((".new", ".writing"))]

        (disk / "another.program").unlink()
        again = warm.train(recipe, f"output.dir={run}", *long)
        assert again.code == 0, again.said
        assert [row[0] for row in loss_history(run)] == list(range(1, 61))


@pytest.mark.fault("C18", "a cache or a folder for temporary files that is full: exit 4 with what to free")
@pytest.mark.parametrize("kibibytes", [0, 8, 40])
def test_a_full_disk_under_the_cache_is_said_in_words(recipe: Path, tmp_path: Path, kibibytes: int) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        (disk / "another.program").write_bytes(bytes((256 - kibibytes) * 1024))
        command = [sys.executable, "-m", "qwentune.cli", "preview", str(recipe), "--json"]
        environment = {**ENVIRONMENT, "TMPDIR": str(disk), "QWENTUNE_CACHE": str(disk / "cache")}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 4, ended.stderr
        assert "No space left on device" in ended.stderr
        assert "A bug" not in ended.stderr


@pytest.mark.fault("C90", "the status takes the room that it has, or stays as it was; never half a file")
def test_an_end_is_written_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        run = RunFolder(disk / "run")
        with run.lock():
            run.set_status("running", exit_code=None, reason="", step=0, command=["qwentune", "train", "a b.yaml"])
            run.append("metrics.jsonl", {"step": 7})
            fill(disk)
            for size in (10, 100, 5000):
                run.set_status("failed", exit_code=4, reason="x" * size, step=7, command=["qwentune", "train", "r"])
                status = json.loads((disk / "run" / "status.json").read_text())
                assert (status["state"], len(status["reason"])) == ("failed", min(size, LONGEST_REASON))
            with pytest.raises(OSError, match=r"metrics\.jsonl"):
                append_200_rows(run)
        assert run.reached_step() == len((disk / "run" / "metrics.jsonl").read_text().splitlines()) + 6
        (disk / "run" / "status.json").write_text('{"state": "run')
        run.mark_lost("", 4, ["qwentune", "train", "r.yaml"])
        status = json.loads((disk / "run" / "status.json").read_text())
        assert (status["state"], status["exit"], status["resume_command"]) == ("failed", 4, "qwentune train r.yaml")


@pytest.mark.fault("C17", "a run that goes on needs no room for the checkpoints that it has already")
def test_a_disk_that_just_suffices_lets_a_killed_run_go_on(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    needed = json.loads((recipe.parent / "run" / "plan.json").read_text())["disk_bytes"]
    with small_disk(tmp_path / "disk", round(1.1 * needed / 1024)) as disk:
        run = disk / "run"
        assert warm.train(recipe, f"output.dir={run}", code=KILL_AT, given=["8"]).code == KILLED
        assert shutil.disk_usage(disk).free < needed
        again = warm.train(recipe, f"output.dir={run}")
        assert again.code == 0, again.said
        assert (loss_history(run), final_weights(run)) == undisturbed


@needs_strace
@pytest.mark.fault("C19", "an I/O error while saving: the reason, exit 2, the checkpoints before it are whole")
def test_an_input_output_error_while_saving_is_said_in_words(
    recipe: Path, undisturbed: tuple[object, object], warm: Warm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=25+"]
    command = [*fault, sys.executable, "-m", "qwentune.train", str(recipe), f"output.dir={run}"]
    broken = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert broken.returncode == 2, broken.stderr
    assert "Input/output error" in broken.stderr
    assert "A bug" not in broken.stderr
    again = warm.train(recipe, f"output.dir={run}")
    assert (again.code, loss_history(run), final_weights(run)) == (0, *undisturbed)


@pytest.mark.fault("C20", "ended at the next step with the reason, exit 2; moved back, the same command goes on")
def test_a_run_folder_that_is_moved_away_ends_the_run(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    moved = warm.train(recipe, f"output.dir={run}", code=MOVE + AFTER_STEP_5 + TRAIN)
    assert moved.code == 2, moved.said
    assert "A bug" not in moved.said
    assert not run.exists()
    (tmp_path / "elsewhere").rename(run)
    again = warm.train(recipe, f"output.dir={run}")
    assert (again.code, loss_history(run), final_weights(run)) == (0, *undisturbed)


@pytest.mark.fault(
    "C21", "spaces, quotes, emoji and newlines in a name work; a name that is too long is refused, exit 2"
)
def test_any_name_of_a_run_folder_works_or_is_refused(
    recipe: Path, warm: Warm, undisturbed: tuple[object, object], tmp_path: Path
) -> None:
    run = tmp_path / 'Qwen\'s "läuft" 🙂\n$(x)'
    assert warm.train(recipe, "output.dir=" + json.dumps(str(run), ensure_ascii=False)).code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed
    long = warm.train(recipe, f"output.dir={tmp_path / ('x' * 256)}")
    assert long.code == 2, long.said
    assert "name too long" in long.said


@needs_strace
@pytest.mark.fault(
    "A02 A03 A04 A05", "killed at each open, write, fsync, rename and removal: the old or the new one, whole"
)
@pytest.mark.parametrize("call", CALLS)
def test_a_save_killed_by_the_system_at_each_call_leaves_a_whole_checkpoint(tmp_path: Path, call: str) -> None:
    before = Checkpoints(tmp_path / "before", keep=1)
    written = before.staging(1) / "checkpoint-1"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_text("model 1")
    before.publish(written, 1, {"run": {}})
    steps: list[int] = []
    for number in range(1, 200):
        run = tmp_path / "run"
        shutil.copytree(before.run, run)
        # Only calls on paths of the run count: Python's own files are opened by the hundred.
        paths = [argument for path in paths_of(run) for argument in ("-P", str(path))]
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", *paths, "-e", f"trace={call}", "-e", inject]
        ended = subprocess.run([*command, sys.executable, "-c", PUBLISH, str(run)], env=ENVIRONMENT, check=False)
        if ended.returncode == 0:
            break
        assert ended.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        newest, skipped = Checkpoints(run, keep=1).newest()
        assert newest is not None
        assert not skipped
        steps.append(newest.step)
        shutil.rmtree(run)
    assert steps, "no call was ever met"
    assert steps == sorted(steps)


def paths_of(run: Path) -> list[Path]:
    """Every path that publishing step 2 in `run` touches."""
    folder = run / "checkpoints"
    written = folder / ".saving-2" / "checkpoint-2"
    names = ["model.safetensors", "optimizer.pt", "manifest.json", ".manifest.json.new"]
    files = [place / name for place in (written, folder / "step-2", folder / ".trash-step-1") for name in names]
    folders = [folder, written.parent, written, folder / "step-1", folder / "step-2", folder / ".trash-step-1"]
    return [run, *folders, *files, run / "latest", run / ".latest.new"]
