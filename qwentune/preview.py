"""`qwentune preview RECIPE`: the data exactly as training will see it, by the same code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DataError, Problem, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from qwentune.data.dataset import Dataset
    from qwentune.data.rendering.example import Example
    from qwentune.data.tokenizing.tokenizer import Tokenizer

BAR_WIDTH = 40
NUM_SHOWN, NUM_IN_HTML = 5, 200  # examples


def preview(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, as often as needed.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Examples to show: 5, or 200 in HTML.")] = None,
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
    from rich.console import Console

    from qwentune.bounded import refuse_name
    from qwentune.data.dataset import chat_template, prepare
    from qwentune.data.layout.schedule import Schedule
    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
    from qwentune.data.tokenizing.tokenizer import load_tokenizer
    from qwentune.facts.models import refuse_packing
    from qwentune.html_report import html_report
    from qwentune.recipe import load_recipe

    outputs = [(option, file) for option, file in (("--jsonl", jsonl), ("--html", html)) if file is not None]
    for option, file in outputs:
        refuse_name(option, file)
    unwritable = [
        Problem(option, f"{str(file)!r} cannot be written", "Name a file in a folder that exists.")
        for option, file in outputs
        if file.is_dir() or not file.absolute().parent.is_dir()
    ]
    if unwritable:
        raise UsageError(unwritable)
    recipe = load_recipe(recipe_path, overrides).recipe
    sources = [*recipe.data.train, *(recipe.data.evaluation or ())]
    read = {
        Path(name).resolve() for name in (recipe_path, recipe.data.chat_template, *(s.path for s in sources)) if name
    }
    overwriting = [
        Problem(option, f"{str(file)!r} is what the preview reads, and would be overwritten", "Name another file.")
        for option, file in outputs
        if file.resolve() in read
    ]
    if overwriting:
        raise UsageError(overwriting)
    if recipe.data.packing:
        refuse_packing(recipe.model)
    tokenizer = load_tokenizer(checkpoint_folder(recipe.model, recipe.revision))
    template = chat_template(recipe.data, tokenizer)
    shares = recipe.memory.shares_prefixes
    dataset = prepare(recipe.data, tokenizer, template, recipe.seed, shares_prefixes=shares)
    if jsonl is not None:
        with jsonl.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in example_rows(dataset))
    if html is not None:
        shown = [
            (title(dataset.examples.example(i), tokenizer), masked_spans(dataset.examples.example(i), tokenizer))
            for i in dict.fromkeys(dataset.first_epoch[: NUM_IN_HTML if limit is None else limit].tolist())
        ]
        steps = Schedule.of(dataset.train.per_epoch, recipe.batch, recipe.optimizer, recipe.seed).num_steps
        page = html_report(recipe_path, whole_report(dataset), dataset, tokenizer, shown, steps)
        html.write_text(page, encoding="utf-8")
    if as_json:
        console.show_json(whole_report(dataset))
    elif (jsonl is None and html is None) or sys.stdout.isatty():
        terminal = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for i in dict.fromkeys(dataset.first_epoch[: NUM_SHOWN if limit is None else limit].tolist()):
            show_example(terminal, dataset.examples.example(i), tokenizer)
        show_report(terminal, whole_report(dataset), dataset.dropped)
    if strict and dataset.report["warnings"]:
        console.say(f"{len(dataset.report['warnings'])} warnings, and --strict allows none:")
        for warning in dataset.report["warnings"]:
            console.say(f"    {warning}")
        return DataError.exit_code
    return EXIT_OK


def example_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """One JSON object per training example of the first epoch, in order before shuffling and packing."""
    for i in dataset.first_epoch.tolist():
        example = dataset.examples.example(i)
        trained = [weight != 0 for weight in example.weights]
        plain = all(weight == 1 for weight in example.weights if weight)
        yield {
            "source": {"file": example.source.file, "line": example.source.line},
            "turns": list(example.turns),
            "input_ids": example.input_ids,
            "labels": [token if on else -100 for token, on in zip(example.input_ids, trained, strict=True)],
            "weights": None if plain else example.weights,
        }


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
        (tokenizer.decode([token for token, _ in span]), trained)
        for trained, span in groupby(pairs, key=lambda pair: pair[1] != 0)
    ]


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
    return f"{example.source} · {what} · {len(example.input_ids)} tokens, {trained} trained"


def show_report(terminal: Console, report: dict[str, Any], dropped: tuple[dict[str, Any], ...]) -> None:
    """Prints the numbers of the whole dataset."""
    terminal.print("── the whole dataset")
    share = report["trained_tokens"] / max(1, report["tokens"])
    terminal.print(
        f"{report['samples']} rows → {report['examples']} examples "
        f"({report['train_examples']} train, {report['eval_examples']} eval) · "
        f"{report['tokens']} tokens, {report['trained_tokens']} trained ({share:.0%})"
    )
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
            "another; of each only its own response is trained"
        )
    histogram = report["lengths"]["histogram"]
    most = max((bucket["examples"] for bucket in histogram), default=1)
    for bucket in histogram:
        bar = "█" * round(BAR_WIDTH * bucket["examples"] / most)
        terminal.print(f"  ≤ {bucket['up_to']:>6} tokens  {bar} {bucket['examples']}")
    for drop in dropped[:20]:
        turn = "" if drop["turn"] is None else f" messages[{drop['turn']}]"
        line = f"dropped {drop['source']['file']}:{drop['source']['line']}{turn}: {drop['reason']}"
        terminal.print(console.shown(line))
    if len(dropped) > 20:
        terminal.print(f"… and {len(dropped) - 20} more dropped; `--json` counts them all")
    for warning in report["warnings"]:
        terminal.print(console.shown(f"warning: {warning}"))


if __name__ == "__main__":
    console.main(preview)
