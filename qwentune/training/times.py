"""Where the wall time of a run's process goes: to its first step, into steps, compiling, evaluating and saving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import psutil

Activity: TypeAlias = Literal["compiling", "evaluating", "saving"]


class Times:
    """Seconds by activity, of this process alone. What compiles spends its time under `compiling`."""

    def __init__(self) -> None:
        self.first_step: float | None = None  # from the process's start to the end of its first step
        self.spent: dict[Activity, float] = {}
        self._training_since = 0.0
        self._away_before = 0.0

    @contextmanager
    def spending(self, activity: Activity) -> Iterator[None]:
        """Adds what its body takes to an activity."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[activity] = self.spent.get(activity, 0.0) + time.monotonic() - began

    @property
    def away(self) -> float:
        """Seconds that were no training."""
        return sum(self.spent.values())

    def stepped(self) -> None:
        """Takes notice of the end of a step."""
        if self.first_step is None:
            self.first_step = time.time() - psutil.Process().create_time()
            self._training_since, self._away_before = time.monotonic(), self.away

    def told(self) -> str:
        """The times in a line; empty where no step was taken."""
        if self.first_step is None:
            return ""
        steps = time.monotonic() - self._training_since - (self.away - self._away_before)
        parts = {"steps after it": steps, **self.spent}
        shown = " · ".join(f"{name} {_in_words(seconds)}" for name, seconds in parts.items())
        return f"time  first step after {_in_words(self.first_step)} · {shown}"


def _in_words(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
