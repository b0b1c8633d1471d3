"""Rows in blocks: some rows as they are read of a source, and what becomes of them, which one process does alone."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from qwentune.console import busy
from qwentune.data.formats.samples import detected, sample_of, source_rows
from qwentune.data.layout.store import ExampleColumns, ExampleWriter
from qwentune.data.reading.columns import Columns
from qwentune.data.reading.faults import Unread, too_many
from qwentune.data.reading.files import Content, Row, RowCount
from qwentune.data.rendering.outcome import Dropped, Outcome
from qwentune.data.rendering.render import Renderer
from qwentune.data.report import Tally
from qwentune.data.sample import Sample, Source
from qwentune.data.workers import Workers
from qwentune.errors import Problem
from qwentune.recipe import DataSource

MOST_ROWS = 256
MOST_BYTES = 2**18  # pickled, so that a few hundred long rows are work for several, and what is in flight is bounded
READ_OTHERWISE = (
    "the rows of {} are rendered turn by turn, which takes longer: the turns read off one rendering are not what the "
    "chat template gives at {}. This is a bug of qwentune: please report it with the row."
)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a source in its order, each by its line and pickled, and what reading noted on the way to their end."""

    source_number: int
    path: str
    format: str
    columns: Columns | None
    by_rule: bool  # each turn is to be rendered on its own
    rows: list[tuple[int, bytes]]
    problems: list[Problem]

    def __str__(self) -> str:
        return f"{self.path}:{self.rows[0][0]} to {self.rows[-1][0]}" if self.rows else self.path


@dataclass(slots=True)
class Rendered:
    """What became of the rows of a block or, one block after the other, of a source, but for the tokens."""

    begins: array[int] = field(default_factory=lambda: array("q"))  # of each sample that has examples, its first one
    identities: array[int] = field(default_factory=lambda: array("q"))  # of the same samples
    lines: array[int] = field(default_factory=lambda: array("q"))  # of the same samples
    answers: array[int] = field(default_factory=lambda: array("Q"))  # of logged calls, as their sample has them
    before: array[int] = field(default_factory=lambda: array("Q"))  # of the calls that they go on with
    versions: array[int] = field(default_factory=lambda: array("h"))  # of the examples
    tally: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list[Problem])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    num_refused: int = 0  # rows that are no sample of their format

    def count(self, outcome: Outcome) -> None:
        """Counts in what became of the next sample."""
        self.tally.add(outcome)
        self.problems += outcome.problems
        self.dropped += outcome.dropped
        if outcome.examples:
            self.begins.append(len(self.versions))
            self.identities.append(outcome.identity)
            self.lines.append(outcome.source.line)
            self.answers.append(outcome.answers[-1] if outcome.answers else 0)
            self.before.append(outcome.answers[-2] if outcome.answers[1:] else 0)
            self.versions.extend(example.version for example in outcome.examples)

    def merge(self, later: Rendered) -> None:
        """Counts in the samples of the next block."""
        num_before = len(self.versions)
        self.begins.extend(num_before + begin for begin in later.begins)
        for name in ("identities", "lines", "answers", "before", "versions", "problems", "dropped"):
            getattr(self, name).extend(getattr(later, name))
        self.tally.merge(later.tally)
        self.num_refused += later.num_refused


def read_blocks(
    source: DataSource, number: int, content: Content, count: RowCount, *, by_rule: bool = False
) -> Iterator[Block]:
    """All rows of a source; they are counted into `count`. Raises DataError where its file does not hold `content`.

    Where blocks end depends on nothing but the file, and so does all that is made of them.
    """
    columns = Columns.of(source)
    format = detected(source.path, content, columns) if source.format == "auto" else source.format
    problems: list[Problem] = []
    num_told = 0

    def block() -> Block:
        return Block(number, source.path, format, columns, by_rule, rows, problems[num_told:])

    rows: list[tuple[int, bytes]] = []
    num_bytes = 0
    for row in source_rows(
        source.path, problems, content=content, count=count, columns=columns, max_rows=source.max_rows
    ):
        rows.append((row.source.line, pickle.dumps(row.value, pickle.HIGHEST_PROTOCOL)))
        num_bytes += len(rows[-1][1])
        if len(rows) == MOST_ROWS or num_bytes > MOST_BYTES:
            yield block()
            rows, num_bytes, num_told = [], 0, len(problems)
    if rows or len(problems) > num_told:
        yield block()


@dataclass(frozen=True)
class BlockRenderer:
    """Renders the rows of blocks."""

    renderer: Renderer

    @cached_property
    def by_rule(self) -> Renderer:
        """Renders each turn on its own."""
        return replace(self.renderer, by_rule=True)

    def __call__(self, block: Block) -> tuple[ExampleColumns, Rendered]:
        """The examples of the rows, and what became of each.

        Raises ReadOtherwiseError where a row that is checked is not read off as the rule has it.
        """
        examples, rendered = ExampleColumns(), Rendered(problems=list(block.problems))
        if block.rows:
            renderer = self.by_rule if block.by_rule else self.renderer
            for outcome in renderer.render_all(_samples(block, rendered), block.source_number):
                rendered.count(outcome)
                examples.add(outcome.examples)
        return examples, rendered


def _samples(block: Block, rendered: Rendered) -> Iterator[Sample]:
    for line, value in block.rows:
        sample = sample_of(Row(Source(block.path, line), pickle.loads(value)), block.format, block.columns)
        if isinstance(sample, list):
            rendered.num_refused += 1
            rendered.problems += sample
        else:
            yield sample


def render_source(
    source: DataSource,
    number: int,
    content: Content,
    workers: Workers[Block, tuple[ExampleColumns, Rendered]],
    writer: ExampleWriter,
    *,
    by_rule: bool = False,
) -> tuple[Rendered, RowCount]:
    """What became of the rows of a source, whose examples are written, and how many rows it has.

    Raises ReadOtherwiseError where it is to be rendered by the rule, DataError where it does not hold `content`.
    """
    whole, count = Rendered(), RowCount()
    blocks = read_blocks(source, number, content, count, by_rule=by_rule)
    with busy(f"rendering {source.path}, row") as state:
        for examples, rendered in workers.results(blocks):
            writer.add(examples, source.path)
            whole.merge(rendered)
            state.done = whole.tally.counts["samples"] + whole.num_refused
            if any(isinstance(one, Unread) for one in rendered.problems) or too_many(source.path, whole.problems):
                break
    count.refused += whole.num_refused
    whole.problems.sort(key=lambda problem: source_of(problem, source.path).line)  # the reader's come block by block
    return whole, count


def source_of(problem: Problem, file: str) -> Source:
    """The row of a file in which a problem is; of line 0 where it is the file's."""
    digits = problem.where.removeprefix(f"{file}:").split(":")[0]
    return Source(file, int(digits) if digits.isdigit() else 0)
