"""Charts of a run over its steps: what is drawn of long series, scales, ticks, and where everything stands.

Places are per mille of the plot's width and height, from the left and from the top, so that a page can stretch a plot
to any width and its texts keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

MOST_BUCKETS = 500  # of a series, each drawn by its lowest and its highest value
NUM_MEANS = 60  # of the line through a long series
FEWEST_MEANT = 3 * NUM_MEANS  # values of a series through which such a line is drawn
LOG_FROM = 5  # times the median: a higher peak would press the rest of a linear scale flat
NUM_COLOURS, LOOKS = 3, ("solid", "dashed", "dotted")
LONG_NAME = 6  # characters that need more room beside the plot
NEAREST_LABELS = 90  # per mille between two texts above each other
NEAREST_MARKS = 160  # and beside each other


@dataclass(frozen=True)
class Series:
    """Values by step, in order. `look` is how its line is told from others of its colour: solid, dashed or dotted."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    look: str = "solid"
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """What befell the run after a step, drawn as a line across the plot, with words where there is room for them."""

    step: int
    look: str
    words: str = ""


@dataclass(frozen=True)
class Chart:
    """A plot of some series from step to step. `from_zero` has the scale begin there, and stay linear."""

    id: str
    title: str
    series: Sequence[Series]
    first: int
    last: int
    marks: Sequence[Mark] = ()
    from_zero: bool = False
    note: str = ""
    has_means: bool = True

    def drawn(self) -> dict[str, Any]:
        """What a template needs of it: paths, texts with their places, values to be read, a sentence."""
        scale = _Scale.of([value for one in self.series for value in one.values], from_zero=self.from_zero)
        first, last = self.first, self.last
        span = max(1, last - first)
        notes = [self.note, "logarithmic" if scale.is_log else ""]
        lines, ends, read = list[dict[str, str]](), list[tuple[float, str, str]](), list[dict[str, Any]]()

        def path(steps: Sequence[int], values: Sequence[float]) -> str:
            across = (1000 * (step - first) / span for step in steps)
            places = [f"{x:.1f} {scale.place(value):.1f}" for x, value in zip(across, values, strict=True)]
            return f"M{'L'.join(places)}" if len(places) > 1 else f"M{places[0]}h0"

        for number, one in enumerate(self.series):
            kept = thinned(one.values, MOST_BUCKETS)
            steps, values = [one.steps[k] for k in kept], [one.values[k] for k in kept]
            many = self.has_means and len(one.values) >= FEWEST_MEANT
            colour = f"s{number % NUM_COLOURS}"
            lines.append({"look": f"{colour} {one.look}{' each' if many else ''}", "path": path(steps, values)})
            end = one.values[-1]
            read.append(_read(one.name, steps, values))
            if many:
                window = math.ceil(len(one.values) / NUM_MEANS)
                middle, means = averaged(one.steps, one.values, window)
                lines.append({"look": f"{colour} {one.look}", "path": path(middle, means)})
                read.append(_read("mean", middle, means))
                end = means[-1]
            elif one.has_dots:
                dots = "".join(path([step], [value]) for step, value in zip(steps, values, strict=True))
                lines.append({"look": f"{colour} dot", "path": dots})
            ends.append((scale.place(end), one.name, f"{colour} {one.look}"))
        return {
            "id": self.id,
            "title": self.title,
            "note": " · ".join(filter(None, notes)),
            "sentence": self.sentence(),
            "has_long_names": any(len(one.name) > LONG_NAME for one in self.series),
            "rows": [{"at": scale.place(value), "text": number_text(value)} for value in scale.ticks],
            "columns": [{"at": 1000 * (s - first) / span, "text": f"{s:,}"} for s in _step_ticks(first, last)],
            "lines": lines,
            "labels": [{"at": at, "text": text, "look": look} for at, text, look in _apart(sorted(ends))],
            "marks": list(_placed(self.marks, first, span)),
            "read": read,
            "first": first,
            "last": last,
        }

    def sentence(self) -> str:
        """What the plot shows, for those who do not see it."""
        parts = [
            f"{one.name} from {number_text(one.values[0])} at step {one.steps[0]:,} to {number_text(one.values[-1])} "
            f"at step {one.steps[-1]:,}, lowest {number_text(min(one.values))}, highest {number_text(max(one.values))}"
            for one in self.series
        ]
        return f"{self.title}: {'; '.join(parts)}."


def _read(name: str, steps: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    return {"name": name, "steps": list(steps), "values": [float(f"{value:.6g}") for value in values]}


def thinned(values: Sequence[float], num_buckets: int) -> list[int]:
    """The places, in order, that are drawn of a series: of each bucket the lowest and the highest, and both ends."""
    if len(values) <= 2 * num_buckets:
        return list(range(len(values)))
    edges = [len(values) * k // num_buckets for k in range(num_buckets + 1)]
    kept = {0, len(values) - 1}
    for start, stop in pairwise(edges):
        bucket = range(start, stop)
        kept |= {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)}
    return sorted(kept)


def averaged(steps: Sequence[int], values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Means of so many values each, at the step in their middle, the last at the last step."""
    starts = range(0, len(values), window)
    middle = [steps[min(start + window // 2, len(steps) - 1)] for start in starts]
    return [*middle[:-1], steps[-1]], [fmean(values[start : start + window]) for start in starts]


def number_text(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    """The vertical axis: its ends, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool

    @staticmethod
    def of(values: Sequence[float], *, from_zero: bool) -> _Scale:
        low, high = min(values), max(values)
        if low > 0 and not from_zero and high > LOG_FROM * median(values):
            low, high = low / 1.15, high * 1.15
            return _Scale(low, high, tuple(_powers(low, high)), is_log=True)
        low = min(0.0, low) if from_zero else low
        if high == low:
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        step = _round_step((high - low) / 4)
        edges = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
        ticks = tuple(float(f"{k * step:.12g}") for k in edges)
        return _Scale(ticks[0], ticks[-1], ticks, is_log=False)

    def place(self, value: float) -> float:
        """Per mille from the top."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 1000 * (high - value) / (high - low)


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _powers(low: float, high: float) -> Iterator[float]:
    """Ticks of a logarithmic scale: powers of ten, of which wide scales skip some and narrow ones show parts."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    skipped = math.ceil((last - first) / 6)
    for power in range(first, last + 1, skipped):
        for factor in (1,) if last - first > 2 else (1, 2, 5):
            if low <= (tick := float(f"{factor}e{power}")) <= high:
                yield tick


def _step_ticks(first: int, last: int) -> list[int]:
    if last - first < 2:
        return sorted({first, last})
    step = max(1, round(_round_step((last - first) / 5)))
    ticks = [tick for tick in range(step * math.ceil(first / step), last + 1, step) if tick - first > step / 3]
    return [first, *ticks]


def _apart(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Texts from the top down, none over another or beyond the plot."""
    placed = list[tuple[float, str, str]]()
    for k, (at, text, look) in enumerate(ends):
        above = placed[-1][0] + NEAREST_LABELS if placed else 0.0
        room = 1000 - NEAREST_LABELS * (len(ends) - 1 - k)
        placed.append((min(max(at, above), max(room, above)), text, look))
    return placed


def _placed(marks: Sequence[Mark], first: int, span: int) -> Iterator[dict[str, Any]]:
    """The marks within the plot; of words that would stand over others only the first are kept."""
    taken = list[float]()
    for mark in marks:
        at = 1000 * (mark.step - first) / span
        if 0 <= at <= 1000:
            free = bool(mark.words) and all(abs(at - other) >= NEAREST_MARKS for other in taken)
            if free:
                taken.append(at)
            yield {"at": at, "look": mark.look, "words": mark.words if free else ""}
