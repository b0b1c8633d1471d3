"""From a data file to samples: rows read, their format recognised, each parsed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from qwentune.data.faults import described
from qwentune.data.files import read_rows
from qwentune.data.formats import FORMATS, SIGNATURES, detect
from qwentune.data.sample import Sample
from qwentune.errors import DataError, Problem, nearest

NUM_ROWS_LOOKED_AT = 20  # to recognise a format


def read_samples(path: str, format: str, problems: list[Problem]) -> Iterator[Sample]:
    """The samples of a file in its order; rows that are wrong go to `problems` and reading goes on.

    `format` is a key of `FORMATS`, or `auto`. Raises DataError where no format is recognised, or one that is not
    trained on yet.
    """
    if format == "auto":
        format = _detected(path)
    if format not in FORMATS:
        what = f"rows of the format {format} cannot be trained on yet"
        raise DataError(Problem(path, what, f"The formats are {', '.join(FORMATS)}."))
    for row in read_rows(path, problems):
        if not isinstance(row.value, dict):
            problems.append(Problem(str(row.source), f"the row is {described(row.value)}", "A row is an object."))
            continue
        parsed = FORMATS[format](row.value, row.source)
        if isinstance(parsed, list):
            problems.extend(parsed)
        else:
            yield parsed


def _detected(path: str) -> str:
    problems: list[Problem] = []
    values = [row.value for row in islice(read_rows(path, problems), NUM_ROWS_LOOKED_AT)]
    format = detect(values)
    if format is not None:
        return format
    if not values and problems:
        raise DataError(problems)
    keys = list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))
    known = sorted({key for _, signature in SIGNATURES for key in signature})
    hint = next(filter(None, (nearest(key, known).strip() for key in keys)), "")
    signatures = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in SIGNATURES if name in FORMATS)
    what = f"no row format is recognised by the keys {', '.join(map(repr, keys[:10])) or 'of the first rows'}"
    raise DataError(Problem(path, what, f"{hint} The keys of {signatures}.".strip()))
