"""Stopping on a signal, saving by the clock: all ranks agree on the step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwentune import console
from qwentune.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from qwentune.training.ranks import PATIENCE
from qwentune.training.signals import SIGNALS, take_over

SAVE = 1  # a wish to stop is the number of its signal above this: a stop beats a save


class StopOnSignal(TrainerCallback):
    """Saves and stops at the next step boundary after a signal of SIGNALS; a second Ctrl-C stops at once.

    Saves also whenever `save_every_seconds` have passed since the last save.

    Ranks agree by a one-integer maximum over gloo on the CPU, started after one step and read after the next, so that
    no device waits for it.
    """

    def __init__(self, save_every_seconds: float | None = None) -> None:
        self.received: int = 0
        self.agreed: int = 0
        self.save_every_seconds = save_every_seconds
        self.last_save = time.monotonic()
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    @property
    def exit_code(self) -> int:
        """The code to end with after the stop: 130 for Ctrl-C, else 75."""
        return EXIT_INTERRUPTED if self.agreed == signal.SIGINT else EXIT_PREEMPTED

    def install(self) -> None:
        """Takes over the signals of this process; for the main thread.

        They are answered in a thread of their own: in a long step Python comes to no handler.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(reading,), daemon=True).start()
        take_over(self._receive)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the group in which the ranks agree."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a save, and for the end once all ranks know of a signal."""
        agreed = self._agreed(SAVE + self.received if self.received else SAVE * self._save_is_due())
        if agreed:
            control.should_save = True
        if agreed > SAVE:
            self.agreed = agreed - SAVE
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clock anew."""
        self.last_save = time.monotonic()

    def _save_is_due(self) -> bool:
        is_due = self.save_every_seconds is not None and time.monotonic() - self.last_save >= self.save_every_seconds
        if is_due:  # ranks agree a step later; the wish is said once
            self.last_save = time.monotonic()
        return is_due

    def _agreed(self, wish: int) -> int:
        if self._group is None:
            return wish
        agreed = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = int(flag.item())
        flag = torch.tensor([wish], dtype=torch.int32)
        self._pending = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return agreed

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _answer(self, received: int) -> None:
        """Says at once that a signal has come; ends at once after a second Ctrl-C."""
        stopping = 0
        while True:
            number = os.read(received, 1)[0]
            if number not in SIGNALS:
                continue
            if stopping == number == signal.SIGINT:
                os._exit(EXIT_INTERRUPTED)
            if not stopping:
                stopping = number
                again = " (Ctrl-C again ends at once, without saving)" if number == signal.SIGINT else ""
                console.say(f"stopping after this step, saving …{again}")
