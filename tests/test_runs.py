"""`qwentune runs`: what the files of each run tell, whatever state they are in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwentune.durable import mark
from qwentune.errors import EXIT_OK, UsageError
from qwentune.runs import run_runs
from qwentune.training.overview import is_held, summaries
from qwentune.training.run_folder import EVALUATIONS, LOCK, METRICS, RunFolder, State

COMMAND = ["qwentune", "train", "r.yaml"]


def write_run(folder: Path, state: State, step: int, reason: str = "") -> RunFolder:
    run = RunFolder(folder)
    with run.lock():
        run.set_status(state, exit_code=None, reason=reason, step=step, command=COMMAND)
        run.set_live(steps=30)
        run.append(METRICS, {"step": step, "loss": 1.25, "tokens_per_second": 1234.5})
        run.append(EVALUATIONS, {"step": step, "loss": 1.5})
    return run


def test_runs_are_listed_with_what_their_files_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", "finished", 30)
    write_run(tmp_path / "deep" / "er" / "b", "failed", 7, "the loss is NaN at step 8")
    mark(tmp_path / "a" / "adapter")  # files of a run are no run
    os.utime(tmp_path / "a" / "status.json", (1, 1))
    assert run_runs(tmp_path, False) == EXIT_OK
    out, err = capsys.readouterr()
    heads, first, second = [line.split() for line in out.splitlines()]
    assert heads == ["run", "state", "step", "loss", "eval", "tokens/s", "changed"]
    assert first[:6] == [str(tmp_path / "deep" / "er" / "b"), "failed", "7/30", "1.2500", "1.5000", "1,234"]
    assert second[:3] == [str(tmp_path / "a"), "finished", "30/30"]
    assert err.strip().endswith("b: failed: the loss is NaN at step 8")


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", "finished", 30)
    assert run_runs(tmp_path, True) == EXIT_OK
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["state"], run["step"], run["steps"], run["loss"]) == ("finished", 30, 30, 1.25)


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "running", 3).path
    with RunFolder(folder).lock():
        assert is_held(folder)
        assert summaries(tmp_path)[0].state == "running"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    held = (folder / LOCK).read_text().replace(f"process {os.getpid()} ", f"process {ended.stdout.strip()} ")
    (folder / LOCK).write_text(held)
    assert summaries(tmp_path)[0].state == "killed"
    (folder / LOCK).write_text("process 1 on another-machine since 2026-01-01 00:00:00")
    assert summaries(tmp_path)[0].state == "running"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"state": 3, "step": "x", "steps": []}'])
def test_damaged_files_are_no_reason_not_to_list_the_others(tmp_path: Path, content: bytes) -> None:
    run = write_run(tmp_path / "a", "finished", 30)
    write_run(tmp_path / "b", "finished", 30)
    for name in ("status.json", METRICS, EVALUATIONS):
        (run.path / name).write_bytes(content)
    assert {Path(each.folder).name for each in summaries(tmp_path)} == {"a", "b"}


def test_links_hidden_folders_and_others_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "elsewhere" / "a", "finished", 30)
    inside = tmp_path / "inside"
    (inside / "other").mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "elsewhere")
    write_run(inside / ".hidden" / "a", "finished", 30)
    assert summaries(inside) == []
    assert run_runs(inside, False) == EXIT_OK
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is no folder"):
        summaries(tmp_path / "none")
