"""The signals that stop a run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def take_over(handler: Callable[[int, FrameType | None], object]) -> dict[int, object]:
    """Hands the signals that stop a run to `handler`; what handled them before.

    SIGHUP is left alone where it is ignored, as under nohup.
    """
    taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in taken}
