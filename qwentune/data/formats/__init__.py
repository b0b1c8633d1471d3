"""Row formats: how a row of each kind becomes a sample, and how a kind is recognised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeAlias

from qwentune.data.sample import Json, Sample, Source
from qwentune.errors import Problem
from qwentune.row_formats import ROW_FORMATS

Parse: TypeAlias = Callable[[dict[str, Json], Source], Sample | list[Problem]]

_MODULES = {name: import_module(f"{__name__}.{name}") for name in ROW_FORMATS}
FORMATS: dict[str, Parse] = {name: module.parse for name, module in _MODULES.items()}


def detect(rows: Sequence[Json]) -> str | None:
    """The format whose keys most of the rows have; None where no row has those of any."""
    found = [name for row in rows if isinstance(row, dict) and (name := format_of(row))]
    return max(found, key=found.count, default=None)


def format_of(row: dict[str, Json]) -> str | None:
    """The format whose keys a row has; None where it has those of none.

    A module whose format's keys are not its alone says with `fits` whether their values are those of such a row.
    """
    keys = row.keys()
    for name, format in ROW_FORMATS.items():
        if any(signature <= keys for signature in format.signatures):
            fits: Callable[[dict[str, Json]], bool] | None = getattr(_MODULES[name], "fits", None)
            if fits is None or fits(row):
                return name
    return None
