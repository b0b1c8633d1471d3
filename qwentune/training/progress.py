"""The run on the screen and in its folder: a live line, and a record per logged step."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwentune import console
from qwentune.training.run_folder import EVALUATIONS, METRICS, RunFolder

MetricsRow = dict[str, float | int | None]


class Recorder:
    """Writes the run's records and shows steps, loss, speed and the time that is left on stderr; for rank 0."""

    def __init__(self, folder: RunFolder, num_steps: int, first_step: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.latest: deque[MetricsRow] = deque(maxlen=1000)  # of this process, which earlier ones may not be like
        terminal = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = None
        if terminal.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} · {task.fields[speed]} tokens/s · left"),
                TimeRemainingColumn(),
                console=terminal,
            )
            self.task = self.bar.add_task("training", total=num_steps, completed=first_step, loss="-", speed="-")

    def __enter__(self) -> Recorder:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.stop()

    def logged(self, row: MetricsRow) -> None:
        """Takes the metrics of one logged step."""
        self.folder.append(METRICS, row)
        self.latest.append(row)
        loss, speed = f"{row['loss']:.4f}", f"{row['tokens_per_second']:.0f}"
        line = f"step {row['step']}/{self.num_steps}  loss {loss}  lr {row['learning_rate']:.2e}"
        line += "" if row["update_ratio"] is None else f"  update {row['update_ratio']:.1e}"
        line += f"  {speed} tokens/s"
        if self.bar is None:
            console.say(line)
            return
        console.log(line)
        with suppress(OSError):  # the terminal may be gone; that is no reason to end a run
            self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)

    def evaluated(self, step: int, loss: float) -> None:
        """Takes the result of one evaluation."""
        self.folder.append(EVALUATIONS, {"step": step, "loss": loss})
        console.say(f"step {step}/{self.num_steps}  eval loss {loss:.4f}")
