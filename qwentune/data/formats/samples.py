"""From a data file to samples: rows read, their format recognised, each parsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from qwentune.data.formats import FORMATS, detect, format_of
from qwentune.data.formats.suggestion import suggestion
from qwentune.data.reading.faults import described, too_many
from qwentune.data.reading.files import Content, RowCount, read_rows
from qwentune.data.sample import Sample
from qwentune.errors import DataError, Problem, nearest
from qwentune.row_formats import ROW_FORMATS

NUM_ROWS_LOOKED_AT = 20  # to recognise a format
_TRAINED = f"What is trained: {', '.join(name for name, format in ROW_FORMATS.items() if format.is_trained)}."


def read_samples(
    path: str,
    format: str,
    problems: list[Problem],
    *,
    content: Content | None = None,
    count: RowCount | None = None,
    max_rows: int | None = None,
) -> Iterator[Sample]:
    """The samples of a file in its order; rows that are wrong go to `problems` and reading goes on.

    `format` is a key of `FORMATS`, or `auto`. Each row is counted into `count`. Nothing is read behind the first
    `max_rows` rows that can be. Raises DataError where no format is
    recognised, or where the file does not hold `content`.
    """
    if format == "auto":
        format = detected(path, content)
    count = RowCount() if count is None else count
    for row in islice(read_rows(path, problems, content=content, count=count), max_rows):
        if too_many(path, problems):
            return
        if not isinstance(row.value, dict):
            count.refused += 1
            problems.append(Problem(str(row.source), f"the row is {described(row.value)}", "A row is an object."))
            continue
        parsed = FORMATS[format](row.value, row.source)
        if isinstance(parsed, list):
            own = format_of(row.value)
            if own not in (None, format):
                what = f"the row has the keys of the format {own}, in a file of the format {format}"
                parsed = [
                    Problem(str(row.source), what, "Give rows of another format a file and a source of their own.")
                ]
            count.refused += 1
            problems.extend(parsed)
        else:
            yield parsed
    count.is_complete |= max_rows is not None  # as far as was asked for


def refuse_untrained(sources: Iterable[tuple[str, str]]) -> None:
    """Raises DataError naming every source, a path and a format, whose rows cannot be trained on yet."""
    formats = {path: detected(path) if format == "auto" else format for path, format in sources}
    problems = [
        Problem(path, f"rows of the format {format} can be previewed, but not trained on yet", _TRAINED)
        for path, format in formats.items()
        if not ROW_FORMATS[format].is_trained
    ]
    if problems:
        raise DataError(problems)


def detected(path: str, content: Content | None = None) -> str:
    """The format of a file by its first rows; DataError, with a suggested renaming, where none is recognised."""
    problems: list[Problem] = []
    values = [row.value for row in islice(read_rows(path, problems, content=content), NUM_ROWS_LOOKED_AT)]
    format = detect(values)
    if format is not None:
        return format
    if not values and problems:
        raise DataError(problems)
    keys = list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))
    signatures = [(name, keys) for name, format in ROW_FORMATS.items() for keys in format.signatures]
    known = sorted({key for _, keys in signatures for key in keys})
    hint = next(filter(None, (nearest(key, known).strip() for key in keys if key not in known)), "")
    hint = suggestion(values, path) or hint
    listed = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in signatures)
    what = f"no row format is recognised by the keys {', '.join(map(repr, keys[:10])) or 'of the first rows'}"
    raise DataError(Problem(path, what, f"{hint} The keys of {listed}.".strip()))
