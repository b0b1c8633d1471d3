"""The run on the screen and in its folder: a live line, and a record per logged step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwentune import console
from qwentune.training.run_folder import EVALUATIONS, METRICS, SAMPLES, RunFolder

MetricsRow = dict[str, float | int | None]
HEIGHTS = "▁▂▃▄▅▆▇█"
MOST_CHARACTERS = 80  # of an answer that is shown
LIVE_SECONDS = 1.0  # between two states of status.json


class Recorder:
    """Writes the run's records and shows steps, loss, speed and the time that is left on stderr; for rank 0."""

    def __init__(
        self, folder: RunFolder, num_steps: int, first_step: int, write_page: Callable[[], None] | None = None
    ) -> None:
        self.folder = folder
        self.write_page = write_page
        self.num_steps = num_steps
        self.first_step = first_step
        self.latest: deque[MetricsRow] = deque(maxlen=1000)  # of this process, which earlier ones may not be like
        self.began = self.last_live = time.monotonic()
        self.bar = None
        if console.is_animated(sys.stderr):
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(compact=True),
                console=console.terminal(sys.stderr),
                expand=True,
                redirect_stdout=False,
            )
            self.task = self.bar.add_task("training", total=num_steps, completed=first_step, facts="")

    def __enter__(self) -> Recorder:
        self.began = time.monotonic()
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
        step, loss, speed = row["step"], row["loss"], f"{row['tokens_per_second']:.0f}"
        assert isinstance(step, int)
        if (now := time.monotonic()) - self.last_live >= LIVE_SECONDS or len(self.latest) == 1:
            self.last_live = now
            left = (now - self.began) / max(1, step - self.first_step) * (self.num_steps - step)
            self.folder.set_live(step=step, steps=self.num_steps, loss=loss, eta_seconds=round(left, 1))
        line = f"step {step}/{self.num_steps}  loss {loss:.4f}  lr {row['learning_rate']:.2e}"
        line += "" if row["update_ratio"] is None else f"  update {row['update_ratio']:.1e}"
        line += f"  {speed} tokens/s"
        line += "" if (share := row.get("limit_share")) is None else f"  {share:.0%} of the limit"
        if self.bar is None:
            console.say(line)
            return
        console.log(line)
        losses = [latest["loss"] or 0.0 for latest in self.latest]
        self._draw(completed=step, facts=f"{sparkline(losses, 10)} loss {loss:.4f} · {speed} tokens/s")

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Shows how far an evaluation is."""
        if self.bar is not None:
            self._draw(description="training" if done == total else f"{what} {done}/{total}")

    def evaluated(self, step: int, loss: float, scores: Mapping[str, float]) -> None:
        """Takes the results of one evaluation."""
        self.folder.append(EVALUATIONS, {"step": step, "loss": loss, **scores})
        told = "".join(f"  {name} {score:.4g}" for name, score in scores.items())
        console.say(f"step {step}/{self.num_steps}  eval loss {loss:.4f}{told}")

    def sampled(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the answers of one evaluation, and shows how the first begins."""
        for row in rows:
            self.folder.append(SAMPLES, dict(row))
        for row in rows[:1]:
            text = " ".join(row["answer"].split()) or "(nothing)"
            source = f"{Path(row['source']['file']).name}:{row['source']['line']}"
            console.say(f"step {row['step']}/{self.num_steps}  {source} answered: {shorten(text)}")

    def saved(self, step: int, best_step: int | None) -> None:
        """Takes a checkpoint that is in place, and which step is the best so far."""
        self.folder.add_event("save", step, best=best_step)
        if self.write_page is not None:
            self.write_page()

    def _draw(self, **changes: int | str) -> None:
        assert self.bar is not None
        with suppress(OSError):  # the terminal may be gone; that is no reason to end a run
            self.bar.update(self.task, **changes)  # type: ignore[arg-type]


def sparkline(values: Sequence[float], columns: int = 30) -> str:
    """A row of blocks as high as the values, each the mean of the values that fall to it."""
    columns = min(columns, len(values))
    edges = [len(values) * k // columns for k in range(columns + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(HEIGHTS[round((mean - low) / (high - low or 1.0) * (len(HEIGHTS) - 1))] for mean in means)


def shorten(text: str) -> str:
    """The beginning of a text that is too long for a line."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS].rstrip()} …"
