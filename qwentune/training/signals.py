"""The signals that stop a run, and the death of its launcher, which counts as one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from qwentune import console
from qwentune.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from qwentune.training.reports import Report

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ORPHAN_GRACE_SECONDS = 300.0  # enough for a long step and a save
EARLY_GRACE_SECONDS = 5.0  # before training there is nothing to save


class StoppedEarlyError(BaseException):
    """A signal came before training took it over; nothing was done that would have to be saved."""

    def __init__(self, number: int) -> None:
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def stoppable(command: Callable[[], int]) -> int:
    """The exit code of a command that a signal ends at once, unless something in it has taken the signals over."""
    take_over(_stop_early)
    try:
        return command()
    except StoppedEarlyError as stopped:
        console.say("stopped before the first step; there was nothing to save")
        return stopped.exit_code


def take_over(handler: Callable[[int, FrameType | None], object]) -> dict[int, object]:
    """Hands the signals that stop a run to `handler`; what handled them before.

    SIGHUP is left alone where it is ignored, as under nohup.
    """
    taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in taken}


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Has this process sent the signal when the one that started it dies; called between fork and exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def watch_launcher() -> None:
    """Sends this process SIGTERM once the one that started it has died, and ends it where that does not help."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    time.sleep(EARLY_GRACE_SECONDS)
    while time.monotonic() < deadline and signal.getsignal(signal.SIGTERM) is not _stop_early:
        time.sleep(1.0)
    # Too late, or nothing to save yet and stuck in torch, where no handler runs, such as in a wait for the launcher.
    Report().end(EXIT_PREEMPTED)
    os._exit(EXIT_PREEMPTED)


def _stop_early(number: int, frame: object) -> None:
    raise StoppedEarlyError(number)
