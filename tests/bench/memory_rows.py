"""Public measurements of peak memory beside what the project's trace of the same training step says.

    python tests/bench/memory_rows.py CSV

CSV has a row for each measurement (model, method, batch, precision, kernels, framework, GPU, the number, a note).
Every row is described by rule from its columns, never by its id, and no number is fitted. Prints each row's id, what
was measured and predicted in MiB and the error, or why the row cannot be described; then a summary.
"""

from __future__ import annotations

import csv
import logging
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.rows.describe import Row, described, measured_bytes
from tests.bench.rows.settings import CannotDescribeError

MIB = 2**20


@dataclass(frozen=True)
class Score:
    """One row: bytes predicted and measured, or the reason why there is no prediction."""

    row: Row
    measured: int = 0
    predicted: int = 0
    region: str = ""
    reason: str = ""

    @property
    def error(self) -> float:
        """How far the prediction lies above what was measured, in per cent."""
        return 100 * (self.predicted / self.measured - 1)

    @property
    def line(self) -> str:
        """The row as it is printed."""
        if self.reason:
            return f"{self.row['id']:6} cannot be described: {self.reason}"
        sizes = f"{self.measured / MIB:10.1f} {self.predicted / MIB:10.1f}"
        return f"{self.row['id']:6} {sizes} {self.error:+8.2f} %  {self.region}"


def score(row: Row) -> Score:
    """Describes one row to the estimator."""
    from tests.bench.rows.step import predicted_bytes

    try:
        measured, settings = measured_bytes(row), described(row)
        return Score(row, measured, *predicted_bytes(settings))
    except CannotDescribeError as error:
        return Score(row, reason=str(error))
    except Exception as error:  # the other rows are worth having
        return Score(row, reason=f"its step cannot be built: {type(error).__name__}: {str(error)[:200]}")


def read(file: Path) -> list[Row]:
    """The rows of a CSV."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def is_accepted(row: Row) -> bool:
    """Whether a row counts for the estimator's main figure: exact, of `max_memory_allocated`, Qwen-1 left out."""
    return row["quality"] in ("A", "A+") and row["family"] != "qwen1" and "max_memory_allocated" in row["statistic"]


def figures(scores: Sequence[Score]) -> str:
    """How many rows were described, and the median and worst of their errors."""
    errors = [abs(score.error) for score in scores if not score.reason]
    shares = f"{len(errors):4} of {len(scores):4} described"
    if not errors:
        return shares
    return f"{shares}, median error {statistics.median(errors):6.2f} %, worst {max(errors):6.2f} %"


def summary(scores: Sequence[Score]) -> Iterable[str]:
    """The figures of the rows that count, and of all rows by class."""
    yield f"\nexact and allocated   {figures([s for s in scores if is_accepted(s.row)])}"
    rough = [s for s in scores if s.row["quality"] == "B"]
    yield f"B                     {figures(rough)}"
    yield f"B, Qwen2 and later    {figures([s for s in rough if _is_later_qwen(s.row)])}"
    classes: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("quality and statistic", lambda row: f"{row['quality']:2} {_statistic(row)}"),
        ("family", lambda row: row["family"]),
        ("framework", lambda row: row["framework"] or "not stated"),
    )
    for title, class_of in classes:
        grouped: dict[str, list[Score]] = defaultdict(list)
        for found in scores:
            grouped[class_of(found.row)].append(found)
        yield f"\nby {title}"
        for name, members in sorted(grouped.items()):
            yield f"  {figures(members)}  {name}"


def _is_later_qwen(row: Row) -> bool:
    return row["family"].startswith("qwen") and row["family"] != "qwen1"


def _statistic(row: Row) -> str:
    text = row["statistic"].lower()
    return next((word for word in ("allocated", "reserved") if f"max_memory_{word}" in text), "other")


def main(file: str) -> None:
    """Scores every row of a CSV."""
    print(f"{'id':6} {'measured':>10} {'predicted':>10} {'error':>8}    peak in (sizes in MiB)")
    scores: list[Score] = []
    for row in read(Path(file)):
        scores.append(score(row))
        print(scores[-1].line, flush=True)
    for line in summary(scores):
        print(line)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main(sys.argv[1])
