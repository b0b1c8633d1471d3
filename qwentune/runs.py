"""`qwentune runs [DIR]`: the runs of a folder, with how far each has come."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.errors import EXIT_OK

if TYPE_CHECKING:
    from qwentune.training.overview import RunSummary


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder that holds them.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the runs of a folder, the newest first: state, step, loss, speed."""
    console.end(console.run(lambda: run_runs(folder, as_json)))


def run_runs(folder: Path, as_json: bool) -> int:
    """Prints a line for each run; the exit code."""
    from qwentune.training.overview import summaries

    found = summaries(folder)
    if as_json:
        console.show_json({"schema": 1, "runs": [asdict(run) for run in found]})
        return EXIT_OK
    if not found:
        console.say(f"{folder} holds no run")
        return EXIT_OK
    rows = [HEADS, *map(_cells, found)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEADS))]
    for row in rows:
        console.show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for run in found:
        if run.reason:
            console.say(f"{run.folder}: {run.state}: {run.reason}")
    return EXIT_OK


HEADS = ("run", "state", "step", "loss", "eval", "tokens/s", "changed")


def _cells(run: RunSummary) -> tuple[str, ...]:
    numbers = [(run.loss, ".4f"), (run.eval_loss, ".4f"), (run.tokens_per_second, ",.0f")]
    step = f"{run.step:,}" if run.steps is None else f"{run.step:,}/{run.steps:,}"
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)) if run.changed else ""
    shown = ("" if value is None else format(value, form) for value, form in numbers)
    return (run.folder, run.state, step, *shown, changed)


if __name__ == "__main__":
    console.main(runs)
