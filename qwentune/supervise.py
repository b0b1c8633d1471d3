"""`qwentune train`: plans, starts `accelerate launch` with a file of `launch/`, and watches over it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

from qwentune import console
from qwentune.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, DoesNotFitError
from qwentune.training.signals import take_over

POLL_SECONDS = 0.5
HUNG_SECONDS = 60.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, as often as needed.")] = None,
    resume: Annotated[str, typer.Option(help="auto, or the folder of a checkpoint.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an old run aside and start anew.")] = False,
    allow_change: Annotated[list[str] | None, typer.Option(help="A key that may differ from the checkpoint.")] = None,
    force_memory: Annotated[bool, typer.Option("--force-memory", help="Train though the plan does not fit.")] = False,
) -> None:
    """Plan, then train under accelerate; the same command again resumes an unfinished run."""
    from qwentune.memory.judge import changes_the_plan

    arguments = [recipe, *(overrides or ()), "--resume", resume]
    arguments += ["--fresh"] if fresh else []
    arguments += ["--force-memory"] if force_memory else []
    for key in allow_change or ():
        arguments += ["--allow-change", key]
    replan = fresh or changes_the_plan(allow_change or ())
    console.end(console.run(lambda: run(recipe, overrides or [], arguments, force_memory, replan, fresh)))


def run(
    recipe_path: str, overrides: list[str], arguments: list[str], force_memory: bool, replan: bool, fresh: bool
) -> int:
    """Judges the run, chooses its launch file, and trains; the trainer's exit code.

    The plan of an earlier start is judged again, not made anew, unless `replan` says so.
    """
    from qwentune.facts.launch import launch_file
    from qwentune.facts.models import model_spec, refuse_untrainable
    from qwentune.facts.towers import tower_remark
    from qwentune.memory import render_plan
    from qwentune.memory.judge import device_of, judge, refusal
    from qwentune.recipe import load_recipe
    from qwentune.training.run_folder import RunFolder

    recipe = load_recipe(recipe_path, overrides).recipe
    device, count, sharding = device_of(recipe.hardware, here=True)
    launch = recipe.hardware.launch
    spec = model_spec(recipe.model, packing=recipe.data.packing)
    refuse_untrainable(spec)
    if remark := tower_remark(spec):
        console.say(remark)
    plan = judge(
        spec,
        tuning=recipe.tuning,
        max_tokens=recipe.data.max_tokens,
        batch=recipe.batch,
        precision=recipe.precision,
        memory=recipe.memory,
        output=recipe.output,
        device=device,
        num_ranks=count,
        sharding=sharding,
        stored=None if replan else RunFolder(Path(recipe.output.dir)).stored_plan(),
        fresh=fresh,
    )
    console.say(render_plan(plan, spec.num_layers, f"{recipe.model} · {recipe.tuning.kind}"))
    if not plan.fits and not force_memory:
        raise DoesNotFitError(refusal(plan))
    if launch == "auto":
        launch = "single" if count == 1 else plan.choices.sharding
    return supervise(arguments, launch_file(launch), count)


def supervise(arguments: list[str], launch: Path, num_processes: int) -> int:
    """Trains under accelerate in a session of its own; the trainer's exit code.

    Signals go to the trainers themselves, not to the launcher, which would end them before they have saved. No
    process is left behind.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)),
            *("--num_processes", str(num_processes), "--quiet", "-m", "qwentune.train", *arguments),
        ]
        environment = {**os.environ, "QWENTUNE_EXIT_FOLDER": scratch}
        received: list[int] = []
        previous = take_over(lambda number, _: received.append(number))
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_supervisor)
        try:
            code, hung, stopped_by = _watch(launcher, received)
            _end_orphans(launcher.pid)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        codes = {int(file.name): int(file.read_text()) for file in Path(scratch).iterdir()}
    if hung is not None:
        console.say(f"Rank {hung} has stood still for {HUNG_SECONDS:.0f} s while others wait for it: all are ended.")
        return EXIT_BUG
    return _exit_code(code, codes, num_processes, stopped_by)


def _die_with_supervisor() -> None:
    # A killed supervisor takes the launcher with it, and trainers that have lost their launcher save and end.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(launcher: subprocess.Popen[bytes], received: list[int]) -> tuple[int, str | None, int | None]:
    """The launcher's code, the rank that hung, if one did, and the last signal that was passed on.

    Each signal received goes to the trainers, as soon as there are any. A rank that the system has stopped, with
    others still running, ends them all.
    """
    passed_on: int | None = None
    stopped: dict[str, float] = {}
    while True:
        try:
            return launcher.wait(timeout=POLL_SECONDS), None, passed_on
        except subprocess.TimeoutExpired:
            trainers = _trainers(launcher.pid)
            if received and trainers:
                passed_on = received.pop(0)
                for process in trainers:
                    process.send_signal(passed_on)
            stopped = _stopped_ranks(trainers, stopped)
            hung = [rank for rank, since in stopped.items() if time.monotonic() - since > HUNG_SECONDS]
            if hung and len(stopped) < len(trainers):
                for process in (*trainers, launcher):
                    process.kill()
                return launcher.wait(), hung[0], passed_on


def _trainers(launcher: int) -> list[psutil.Process]:
    """The training processes below the launcher; none of accelerate's or torchrun's own."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in children if _is_trainer(process)]


def _stopped_ranks(trainers: list[psutil.Process], before: dict[str, float]) -> dict[str, float]:
    """The ranks that stand still (SIGSTOP), with the time at which they were first seen so."""
    found: dict[str, float] = {}
    for process in trainers:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                rank = process.environ().get("RANK", "0")
                found[rank] = before.get(rank, time.monotonic())
    return found


def _is_trainer(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "qwentune.train" in command and "accelerate.commands.launch" not in command


def _end_orphans(session: int) -> None:
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue


def _exit_code(launcher_code: int, codes: dict[int, int], num_ranks: int, stopped_by: int | None) -> int:
    """The run's exit code; says which ranks ended without one."""
    silent = [str(rank) for rank in range(num_ranks) if rank not in codes]
    if silent and stopped_by is not None:  # the signal came before Python had a handler for it
        return EXIT_INTERRUPTED if stopped_by == signal.SIGINT else EXIT_PREEMPTED
    if launcher_code == -signal.SIGKILL:
        console.say("The launcher was killed (signal 9): probably out of host memory.")
    elif silent and launcher_code != 0:
        ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(silent)}"
        console.say(
            f"Lost {ranks}: ended without a word, as when killed (signal 9), most often for want of host memory."
        )
    if silent:
        return EXIT_OK if launcher_code == 0 else EXIT_BUG
    return codes[0]
