"""The preview as one HTML page: no network, no script of the data's, readable without colour."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from qwentune.console import shown
from qwentune.exporting.package import serving_flags

if TYPE_CHECKING:
    from qwentune.data.dataset import Dataset
    from qwentune.data.tokenizing.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NUM_FIRST = 4  # tokens of a trained span that count as its beginning
NUM_LOOKED_AT = 20_000  # examples whose beginnings are counted
NUM_ROWS = 20  # of the tables of beginnings
NUM_DROPPED = 200


def html_report(
    recipe: str,
    report: Mapping[str, Any],
    dataset: Dataset,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[str, Sequence[tuple[str, bool]]]],
    optimizer_steps: int,
) -> str:
    """The page; `examples` are titles with the spans of the text, each with whether it is trained."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    dropped = [
        (f"{drop['source']['file']}:{drop['source']['line']}" + _turn(drop["turn"]), drop["reason"])
        for drop in dataset.dropped[:NUM_DROPPED]
    ]
    return page.render(
        recipe=shown(recipe),
        report=_shown(report),
        facts=_shown(_facts(report, optimizer_steps)),
        most=max((bucket["examples"] for bucket in report["lengths"]["histogram"]), default=1),
        first_words=_shown(_beginnings(dataset, tokenizer)),
        num_first=NUM_FIRST,
        num_looked_at=min(len(dataset.first_epoch), NUM_LOOKED_AT),
        dropped=_shown(dropped),
        num_dropped=len(dataset.dropped),
        examples=_shown([{"title": title, "spans": spans} for title, spans in examples]),
    )


def _facts(report: Mapping[str, Any], optimizer_steps: int) -> list[tuple[str, str]]:
    packing, flags = report["packing"], serving_flags(report)
    filled = "" if packing["filled"] is None else f", {packing['filled']:.0%} full"
    facts = [
        ("rows of the files", str(report["samples"])),
        ("examples", f"{report['train_examples']} to train on, {report['eval_examples']} to evaluate on"),
        ("tokens", f"{report['tokens']}, {report['trained_tokens'] / max(1, report['tokens']):.0%} trained"),
        ("rows of an epoch", f"{packing['rows']} with {packing['tokens']} tokens{filled}"),
        ("optimizer steps of the run", str(optimizer_steps)),
        ("expansion factor", f"{report['expansion_factor']:.2f}"),
        ("trained ends", _counts(report["stop_tokens"])),
    ]
    if report["modes"]:
        facts.append(("turns by mode", _counts({k.replace("_", "-"): v for k, v in report["modes"].items()})))
        how = f"chat_template_kwargs {json.dumps(flags)}" if flags else "the template's defaults"
        facts.append(("serve it with", how))
    if report["fim"]:
        facts.append(("code", _counts(report["fim"])))
    if report["dropped"]:
        facts.append(("not trained", _counts(report["dropped"])))
    return facts


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} × {count}" for name, count in counts.items()) or "none"


def _beginnings(dataset: Dataset, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    counts: Counter[tuple[int, ...]] = Counter()
    for i in islice(dataset.first_epoch.tolist(), NUM_LOOKED_AT):
        example = dataset.examples.example(i)
        ids = example.input_ids
        for span in example.spans:
            counts[tuple(ids[span.start : min(span.stop, span.start + NUM_FIRST)])] += 1
    # The last token may hold the first bytes of a character alone.
    return [(tokenizer.decode(ids).rstrip("\ufffd"), count) for ids, count in counts.most_common(NUM_ROWS)]


def _turn(turn: int | None) -> str:
    return "" if turn is None else f" messages[{turn}]"


def _shown(value: Any) -> Any:
    """The same value with all its texts as they may be shown."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value
