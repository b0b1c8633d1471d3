"""Two ranks under `qwentune train`: they stop together, and a lost one is named."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwentune.errors import (
    DataError,
    DoesNotFitError,
    NotFiniteError,
    Problem,
    RecipeError,
    ResumeError,
    RunInUseError,
    UserError,
)
from qwentune.supervise import LAUNCHER
from qwentune.training import hangs
from qwentune.training.start import _is_fixed
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, KILL_AT, KILLED, final_weights, last_states, loss_history, train, write_recipe
from tests.warm import Warm

pytestmark = pytest.mark.slow

# The supervisor with a launch file for one or two processes on a CPU.
SUPERVISE = """
LAUNCH = {1: "launch/single.yaml", 2: "launch/cpu-2.yaml"}
import sys
from pathlib import Path
from qwentune import supervise
from qwentune.training import hangs
from qwentune.training.run_folder import RunFolder
launch, ranks = LAUNCH[int(sys.argv[1])], int(sys.argv[1])
hangs.STOPPED_SECONDS = hangs.LATE_SECONDS = float(sys.argv[2])
folder = RunFolder(Path(sys.argv[3]).parent / "run")
sys.exit(supervise.supervise(sys.argv[3:], Path(launch), ranks, folder))
"""


def supervised(recipe: Path, num_ranks: int = 2, hung_seconds: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(num_ranks), str(hung_seconds), str(recipe)],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def trainers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The training processes below a supervisor, by rank."""
    ranks: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "qwentune.train" in child.cmdline() and LAUNCHER not in child.cmdline():
                ranks[int(child.environ().get("RANK", "0"))] = child
    return ranks


def started(
    recipe: Path, run: Path, num_ranks: int = 2, hung_seconds: float = 60.0
) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
    """The supervisor, and the training processes by rank, once the first step is done."""
    process = supervised(recipe, num_ranks, hung_seconds)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = trainers(process)
    assert ranks.keys() == set(range(num_ranks))
    return process, ranks


@pytest.fixture
def unwatched() -> Iterator[list[psutil.Process]]:
    """Processes that a test lost sight of; none may outlive it."""
    found: list[psutil.Process] = []
    yield found
    for process in found:
        if is_alive(process):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody has asked for its exit code does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def recipe_of_many_steps(folder: Path) -> Path:
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    return write_recipe(
        folder, model, optimizer={"max_steps": 2000}, batch={"micro_batch": 1}, output={"save_every_steps": 10_000}
    )


@pytest.mark.fault("D23 D32", "SIGTERM to the supervisor: both ranks save one step, exit 75; the same command goes on")
def test_a_signal_to_the_supervisor_stops_both_ranks_at_one_step(tmp_path: Path) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert not [rank for rank in ranks.values() if is_alive(rank)]
    step = json.loads((run / "status.json").read_text())["step"]
    files = {path.name for path in (run / "checkpoints" / f"step-{step}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files

    resumed = train(recipe, f"optimizer.max_steps={step + 2}", "--allow-change", "optimizer.max_steps",
                    launch="launch/cpu-2.yaml")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {step}" in resumed.stderr


@pytest.mark.fault("D30", "a rank that is killed is named, with the likely reason; the other is gone within 30 s")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_and_the_other_is_gone_soon(tmp_path: Path, lost: int) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    ranks[lost].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert f"Lost rank {lost}: ended without a word" in errors
    assert not [rank for rank in ranks.values() if is_alive(rank)]
    status = status_of(run)
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert status["reason"].startswith(f"Lost rank {lost}: ")
    assert status["resume_command"].startswith("qwentune train ")


@pytest.mark.fault("D29", "the launcher is killed: the trainers save and end, exit 75, none is left")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_trainer_is_left_where_the_launcher_alone_is_killed(tmp_path: Path, num_ranks: int) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run, num_ranks)
    launcher = psutil.Process(process.pid).children()[0]
    launcher.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "launcher was killed" in errors
    assert not [rank for rank in ranks.values() if is_alive(rank)]
    status = status_of(run)
    assert (status["state"], status["exit"]) == ("preempted", 75)
    assert (run / "latest").read_text() == f"checkpoints/step-{status['step']}\n"


@pytest.mark.fault("D29", "the launcher is killed while the data is rendered or the model loaded: no trainer is left")
def test_no_trainer_is_left_where_the_launcher_is_killed_before_the_first_step(tmp_path: Path) -> None:
    recipe = recipe_of_many_steps(tmp_path)
    process = supervised(recipe, 2)
    deadline = time.monotonic() + 300
    while trainers(process).keys() != {0, 1} and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = trainers(process)
    time.sleep(1.5)  # Python has begun, torch is being imported
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert not [rank for rank in ranks.values() if is_alive(rank)]


@pytest.mark.fault("D29", "the supervisor is killed: its trainers save and end, none is left")
def test_no_trainer_is_left_where_the_supervisor_is_killed(tmp_path: Path, unwatched: list[psutil.Process]) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    unwatched += ranks.values()
    process.kill()
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=120)
    assert not alive
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit"]) == ("preempted", 75)
    assert (run / "latest").read_text() == f"checkpoints/step-{status['step']}\n"


@pytest.mark.fault("D24", "SIGTERM to one rank of two: both save the same step, exit 75")
def test_a_signal_to_one_rank_stops_both_at_one_step(tmp_path: Path) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    ranks[1].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    step = json.loads((run / "status.json").read_text())["step"]
    manifest = json.loads((run / "checkpoints" / f"step-{step}" / "manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()


@pytest.mark.fault(
    "C19 D30", "a rank other than the first cannot write: its own words and exit code, not only its loss"
)
def test_a_rank_that_fails_first_gives_the_reason(tmp_path: Path) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run)
    ranks[1].rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))  # smaller than its random state
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 4, errors
    assert re.search(r"rank 1: .*step \d+ could not be saved", errors)
    assert "Rank 1 failed first, with exit code 4." in errors
    assert (status_of(run)["state"], status_of(run)["exit"]) == ("failed", 4)
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("kind", [RecipeError, DataError, DoesNotFitError, ResumeError, NotFiniteError, RunInUseError])
def test_ranks_can_tell_each_other_what_is_wrong(kind: type[UserError]) -> None:
    error = kind([Problem("a:1", "is wrong", "Mend it."), Problem("b", "too")], "Nothing else.")
    told = pickle.loads(pickle.dumps(error))
    assert (type(told), str(told), told.problems) == (kind, str(error), error.problems)


@pytest.mark.fault("G43", "two ranks: the step, its rows and the first layer that is not finite, exit 6")
def test_two_ranks_name_what_is_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    weights = load_file(model / "model.safetensors")
    for name in (name for name in weights if "up_proj" in name or "down_proj" in name):
        weights[name] *= 1e25
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, model, batch={"micro_batch": 1})
    process = supervised(recipe)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 6, errors
    assert "Traceback" not in errors, errors  # of the launcher
    assert re.search(r"step \d+  not finite: the \w+ ", errors)
    assert "not finite: the gradient;" not in errors
    assert "rows.jsonl:" in errors
    assert status_of(tmp_path / "run")["exit"] == 6


@pytest.mark.fault("D30", "a rank that stands still is named after a minute, and all are ended")
def test_a_rank_that_hangs_is_named_and_all_are_ended(tmp_path: Path, unwatched: list[psutil.Process]) -> None:
    recipe, run = recipe_of_many_steps(tmp_path), tmp_path / "run"
    process, ranks = started(recipe, run, hung_seconds=8)
    unwatched += ranks.values()
    ranks[1].send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "Rank 1 has stood still for 8 s while others wait for it" in errors
    assert status_of(run)["reason"].startswith("Rank 1 has stood still")
    assert not [rank for rank in ranks.values() if is_alive(rank)]


# What every Python process of a run imports first. One rank comes to a place where it stays for good; where the others
# wait for it in the same function, no mark tells them apart, and they give up in the end.
STUCK = """
import os, sys
from datetime import timedelta
if "RANK" in os.environ:
    import torch
    from qwentune.training import ranks
    ranks.PATIENCE = timedelta(seconds=20)
if os.environ.get("RANK") == "{rank}":
    from {module} import {place}
    whole, calls = {place}.{method}, []
    def stuck(*args, **kwargs):
        calls.append(0)
        while len(calls) > {calls}:
            pass
        return whole(*args, **kwargs)
    {place}.{method} = stuck
"""
IN_A_BATCH = {"module": "qwentune.data.layout.batch", "place": "TrainBatches", "method": "__getitem__", "calls": 5}
IN_A_SAVE = {"module": "qwentune.training.trainer", "place": "ExactResume", "method": "_save_rng_state", "calls": 0}


@pytest.mark.fault("D30", "a rank stuck in code is named with the line, after ten minutes or when the others give up")
@pytest.mark.parametrize(
    ("rank", "place", "said"),
    [
        (0, IN_A_BATCH, r"has not come on for \d+ s while others wait for it"),
        (1, IN_A_BATCH, r"has not come on for \d+ s while others wait for it"),
        (1, IN_A_SAVE, r"did not come on until the others gave up"),
    ],
)
def test_a_rank_that_is_stuck_in_code_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, place: dict[str, Any], said: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STUCK.format(rank=rank, **place))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}")
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, batch={"micro_batch": 1}, output={"save_every_steps": 3})
    process = supervised(recipe, hung_seconds=8)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    sentence = rf"Rank {rank} {said} \(in .*sitecustomize.py:\d+ in stuck\): all are ended."
    assert re.search(sentence, errors), errors
    assert re.match(sentence, status_of(tmp_path / "run")["reason"])


BROKEN = """
import os
from qwentune import console, train
if os.environ["RANK"] == "1":
    import {module} as module
    def broken(*args, **kwargs):
        raise TypeError("the second rank's own")
    module.{place} = broken
console.main(train.train)
"""


@pytest.mark.fault(
    "D30", "a bug that one rank alone runs into is said with the rank, also without a supervisor; exit 1"
)
@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("qwentune.data.dataset", "prepare"),
        ("qwentune.model.fingerprint", "weights_fingerprint"),
        ("qwentune.data.layout.batch", "TrainBatches.__getitem__"),
    ],
)
def test_a_bug_on_another_rank_than_the_first_is_said(tmp_path: Path, warm: Warm, module: str, place: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, batch={"micro_batch": 1})
    ended = warm.train(recipe, code=BROKEN.format(module=module, place=place), launch="cpu-2")
    assert ended.code == 1
    (said,) = re.findall(r"rank 1: .*the second rank's own\n.*", ended.said)
    assert "A bug in qwentune: TypeError: the second rank's own" in said
    (kept,) = re.findall(r"The traceback is in (\S+\.txt)", said)
    assert "in broken" in Path(kept).read_text()
    Path(kept).unlink()


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_only_slow_goes_on(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the supervisor: a rank may be late by the limit, and by ten times its usual delay."""
    now = 0.0
    monkeypatch.setattr(hangs.time, "monotonic", lambda: now)
    ahead = {slow: 1, 1 - slow: 2}
    progress = hangs.Delay({0: 0, 1: 0})
    for seconds, marks, late in [
        (1, {0: 1, 1: 1}, None),
        (2, ahead, None),
        (599, ahead, None),
        (2, {0: 2, 1: 2}, None),  # came on after 601 s at the last moment between two polls
        (9999, {0: 2, 1: 2}, None),  # an evaluation or a save: nobody waits
        (1, {slow: 2, 1 - slow: 3}, None),
        (6000, {}, None),
        (11, {}, slow),
    ]:
        now += seconds
        assert progress.late_rank(marks, stopped=False) == late, seconds


def test_stopped_ranks_are_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(hangs.time, "monotonic", lambda: now)
    progress = hangs.Delay({0: 0, 1: 0})
    progress.late_rank({0: 4, 1: 5}, stopped=False)
    now += 9999
    assert progress.late_rank({}, stopped=True) is None
    now += 599
    assert progress.late_rank({}, stopped=False) is None


@pytest.mark.fault("D23", "a signal in the first second, before a trainer can take it: exit 75, not a bug")
def test_a_signal_to_a_supervisor_that_has_just_begun_is_no_bug(tmp_path: Path) -> None:
    recipe = recipe_of_many_steps(tmp_path)
    process = supervised(recipe)
    deadline = time.monotonic() + 300
    while not psutil.Process(process.pid).children() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors


TWO_RANKS: dict[str, dict[str, Any]] = {
    "cpu-2": {  # saved by the clock: after each step, once both ranks know of the wish
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, "data": {"eval_fraction": 0.1},
        "output": {"save_every_minutes": 1e-5, "eval_every_steps": 2, "best": "loss"},
    },
    "cpu-2 ": {"output": {"save_every_steps": 4}, "precision": {"weights": "bf16"}},
    "zero1": {"output": {"save_every_steps": 4}},
    "zero2": {"output": {"save_every_steps": 4}, "precision": {"weights": "bf16"}},
    "zero3": {"output": {"save_every_steps": 4}, "precision": {"weights": "bf16"}},
    "zero2-offload": {"output": {"save_every_steps": 4}},
    "zero3-offload": {"output": {"save_every_steps": 4}},
    "fsdp2": {"output": {"save_every_steps": 4}, "precision": {"weights": "bf16", "optimizer_state": "8bit"}},
    "fsdp2 ": {
        "output": {"save_every_steps": 4}, "tuning": {"kind": "lora", "rank": 1, "alpha": 8, "dropout": 0.1},
        "optimizer": {"lora_plus_ratio": 16},
    },
    "zero2 ": {
        "output": {"save_every_steps": 4}, "tuning": {"kind": "lora", "rank": 4}, "optimizer": {"lora_plus_ratio": 16},
    },
}  # fmt: skip


@pytest.mark.fault("A01 E34", "two ranks killed and started again: the same losses and weights, bit for bit")
@pytest.mark.parametrize("launch", TWO_RANKS)
def test_two_killed_ranks_end_like_undisturbed_ones(tmp_path: Path, warm: Warm, launch: str) -> None:
    """What is killed was launched as users do, which takes its time; what is compared with it, by a fork."""
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    sections = {**TWO_RANKS[launch], "optimizer": {"max_steps": 8, **TWO_RANKS[launch].get("optimizer", {})}}
    recipe = write_recipe(tmp_path, model, batch={"micro_batch": 1}, **sections)
    name = launch.strip()
    run = tmp_path / "run"
    whole = warm.train(recipe, launch=name)
    assert whole.code == 0, whole.said
    undisturbed = loss_history(run), final_weights(run), last_states(run)
    run.rename(tmp_path / "undisturbed")
    assert train(recipe, launch=f"launch/{name}.yaml", kill_at=5).returncode != 0
    resumed = warm.train(recipe, launch=name)
    assert resumed.code == 0, resumed.said
    assert "from step 4" in resumed.said
    assert (loss_history(run), final_weights(run), last_states(run)) == undisturbed
    has_small_states = "optimizer_state" in TWO_RANKS[launch].get("precision", {})  # of which many here are in fp32
    if "tuning" not in TWO_RANKS[launch] and not has_small_states:  # beside full states the rest is small
        weighed = ("*.safetensors", "*_states.pt", "optimizer*.pt")
        written = sum(file.stat().st_size for name in weighed for file in (run / "checkpoints/step-8").rglob(name))
        published = sum(file.stat().st_size for file in run.glob("model/*.safetensors"))
        planned = json.loads((run / "plan.json").read_text())["disk_bytes"]  # of three, one more and the model
        assert written == pytest.approx((planned - published) / 4, rel=0.03)


@pytest.mark.fault("F41", "another number of ranks: refused with then and now, exit 5")
def test_another_number_of_ranks_is_refused(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 4}, batch={"micro_batch": 1})
    assert warm.train(recipe).code == 0
    refused = warm.train(recipe, launch="cpu-2")
    assert re.search(r"\nranks +then 1 +now 2 ", refused.said)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit"]) == ("failed", 5), "accelerate has turned the exit code into 1"


@pytest.mark.fault("F41", "another number of ranks that is allowed: the run goes on")
def test_another_number_of_ranks_can_be_allowed(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    output = {"log_every_steps": 3, "save_every_steps": 2}  # saved between two log points
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 15}, output=output, batch={"micro_batch": 1})
    allowed = ("--allow-change", "ranks", "--allow-change", "plan")
    assert warm.train(recipe, f"output.dir={tmp_path / 'alone'}").code == 0
    assert warm.train(recipe, code=KILL_AT, given=["6"]).code == KILLED
    two = warm.train(recipe, *allowed, code=KILL_AT, given=["12"], launch="cpu-2")
    assert "changed ranks: then 1, now 2" in two.said
    assert "from step 4" in two.said
    one = warm.train(recipe, "--allow-change", "number of ranks", "--allow-change", "plan")  # as it was called once
    assert one.code == 0, one.said
    assert "from step 10" in one.said
    losses = [row[1] for row in loss_history(tmp_path / "alone")]
    assert [row[1] for row in loss_history(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)


@pytest.mark.fault("F41", "other numbers of ranks and another sharding, allowed: the run goes on as one process would")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "full-bf16"])
def test_a_run_goes_on_under_other_numbers_of_ranks_and_other_shardings(tmp_path: Path, warm: Warm, kind: str) -> None:
    """4 ranks that share the weights, 2 that do not, 1, and 2 that share them: the same rows in the same steps."""
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        tuning={"kind": "lora", "rank": 4, "alpha": 8} if kind == "lora" else {},
        precision={"weights": "bf16"} if kind == "full-bf16" else {},
        optimizer={"max_steps": 16},
        output={"save_every_steps": 2},
        batch={"micro_batch": 1},
    )
    alone = warm.train(recipe, f"output.dir={tmp_path / 'alone'}")
    assert alone.code == 0, alone.said
    allowed = ("--allow-change", "ranks", "--allow-change", "plan")
    last: int | None
    for launch, num_ranks, last in (("fsdp2", 4, 5), ("cpu-2", 2, 9), (None, None, 13), ("fsdp2", 2, None)):
        given = {} if last is None else {"code": KILL_AT, "given": [str(last)]}
        attempt = warm.train(recipe, *allowed, launch=launch, num_ranks=num_ranks, **given)
        assert (attempt.code == 0) == (last is None), attempt.said
        assert last == 5 or f"changed ranks: then {4 if last == 9 else 2 if last == 13 else 1}" in attempt.said
    expected, found = loss_history(tmp_path / "alone"), loss_history(tmp_path / "run")
    assert [row[0] for row in found] == [row[0] for row in expected]
    tolerance = 1e-3 if kind == "full-bf16" else 1e-5  # gradients are added up in another order, and rounded
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=tolerance)


@pytest.mark.parametrize(
    ("then", "now", "bits", "fixed"),
    [
        ("none", "fsdp2", "fp32", False),
        ("fsdp2", "ddp", "bf16", False),
        ("ddp", "none", "8bit", False),
        ("fsdp2", "none", "8bit", True),
        ("zero2", "zero2", "fp32", True),
        ("ddp", "zero3", "fp32", True),
    ],
)
def test_states_of_zero_and_of_shards_in_8_bits_stay_with_their_ranks(
    then: str, now: str, bits: str, fixed: bool
) -> None:
    facts = {"ranks": 2, "plan.sharding": then, "plan.optimizer_state": bits}
    key, before, after = ("ranks", 2, 4) if then == now else ("plan.sharding", then, now)
    assert _is_fixed(key, before, after, facts) == fixed


@pytest.mark.fault("J73", "a DeepSpeed shard that would run code: refused, nothing runs")
def test_no_shard_of_deepspeed_runs_code(tmp_path: Path) -> None:
    script = f"""
import pickle, torch
from qwentune.training.shards import load_only_weights
load_only_weights()
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
class Trap:
    def __reduce__(self):
        return open, ({str(tmp_path / "sprung")!r}, "w")
torch.save({{"state": Trap()}}, {str(tmp_path / "shard.pt")!r})
try:
    TorchCheckpointEngine().load({str(tmp_path / "shard.pt")!r})
except pickle.UnpicklingError:
    print("refused")
"""
    ended = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "refused" in ended.stdout, ended.stderr
    assert not (tmp_path / "sprung").exists()
