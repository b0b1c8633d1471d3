"""What every command that renders data says of it: how much there is, what was left out and why, what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwentune.data.dataset import Dataset
from qwentune.errors import counted

NUM_NAMED = 20  # rows and turns that were left out


def summary(dataset: Dataset) -> list[str]:
    """The counts, what was left out, and the warnings, a line each."""
    warnings = (f"warning: {warning}" for warning in dataset.report["warnings"])
    return [counts(dataset.report), *media(dataset.report), *left_out(dataset.dropped), *warnings]


def counts(report: Mapping[str, Any]) -> str:
    """Rows, examples and tokens of a report in one line."""
    share = report["trained_tokens"] / max(1, report["tokens"])
    return (
        f"{counted(report['samples'], 'row{|s}')} → {counted(report['examples'], 'example{|s}')} "
        f"({report['train_examples']} train, {report['eval_examples']} eval) · "
        f"{report['tokens']} tokens, {report['trained_tokens']} trained ({share:.0%})"
    )


def media(report: Mapping[str, Any]) -> Iterator[str]:
    """The media that the rows show, a line for each kind."""
    for kind, found in report.get("media", {}).items():
        line = f"{found['count']:,} × {kind} → {found['tokens']:,} tokens"
        if found["scaled_down"]:
            line += f"; {found['scaled_down']:,} scaled down, to {found['smallest_scale']:.0%} of the pixels at least"
        if found["scaled_up"]:
            line += f"; {found['scaled_up']:,} scaled up, to {found['largest_scale']:.0%} at most"
        if own := found.get("rows_with_own_limits"):
            line += f"; bounded by {own:,} rows themselves"
        yield line


def left_out(dropped: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The first rows and turns that are not trained, each with its reason, and how many more there are."""
    for drop in dropped[:NUM_NAMED]:
        turn = "" if drop["turn"] is None else f" messages[{drop['turn']}]"
        yield f"dropped {drop['source']['file']}:{drop['source']['line']}{turn}: {drop['reason']}"
    if len(dropped) > NUM_NAMED:
        yield f"… and {len(dropped) - NUM_NAMED} more dropped; `--json` counts them, a run's dropped.jsonl names them"
