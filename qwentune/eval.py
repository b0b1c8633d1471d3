"""`qwentune eval RUN`: what the tuned model is worth on rows, beside its base if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DataError, Problem, UsageError, counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qwentune.data.dataset import Dataset
    from qwentune.exporting.finished import FinishedRun
    from qwentune.recipe import DataOptions, DataSource
    from qwentune.scores.case import Case

EVALUATION = "eval.json"  # what `--json` prints, kept in the run folder
FEW_ROWS = 30


def eval(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option(help="Rows in any format that can be trained; else the run's held-out rows.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model beside the tuned one.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each source, this many.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer; else twice those of the taught one, 256 at least."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score the tuned model on rows: loss, and its answers beside the taught ones."""
    console.end(console.run(lambda: run_eval(run, data, base, limit, max_tokens, as_json)))


def run_eval(
    folder: Path, file: str | None, with_base: bool, limit: int | None, max_tokens: int | None, as_json: bool
) -> int:
    """Scores a run and prints what comes of it; the exit code."""
    from qwentune.bounded import refuse_name

    refuse_name("--data", file or ".")
    with console.busy("looking at the run"):
        from qwentune.evaluating.comparison import EXAMPLES, compared, records
        from qwentune.evaluating.measure import measured
        from qwentune.evaluating.questions import questions
        from qwentune.exporting.finished import open_run
        from qwentune.exporting.speakers import networks, speaker
        from qwentune.pages.run_page import RunPage
        from qwentune.training.run_folder import RunFolder

        run = open_run(folder)
    dataset, chosen = _rows(run, file, limit)
    has_reasoning = run.template is not None and run.template.reasoning_form is not None
    asked = list(questions(dataset, chosen, run.tokenizer, has_reasoning=has_reasoning))
    with console.busy("evaluating"):
        found: dict[str, list[Case]] = {}
        for whose, network in networks(run, with_base=with_base):
            found[whose] = measured(asked, dataset, speaker(run, network), whose=whose, most_tokens=max_tokens)
            del network  # before the next one is loaded
    scores = compared(asked, found["tuned"], found.get("base"))
    if as_json:
        console.show_json(scores)
    else:
        for name, source in scores["sources"].items():
            console.show("\n".join(_table(name, source)))
    kept = RunFolder(folder)
    kept.write_json(EVALUATION, scores)
    kept.write_rows(EXAMPLES, records(asked, found["tuned"], found.get("base")))
    RunPage(kept).write()
    console.say(f"each example, the worst first: {folder / EXAMPLES}")
    return EXIT_OK


def _rows(run: FinishedRun, file: str | None, limit: int | None) -> tuple[Dataset, Sequence[int]]:
    """The rendered rows, and which of their examples count."""
    from dataclasses import replace

    from qwentune.data.dataset import prepare
    from qwentune.data.formats.samples import refuse_untrained
    from qwentune.data.summary import summary
    from qwentune.evaluating.questions import first_rows

    data, tokenizer = run.data, replace(run.tokenizer, folder=str(run.checkpoint))
    if file is not None:
        source = _source(data, file).model_copy(update={"max_rows": limit})
        data = data.model_copy(update={"train": [source], "evaluation": None, "eval_fraction": 0.0})
        refuse_untrained(data.sources)
    elif not (data.evaluation or data.eval_fraction):
        raise UsageError(_none_held_out(run))
    dataset = prepare(data, tokenizer, run.template, run.seed)
    if file is None:
        if not len(dataset.examples.evaluation):
            raise DataError(_none_held_out(run))
        if run.trained_data not in (None, dataset.content):
            console.say(
                "warning: the rows were changed since the run: some of those held out now may have been trained"
            )
    else:
        for line in summary(dataset):
            console.say(line)
    chosen = dataset.first_epoch if file is not None else dataset.examples.evaluation
    numbers: list[int] = chosen.tolist()
    return dataset, numbers if limit is None else first_rows(numbers, dataset, limit)


def _none_held_out(run: FinishedRun) -> Problem:
    fix = "Name rows with --data FILE; a run holds some out with data.eval_fraction, or names them as data.eval."
    return Problem(str(run.folder), "has no held-out rows", fix)


def _source(data: DataOptions, file: str) -> DataSource:
    """The file as a source: the recipe's own where it names it; where no format is recognised, under the other names
    that a source of the recipe gives to its columns and tags."""
    from qwentune.data.formats.samples import format_of_source
    from qwentune.recipe import DataSource

    for source in data.sources:
        if source.path == file:
            return source.model_copy(update={"repeat": 1.0})
    plain = DataSource(path=file)
    try:
        format_of_source(plain)
    except DataError:
        for source in data.sources:
            renamed = plain.model_copy(update={"columns": source.columns, "tags": source.tags})
            if source.columns or source.tags:
                try:
                    format_of_source(renamed)
                except DataError:
                    continue
                return renamed
        raise
    return plain


def _table(name: str, source: Mapping[str, Any]) -> list[str]:
    """The scores of one source in lines."""
    from qwentune.evaluating.comparison import in_brackets, in_words

    whose = ["base", "tuned"] if source["base"] is not None else ["tuned"]
    rows: list[list[str]] = [["", *whose, *(["difference"] if whose[1:] else [])]]
    intervals: dict[str, dict[str, list[float]]] = source["intervals"]
    for score, of in intervals.items():
        count = source["counts"][score]
        values = [float(source[one][score]) for one in whose]
        cells = [
            f"{in_words(value, score, count)} {in_brackets(of[one])}" for one, value in zip(whose, values, strict=True)
        ]
        if values[1:]:
            cells.append(f"{values[1] - values[0]:+.4g} {in_brackets(of['difference'])}")
        rows.append([score, *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    few = "; few rows prove little" if source["rows"] < FEW_ROWS else ""
    heading = f"{name} · {counted(source['rows'], 'row{|s}')} · 95 % intervals in brackets{few}"
    return [heading, *(f"  {line}" for line in lines)]


if __name__ == "__main__":
    console.main(eval)
