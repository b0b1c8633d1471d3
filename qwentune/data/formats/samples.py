"""From a data file to samples: rows read, their format recognised, each parsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

from qwentune.data.formats import FORMATS, detect, format_of
from qwentune.data.formats.suggestion import suggestion
from qwentune.data.reading.columns import Columns
from qwentune.data.reading.faults import Unread, described, too_many
from qwentune.data.reading.files import Content, Row, RowCount, read_rows
from qwentune.data.sample import Json, Pair, Sample
from qwentune.errors import DataError, Problem, nearest
from qwentune.recipe import DataSource
from qwentune.row_formats import MEDIA, ROW_FORMATS

NUM_ROWS_LOOKED_AT = 20  # to recognise a format
_TRAINED = f"What is trained: {', '.join(name for name, format in ROW_FORMATS.items() if format.is_trained)}."


def read_samples(
    path: str,
    format: str,
    problems: list[Problem],
    *,
    content: Content | None = None,
    count: RowCount | None = None,
    columns: Columns | None = None,
    max_rows: int | None = None,
) -> Iterator[Sample]:
    """The samples of a file in its order; rows that are wrong go to `problems` and reading goes on.

    `format` is a key of `FORMATS`, or `auto`; `columns` say which names the file has for ours. Each row is counted into
    `count`. Nothing is read behind the first `max_rows` rows that can be. Raises DataError where no format is
    recognised, or where the file does not hold `content`.
    """
    if format == "auto":
        format = detected(path, content, columns)
    count = RowCount() if count is None else count
    for row in source_rows(path, problems, content=content, count=count, columns=columns, max_rows=max_rows):
        if too_many(path, problems):
            return
        sample = sample_of(row, format, columns)
        if isinstance(sample, list):
            count.refused += 1
            problems.extend(sample)
        else:
            yield sample


def source_rows(
    path: str,
    problems: list[Problem],
    *,
    content: Content | None = None,
    count: RowCount | None = None,
    columns: Columns | None = None,
    max_rows: int | None = None,
) -> Iterator[Row]:
    """The rows of a source: the first `max_rows` of its file that can be read, of which one has each of its columns.

    Each row is counted into `count`. Raises DataError where the file does not hold `content`.
    """
    count = RowCount() if count is None else count
    missing: dict[str, str] = dict(columns.columns) if columns else {}
    row = None
    noted: list[Problem] = []  # while reading, also ahead
    read = ((row, len(noted)) for row in islice(read_rows(path, noted, content=content, count=count), max_rows))
    head = list(islice(read, NUM_ROWS_LOOKED_AT))
    names = {*MEDIA, *(theirs for ours, theirs in missing.items() if ours in MEDIA)}
    of_media = sorted({name for row, _ in head if isinstance(row.value, dict) for name in row.value if name in names})
    num_told = 0
    for row, num_noted in chain(head, read):
        problems += noted[num_told:num_noted]
        num_told = num_noted
        if isinstance(row.value, dict):
            if missing:
                missing = {ours: theirs for ours, theirs in missing.items() if theirs not in row.value}
            for name in of_media:  # a row without the column has an empty one, as in a table
                row.value.setdefault(name, None)
        yield row
    problems += noted[num_told:]
    count.is_complete |= max_rows is not None  # as far as was asked for
    if missing and count.read:
        problems += _no_such_columns(path, missing, row.value if row else None)


def sample_of(row: Row, format: str, columns: Columns | None = None) -> Sample | list[Problem]:
    """The sample that a row of the format is, or everything that is wrong with the row."""
    if not isinstance(row.value, dict):
        return [Problem(str(row.source), f"the row is {described(row.value)}", "A row is an object.")]
    value, displaced = columns.renamed(row.value) if columns else (row.value, ())
    parsed = FORMATS[format](value, row.source)
    if not isinstance(parsed, list):
        return _with_unread(parsed, displaced) if displaced else parsed
    if (own := format_of(value)) not in (None, format):
        what = f"the row has the keys of the format {own}, in a file of the format {format}"
        return [Problem(str(row.source), what, "Give rows of another format a file and a source of their own.")]
    return parsed


def _with_unread(sample: Sample, keys: Sequence[str]) -> Sample:
    if isinstance(sample, Pair):
        return replace(sample, chosen=replace(sample.chosen, unread=(*sample.chosen.unread, *keys)))
    return replace(sample, unread=(*sample.unread, *keys))


def _no_such_columns(path: str, missing: Mapping[str, str], row: Json) -> list[Problem]:
    """Of columns of the recipe, by our names, that no row of a file has; `row` is one of its rows."""
    names = row if isinstance(row, dict) else {}
    fix = f"Its rows have {', '.join(map(repr, islice(names, 20)))}: name one of them, or leave it out of `columns`."
    return [
        Unread(
            path,
            f"no row has the column {theirs!r}, which is to be {ours!r}",
            f"{nearest(theirs, names)} {fix}".strip(),
        )
        for ours, theirs in missing.items()
    ]


def refuse_untrained(sources: Iterable[DataSource]) -> None:
    """Raises DataError naming every source whose rows cannot be trained on yet."""
    formats = {source.path: format_of_source(source) for source in sources}
    problems = [
        Problem(path, f"rows of the format {format} can be previewed, but not trained on yet", _TRAINED)
        for path, format in formats.items()
        if not ROW_FORMATS[format].is_trained
    ]
    if problems:
        raise DataError(problems)


def format_of_source(source: DataSource) -> str:
    """The format that a source names, or the one of its first rows; DataError where none is recognised."""
    return detected(source.path, columns=Columns.of(source)) if source.format == "auto" else source.format


def detected(path: str, content: Content | None = None, columns: Columns | None = None) -> str:
    """The format of a file by its first rows; DataError, with a suggested renaming, where none is recognised."""
    problems: list[Problem] = []
    values = [row.value for row in islice(read_rows(path, problems, content=content), NUM_ROWS_LOOKED_AT)]
    if columns:
        values = [columns.renamed(value)[0] if isinstance(value, dict) else value for value in values]
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
