"""`qwentune preview RECIPE`: the data exactly as training will see it, by the same code."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DataError, Problem, RecipeError, UsageError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from qwentune.data.dataset import Dataset
    from qwentune.data.rendering.example import Example
    from qwentune.data.tokenizing.tokenizer import Tokenizer
    from qwentune.recipe import LoadedRecipe, Recipe

BAR_WIDTH = 40
NUM_SHOWN, NUM_IN_HTML, NUM_LOOKED_THROUGH = 5, 200, 20_000  # examples
MOST_PATCHES = 400_000  # of media that are drawn on a page: some 20 s


def preview(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value: keys to change for this time.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="How many examples to show; else 5, or 200 with --html.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for a browser to this file.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Write every example of the first epoch to this file, one a line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report of the whole dataset as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 3 where there is any warning.")] = False,
) -> None:
    """Show what is trained: masked text, lengths, what was dropped and why."""
    console.end(console.run(lambda: run(recipe, overrides or [], limit, jsonl, html, as_json, strict)))


def run(
    recipe_path: str,
    overrides: list[str],
    limit: int | None,
    jsonl: Path | None,
    html: Path | None,
    as_json: bool,
    strict: bool,
) -> int:
    """Renders the data and prints it; the exit code."""
    from qwentune.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides)
    _refuse_outputs(recipe_path, loaded.recipe, {"--jsonl": jsonl, "--html": html})
    with loaded.located():
        _refuse_what_no_model_has(loaded.recipe)
        code = _show(loaded, limit, jsonl, html, as_json=as_json, strict=strict)
    if code == EXIT_OK:
        console.say_next("qwentune", "plan", recipe_path, *overrides)
    return code


def _refuse_outputs(recipe_path: str, recipe: Recipe, outputs: Mapping[str, Path | None]) -> None:
    """Raises UsageError for every file, by its option, that cannot be written or would overwrite what is read."""
    from qwentune.bounded import refuse_name

    names = (recipe_path, recipe.data.chat_template, *(source.path for source in recipe.data.sources))
    read = {Path(name).resolve() for name in names if name}
    problems: list[Problem] = []
    for option, file in outputs.items():
        if file is None:
            continue
        refuse_name(option, file)
        if file.is_dir() or not file.absolute().parent.is_dir():
            problems.append(Problem(option, f"{str(file)!r} cannot be written", "Name a file in a folder that exists."))
        elif file.resolve() in read:
            what = f"{str(file)!r} is what the preview reads, and would be overwritten"
            problems.append(Problem(option, what, "Name another file."))
    if problems:
        raise UsageError(problems)


def _refuse_what_no_model_has(recipe: Recipe) -> None:
    """Raises UserError where the recipe names a checkpoint or modules that cannot be trained so."""
    from qwentune.facts.models import previewed_spec
    from qwentune.facts.modules import unknown_targets

    spec = previewed_spec(recipe.model, packing=recipe.data.packing)
    if spec is not None and recipe.tuning.kind != "full" and (problems := unknown_targets(spec, recipe.tuning.targets)):
        raise RecipeError(problems)


def _show(
    loaded: LoadedRecipe, limit: int | None, jsonl: Path | None, html: Path | None, *, as_json: bool, strict: bool
) -> int:
    """Writes the files that are asked for and prints the rest; the exit code.

    What the data makes one say stands on stderr in every mode; a terminal, which shows both, gets it once.
    """
    from rich.console import Console

    from qwentune.data.dataset import chat_template, prepare
    from qwentune.data.formats.samples import format_of_source
    from qwentune.data.layout.schedule import Schedule
    from qwentune.data.summary import summary
    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
    from qwentune.data.tokenizing.tokenizer import load_tokenizer
    from qwentune.pages.preview_page import ShownExample, html_report

    recipe = loaded.recipe
    tokenizer = load_tokenizer(checkpoint_folder(recipe.model, recipe.revision))
    template = chat_template(recipe.data, tokenizer)
    shares = recipe.memory.shares_prefixes
    dataset = prepare(recipe.data, tokenizer, template, recipe.seed, shares_prefixes=shares)
    report, is_terminal = whole_report(dataset), sys.stdout.isatty()
    if jsonl is not None:
        with jsonl.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in example_rows(dataset))
    if html is not None:
        formats = {source.path: format_of_source(source) for source in recipe.data.sources}
        thumbnails = Thumbnails(dataset)
        shown = [
            ShownExample(
                str(example.source),
                title(example, tokenizer),
                formats[example.source.file],
                example.turns,
                masked_spans(example, tokenizer),
                thumbnails.of(example),
            )
            for example in _examples_of_page(dataset, NUM_IN_HTML if limit is None else limit)
        ]
        steps = Schedule.of(dataset.train.per_epoch, recipe.batch, recipe.optimizer, recipe.seed).num_steps
        page = html_report(loaded.path, report, dataset, tokenizer, shown, steps)
        html.write_text(page, encoding="utf-8")
    for file in filter(None, (jsonl, html)):
        console.say(f"wrote {file}")
    if as_json:
        console.show_json(report)
    elif (jsonl is None and html is None) or is_terminal:
        terminal = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for i in dict.fromkeys(dataset.first_epoch[: NUM_SHOWN if limit is None else limit].tolist()):
            show_example(terminal, dataset.examples.example(i), tokenizer)
        show_report(terminal, report, [] if is_terminal else summary(dataset))
    for line in summary(dataset):
        console.say(line)
    if strict and (count := len(report["warnings"])):
        console.say(f"{counted(count, 'warning{|s}')}, and --strict allows none.")
        return DataError.exit_code
    return EXIT_OK


def _examples_of_page(dataset: Dataset, limit: int) -> Iterator[Example]:
    """The first examples, and of those behind them the ones that a warning names."""
    named = set(re.findall(r"\S+:\d+", " ".join(dataset.report["warnings"]))) if limit else set[str]()
    for place, i in enumerate(dict.fromkeys(dataset.first_epoch[:NUM_LOOKED_THROUGH].tolist())):
        if place < limit or str(dataset.examples.source(i)) in named:
            yield dataset.examples.example(i)


def example_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """One JSON object per training example of the first epoch, in order before shuffling and packing."""
    for i in dataset.first_epoch.tolist():
        example = dataset.examples.example(i)
        trained = [weight != 0 for weight in example.weights]
        plain = all(weight == 1 for weight in example.weights if weight)
        input_ids, media = _with_pads(example, dataset)
        yield {
            "source": {"file": example.source.file, "line": example.source.line},
            **({"part": example.part} if example.part else {}),
            "turns": list(example.turns),
            "input_ids": input_ids,
            "labels": [token if on else -100 for token, on in zip(input_ids, trained, strict=True)],
            "weights": None if plain else example.weights,
            **({} if media is None else {"media": media}),
        }


def _with_pads(example: Example, dataset: Dataset) -> tuple[list[int], list[dict[str, Any]] | None]:
    """The ids of an example as the model is given them, and the media that it shows, each with where its pads begin.

    None where no example of the data shows any.
    """
    if dataset.media is None:
        return example.input_ids, None
    import numpy as np

    ids = np.asarray(example.input_ids, dtype=np.int32)
    shown = [(start, dataset.media.seen[number]) for start, number in dataset.media.places(ids)]
    return dataset.media.in_model(ids).tolist(), [
        {"kind": seen.kind, "path": seen.path, "start": start, "tokens": seen.num_tokens, "grid": list(seen.grid)}
        for start, seen in shown
    ]


def whole_report(dataset: Dataset) -> dict[str, Any]:
    """The data report with what packing makes of it."""
    rows = dataset.train
    num_rows = rows.per_epoch[0]
    tokens = sum(rows.num_tokens[:num_rows])
    filled = tokens / max(1, num_rows * dataset.tokens_per_row) if dataset.packing else None
    packing = {"rows": num_rows, "tokens": tokens, "filled": None if filled is None else round(filled, 4)}
    return {**dataset.report, "fingerprint": dataset.fingerprint, "packing": packing}


def masked_spans(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The example's text in spans, each with whether it is trained."""
    pairs = zip(example.input_ids, example.weights, strict=True)
    return [
        (_text([token for token, _ in span], example, tokenizer), trained)
        for trained, span in groupby(pairs, key=lambda pair: pair[1] != 0)
    ]


class Thumbnails:
    """Small pictures of the media of examples, each made once, until their patches are many."""

    def __init__(self, dataset: Dataset) -> None:
        self.media = dataset.media
        self.made: dict[int, list[str]] = {}
        self.num_left = MOST_PATCHES

    def of(self, example: Example) -> list[tuple[str, str]]:
        """`data:` URLs of what an example shows, each with its label."""
        if self.media is None:
            return []
        import numpy as np

        from qwentune.data.media.pads import label

        found: list[tuple[str, str]] = []
        for _, number in self.media.places(np.asarray(example.input_ids, dtype=np.int32)):
            seen = self.media.seen[number]
            found += [
                (url, label(seen, seen.num_tokens)) for url in self._made(number, math.prod(filter(None, seen.grid)))
            ]
        return found

    def _made(self, number: int, num_patches: int) -> list[str]:
        from qwentune.data.layout.media_table import UnloadableError
        from qwentune.data.media.thumbnails import thumbnails

        assert self.media is not None
        if number not in self.made and num_patches <= self.num_left:
            self.num_left -= num_patches
            try:
                loaded = self.media.load(number)
            except UnloadableError as unloadable:
                raise self.media.fault(unloadable, self.media.seen[number].path) from None
            self.made[number] = thumbnails(self.media.seen[number], loaded, self.media.limits)
        return self.made.get(number, [])


def _text(ids: Sequence[int], example: Example, tokenizer: Tokenizer) -> str:
    """The text of ids, media as their size and number of tokens."""
    if not example.media:
        return tokenizer.decode(ids)
    from qwentune.data.media.pads import label, number_of

    runs = ((pad, list(run)) for pad, run in groupby(ids, key=lambda token: min(token, 0)))
    return "".join(
        label(example.media[number_of(pad)], len(run)) if pad else tokenizer.decode(run) for pad, run in runs
    )


def show_example(terminal: Console, example: Example, tokenizer: Tokenizer) -> None:
    """Prints one example; trained text stands in ⟦ ⟧, bold where the terminal can."""
    from rich.text import Text

    terminal.print(f"── {console.shown(title(example, tokenizer))}")
    text = Text()
    for span, is_trained in masked_spans(example, tokenizer):
        text.append(
            f"⟦{console.shown(span)}⟧" if is_trained else console.shown(span), "bold green" if is_trained else "dim"
        )
    terminal.print(text)
    terminal.print()


def title(example: Example, tokenizer: Tokenizer) -> str:
    """Where an example comes from, what of it is trained, and how long it is."""
    trained = sum(weight != 0 for weight in example.weights)
    what = f"turns {', '.join(map(str, example.turns))}" if example.turns else "text"
    if not example.turns and tokenizer.control_ids.get("<|fim_middle|>") in example.input_ids:
        what = "fill in the middle"
    part = f"{example.part} · " if example.part else ""
    return f"{example.source} · {part}{what} · {len(example.input_ids)} tokens, {trained} trained"


def show_report(terminal: Console, report: dict[str, Any], said: Sequence[str]) -> None:
    """Prints the numbers of the whole dataset, and what was said of it."""
    terminal.print("── the whole dataset")
    packing = report["packing"]
    filled = "" if packing["filled"] is None else f", {packing['filled']:.0%} full"
    terminal.print(f"{packing['rows']} rows per epoch{filled} · expansion factor {report['expansion_factor']:.2f}")
    modes = ", ".join(f"{count} {mode.replace('_', '-')}" for mode, count in report["modes"].items())
    stops = ", ".join(f"{name} × {count}" for name, count in report["stop_tokens"].items())
    terminal.print(f"turns trained: {modes or 'none'} · trained ends: {stops or 'none'}")
    if report["fim"]:
        terminal.print("code: " + ", ".join(f"{count} {order}" for order, count in report["fim"].items()))
    if report["logged_calls"]:
        terminal.print(
            f"logged calls: {report['logged_calls']}, of which {report['calls_going_on']} go on with the dialogue of "
            f"another and {report['calls_logged_again']} were logged before; of each only its response is trained, once"
        )
    histogram = report["lengths"]["histogram"]
    most = max((bucket["examples"] for bucket in histogram), default=1)
    for bucket in histogram:
        bar = "█" * round(BAR_WIDTH * bucket["examples"] / most)
        terminal.print(f"  ≤ {bucket['up_to']:>6} tokens  {bar} {bucket['examples']}")
    for line in said:
        terminal.print(console.shown(line))


if __name__ == "__main__":
    console.main(preview)
