"""`qwentune train`: plans, starts `accelerate launch` with a file of `launch/`, and watches over it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from qwentune import console
from qwentune.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    DoesNotFitError,
    RunInUseError,
    UserError,
)
from qwentune.facts.machines import Machines
from qwentune.training import reports
from qwentune.training.command_line import AllowChange, ForceMemory, Fresh, Overrides, RecipePath, Request, Resume
from qwentune.training.hangs import HangWatch
from qwentune.training.heartbeat import Heartbeat, Lost
from qwentune.training.signals import ORPHAN_GRACE_SECONDS, die_with_parent, stoppable, take_over

if TYPE_CHECKING:
    from qwentune.recipe import LoadedRecipe
    from qwentune.training.run_folder import RunFolder

LAUNCHER = "qwentune.training.launcher"
POLL_SECONDS = 0.2
QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the launcher too, unless the user says else
MAP_LOST = (
    "A file was cut short or cannot be read any more while it was in use: most often the rendered data of the cache "
    "($QWENTUNE_CACHE/data), the weights, or shared memory that is full. The same command continues the run."
)


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = "auto",
    fresh: Fresh = False,
    allow_change: AllowChange = None,
    force_memory: ForceMemory = False,
) -> None:
    """Plan, then train under accelerate; the same command again resumes an unfinished run."""
    request = Request(recipe, tuple(overrides or ()), resume, fresh, tuple(allow_change or ()), force_memory)
    console.end(stoppable(lambda: console.run(lambda: run(request))))


def run(request: Request) -> int:
    """Judges the run, chooses its launch file, and trains; the trainer's exit code."""
    from qwentune.facts.machines import machines
    from qwentune.facts.present import count_cards_by_bus
    from qwentune.recipe import load_recipe
    from qwentune.training.run_folder import RunFolder
    from qwentune.training.start import refuse_unknown_changes

    count_cards_by_bus()
    refuse_unknown_changes(request.allow_change)
    loaded = load_recipe(request.recipe, request.overrides)
    folder = RunFolder(Path(loaded.recipe.output.dir))
    folder.refuse_other_things()
    with loaded.located():
        together = machines(loaded.recipe.hardware.machines)
        beats = Heartbeat(together) if together.count > 1 else None
        try:
            launch, count = _planned(request, loaded, folder, together)
        except UserError as error:
            if beats is not None:
                beats.end(error.exit_code, str(error.problems[0]))
            raise
    return supervise(request.arguments, launch, count, folder, beats)


def _planned(request: Request, loaded: LoadedRecipe, folder: RunFolder, together: Machines) -> tuple[Path, int]:
    """The launch file of a run whose plan fits, and the number of processes on all machines.

    The plan of an earlier start is judged again; it is made anew only where the request lets it change.
    """
    from qwentune.data.at_hand import largest_media, longest_row, refuse_untrained_rows
    from qwentune.data.reading.files import refuse_missing
    from qwentune.facts.continued import continued
    from qwentune.facts.launch import launch_file
    from qwentune.facts.models import model_spec, refuse_untrainable
    from qwentune.memory import render_plan, verdict
    from qwentune.memory.device_remarks import recipe_remarks
    from qwentune.memory.judge import changes_the_plan, device_of, judge_recipe
    from qwentune.memory.shortage import refusal
    from qwentune.training.prerequisites import refuse_what_is_not_here

    spec = model_spec(loaded.recipe.model, packing=loaded.recipe.data.packing)
    refuse_untrainable(spec)
    loaded, remarks = continued(loaded, spec)
    recipe = loaded.recipe
    refuse_missing(source.path for source in recipe.data.sources)
    refuse_untrained_rows(recipe.data)
    device, count, sharding = device_of(recipe.hardware, here=True)
    count *= together.count
    launch = recipe.hardware.launch
    longest = longest_row(recipe)
    for remark in (*remarks, *recipe_remarks(spec, device, loaded, longest)):
        console.say(remark)
    stored = None if request.fresh or changes_the_plan(request.allow_change) else folder.stored_plan()
    plan = judge_recipe(
        spec,
        recipe,
        device=device,
        num_ranks=count,
        num_machines=together.count,
        sharding=sharding,
        longest_row=longest,
        media=largest_media(recipe, spec),
        stored=stored,
        fresh=request.fresh,
    )
    if stored is not None and plan.fits:
        console.say(f"the plan of the earlier start: {verdict(plan)}")
    else:
        title = f"{recipe.model} · {recipe.tuning.kind}"
        console.say(render_plan(plan, spec.num_layers, title, columns=console.width(sys.stderr)))
    if not plan.fits and not request.force_memory:
        raise DoesNotFitError(refusal(plan))
    refuse_what_is_not_here(recipe, plan.choices)
    if launch == "auto":
        launch = "single" if plan.choices.sharding == "none" else plan.choices.sharding
    return launch_file(launch), count


@dataclass
class _Watched:
    """What the supervisor has seen: the last signal that it passed on, the words for a rank that hung, the trainers.

    `lost` says why a run on several machines cannot go on.
    """

    stopped_by: int | None = None
    hung: str | None = None
    lost: Lost | None = None
    trainers: list[psutil.Process] = field(default_factory=list)


def supervise(
    arguments: list[str], launch: Path, num_processes: int, folder: RunFolder, beats: Heartbeat | None = None
) -> int:
    """Trains under accelerate in a session of its own; the trainer's exit code.

    `num_processes` counts those of all machines, which `beats` hears; this one starts and watches its own.

    Signals go to the trainers themselves, not to the launcher, which would end them before they have saved. No
    process is left behind. What a trainer could not say itself is said, and written into the run folder's status.
    """
    together = Machines() if beats is None else beats.together
    num_here = num_processes // together.count
    own = range(together.index * num_here, (together.index + 1) * num_here)
    with reports.folder_of_reports() as scratch:
        command = [
            *(sys.executable, "-m", LAUNCHER, "--config_file", str(launch)),
            *("--num_processes", str(num_processes), *together.launch_arguments),
            *("--quiet", "-m", "qwentune.train", *arguments),
        ]
        environment = {**QUIET, **os.environ, reports.FOLDER: str(scratch)}
        received: list[int] = []
        previous = take_over(lambda number, _: received.append(number))
        # A killed supervisor takes the launcher with it, and trainers that have lost their launcher save and end.
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
        watched = _Watched()
        try:
            _wait_for_trainers(launcher, received, scratch, own[0], beats)
            launcher_code = _watch(launcher, received, HangWatch(scratch, own), watched, beats)
            _end_orphans(launcher.pid, watched.trainers)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        codes = reports.exit_codes(scratch)
        silent = [rank for rank in own if rank not in codes]
        crashes = {rank: crash for rank in silent if (crash := reports.crash(scratch, rank))}
    code, reason = _verdict(launcher_code, codes, crashes, own, watched)
    if beats is not None:
        if code == EXIT_BUG and not reason and (cause := beats.cause()) is not None:
            code, reason = cause.code or code, cause.reason
        beats.end(code, reason)
    if reason:
        console.say(reason)
    is_lost = reason or code not in (EXIT_OK, EXIT_PREEMPTED, EXIT_INTERRUPTED, RunInUseError.exit_code)
    if is_lost and together.leads and folder.mark_lost(reason, code, ["qwentune", "train", *arguments]):
        from qwentune.pages.run_page import RunPage

        RunPage(folder).write()
    return code


def _wait_for_trainers(
    launcher: subprocess.Popen[bytes], received: list[int], scratch: Path, first_rank: int, beats: Heartbeat | None
) -> None:
    """Returns once a trainer speaks for itself, or there will be none."""
    with console.busy("starting accelerate and torch"):
        while launcher.poll() is None and not reports.has_begun(scratch, first_rank):
            if received:
                console.say("stopping; nothing has begun yet")
                return
            if beats is not None and beats.lost():  # the launcher waits for those of all machines
                return
            time.sleep(0.05)


def _watch(
    launcher: subprocess.Popen[bytes],
    received: list[int],
    hangs: HangWatch,
    watched: _Watched,
    beats: Heartbeat | None,
) -> int:
    """The launcher's exit code, once it has ended.

    Each signal received goes to the trainers, as soon as there are any. A rank that hangs ends them all, and so does
    another machine that is lost.
    """
    while True:
        try:
            return launcher.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            trainers = _trainers(launcher.pid) or watched.trainers
            watched.trainers = trainers
            if received and trainers:
                watched.stopped_by = received.pop(0)
                for process in trainers:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(watched.stopped_by)
            watched.hung = hangs.find(trainers)
            watched.lost = beats.lost() if beats else None
            if watched.hung is not None or watched.lost is not None:
                for process in (*trainers, launcher):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                return launcher.wait()


def _trainers(launcher: int) -> list[psutil.Process]:
    """The training processes below the launcher; none of accelerate's or torchrun's own."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in children if _is_trainer(process)]


def _is_trainer(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "qwentune.train" in command and LAUNCHER not in command


def _end_orphans(session: int, trainers: list[psutil.Process]) -> None:
    """Returns when no process of the run is left; trainers that have lost their launcher save before they end."""
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    if any(map(_is_alive, trainers)):
        console.say("The launcher is gone; waiting for the trainers to save and end.")
    while time.monotonic() < deadline and any(map(_is_alive, trainers)):
        time.sleep(POLL_SECONDS)
    for process in (*trainers, *psutil.process_iter()):
        try:
            if process in trainers or os.getsid(process.pid) == session:
                process.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _verdict(
    launcher_code: int, codes: dict[int, int], crashes: dict[int, str], own: range, watched: _Watched
) -> tuple[int, str]:
    """The run's exit code, and what is to be said of ranks that could not speak for themselves."""
    if watched.hung is not None:
        return EXIT_BUG, f"{watched.hung}: all are ended."
    if watched.lost is not None:
        what = f"{watched.lost.reason}: all are ended here."
        return watched.lost.code or EXIT_BUG, f"{what} The same command on every machine continues the run."
    if crashes:
        rank, crash = min(crashes.items())
        likely = MAP_LOST if crash.startswith("Bus error") else "A library crashed; the same command continues the run."
        return EXIT_BUG, f"Lost rank {rank}: {crash}. {likely}"
    silent = [rank for rank in own if rank not in codes]
    if silent and watched.stopped_by is not None:  # the signal came before Python had a handler for it
        return (EXIT_INTERRUPTED if watched.stopped_by == signal.SIGINT else EXIT_PREEMPTED), ""
    if launcher_code == -signal.SIGKILL:
        return codes.get(own[0], EXIT_BUG), "The launcher was killed (signal 9): probably out of host memory."
    if not silent:
        # Rank 0 ends with 1 where another one has failed first, and that one knows why.
        unknowing = (EXIT_OK, EXIT_BUG, EXIT_PREEMPTED, EXIT_INTERRUPTED)
        failed = [(rank, code) for rank, code in codes.items() if code not in unknowing]
        if codes[own[0]] == EXIT_BUG and failed:
            rank, code = failed[0]
            return code, f"Rank {rank} failed first, with exit code {code}."
        return codes[own[0]], ""
    if launcher_code == 0:
        return EXIT_OK, ""
    ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    what = f"Lost {ranks}: ended without a word, as when killed (signal 9), most often for want of host memory."
    return EXIT_BUG, what
