"""The preview as one HTML page: no network, no script of the data's, readable without colour."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from qwentune.data.summary import media
from qwentune.exporting.package import serving_flags
from qwentune.pages.template import page

if TYPE_CHECKING:
    from qwentune.data.dataset import Dataset
    from qwentune.data.tokenizing.tokenizer import Tokenizer

NUM_FIRST = 4  # tokens of a trained span that count as its beginning
NUM_LOOKED_AT = 20_000  # examples whose beginnings are counted
NUM_ROWS = 20  # of the tables of beginnings
NUM_DROPPED = 200
LONG, REPEATED = 1500, 300  # characters of a message that is folded, and of one that stood in an example before


@dataclass(frozen=True)
class ShownExample:
    """An example on the page: its text in spans, each with whether it is trained.

    `thumbnails` are `data:` URLs of its media, each with what it shows.
    """

    source: str
    title: str
    format: str
    turns: Sequence[int]
    spans: Sequence[tuple[str, bool]]
    thumbnails: Sequence[tuple[str, str]] = ()


def html_report(
    recipe: str,
    report: Mapping[str, Any],
    dataset: Dataset,
    tokenizer: Tokenizer,
    examples: Sequence[ShownExample],
    optimizer_steps: int,
) -> str:
    """The page."""
    dropped = [
        (f"{drop['source']['file']}:{drop['source']['line']}" + _turn(drop["turn"]), drop["reason"])
        for drop in dataset.dropped[:NUM_DROPPED]
    ]
    warnings = _linked(report["warnings"], {example.source: k for k, example in reversed([*enumerate(examples)])})
    seen: dict[str, str] = {}
    return page(
        "preview.html.jinja",
        recipe=recipe,
        report=report,
        facts=_facts(report, optimizer_steps),
        most=max((bucket["examples"] for bucket in report["lengths"]["histogram"]), default=1),
        first_words=_beginnings(dataset, tokenizer),
        num_first=NUM_FIRST,
        num_looked_at=min(len(dataset.first_epoch), NUM_LOOKED_AT),
        dropped=dropped,
        num_dropped=len(dataset.dropped),
        warnings=warnings,
        formats=sorted({example.format for example in examples}),
        turns=sorted({turn for example in examples for turn in example.turns}),
        examples=[
            {
                "title": example.title,
                "format": example.format,
                "turns": example.turns,
                "warnings": [k for k, each in enumerate(warnings, 1) if example.source in each["places"]],
                "thumbnails": example.thumbnails,
                "parts": [part for span in example.spans for part in _parts(*span, example.source, seen)],
            }
            for example in examples
        ],
    )


def _linked(warnings: Sequence[str], examples: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each warning in parts, those that name the row of an example with its number."""
    places = "|".join(re.escape(place) for place in sorted(examples, key=len, reverse=True)) or "$^"
    parts = [re.split(rf"({places})(?![\w:])", warning) for warning in warnings]
    return [
        {
            "text": "".join(texts),
            "parts": [(text, examples[text] if k % 2 else None) for k, text in enumerate(texts) if text],
            "places": texts[1::2],
        }
        for texts in parts
    ]


def _parts(text: str, trained: bool, source: str, seen: dict[str, str]) -> list[dict[str, Any]]:
    """A span in parts; messages of the context that are long, or stood in an earlier example, are to be folded.

    `seen` has the messages that stood before and where, and takes those that stand here.
    """
    if trained:
        return [{"text": text, "trained": True}]
    parts: list[dict[str, Any]] = []
    for message in re.split(r"(?=<\|im_start\|>)", text):
        before = seen.setdefault(message, source)
        fold = ""
        if len(message) > REPEATED and before != source:
            fold = f"as in {before}"
        elif len(message) > LONG:
            fold = "long"
        role = re.match(r"<\|im_start\|>(\w+)", message)
        if fold:
            fold = f"{role[1] if role else 'text'}, {len(message):,} characters, {fold}"
        parts.append({"text": message, "trained": False, "fold": fold})
    return parts


def _facts(report: Mapping[str, Any], optimizer_steps: int) -> list[tuple[str, str]]:
    packing, flags = report["packing"], serving_flags(report)
    filled = "" if packing["filled"] is None else f", {packing['filled']:.0%} full"
    facts = [
        ("rows of the files", f"{report['samples']:,}"),
        ("examples", f"{report['train_examples']:,} to train on, {report['eval_examples']:,} to evaluate on"),
        ("tokens", f"{report['tokens']:,}, {report['trained_tokens'] / max(1, report['tokens']):.0%} trained"),
        ("rows of an epoch", f"{packing['rows']:,} with {packing['tokens']:,} tokens{filled}"),
        ("optimizer steps of the run", f"{optimizer_steps:,}"),
        ("work for each token", _expansion(report["expansion_factor"])),
        ("what is trained ends with", _counts(report["stop_tokens"])),
    ]
    if report["modes"]:
        facts.append(("turns by mode", _counts({k.replace("_", "-"): v for k, v in report["modes"].items()})))
        how = f"chat_template_kwargs {json.dumps(flags)}" if flags else "the template's defaults"
        facts.append(("serve it with", how))
    if found := list(media(report)):
        facts.append(("media", ". ".join(found)))
    if report["fim"]:
        facts.append(("code", _counts(report["fim"])))
    if report["dropped"]:
        facts.append(("not trained", _counts(report["dropped"])))
    return facts


def _expansion(factor: float) -> str:
    if round(factor, 2) == 1:
        return "once: each token of the dialogues is read one time"
    why = "the chat template rewrites earlier turns, so their text stands in several examples"
    return f"{factor:.2f} times: {why}" if factor > 1 else f"{factor:.2f} times: examples share their beginnings"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} × {count:,}" for name, count in counts.items()) or "none"


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
