"""A translation as a commented recipe, and as a table for the screen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap
from typing import Any

from qwentune.peers.configuration import Given
from qwentune.peers.translation import LeftOut, Setting, Translation, as_list, as_mapping, shown
from qwentune.redaction import names_a_secret

SECTIONS = (
    *("model", "revision", "tuning", "objective", "data", "batch", "optimizer"),
    *("precision", "hardware", "memory", "output", "seed"),
)
CHANGES = {  # what a default decides
    "tuning.kind": "which weights move",
    "tuning.rank": "how much adapters can hold",
    "tuning.alpha": "how strongly adapters act",
    "tuning.dropout": "noise on what adapters read",
    "data.max_tokens": "which rows are too long",
    "data.packing": "whether a row of a step is one example",
    "batch.sequences_per_step": "how many rows a step averages",
    "optimizer.learning_rate": "how far a step goes",
    "optimizer.schedule": "how the learning rate falls",
    "optimizer.warmup_fraction": "how long the learning rate rises",
    "optimizer.weight_decay": "how weights are pulled to zero",
    "optimizer.betas": "over how many steps gradients are averaged",
    "optimizer.epochs": "how often each row is seen",
    "output.save_every_steps": "what a stop may cost",
}
WIDTH = 118  # columns
_LEFT = 48  # of them for their side of the table


@dataclass(frozen=True, slots=True)
class Draft:
    """The text of a recipe; `sources` says which of their values a line of it, from 1, was made of."""

    text: str
    sources: Mapping[int, Given]


def draft(t: Translation, recipe: str, defaults: Mapping[str, str]) -> Draft:
    """The recipe `recipe` that a configuration means; `defaults` are ours by dotted key, as a recipe writes them.

    A default of theirs is written where ours differs, so that the run stays as it was.
    """
    peer, name = t.configuration.table.peer, t.configuration.path.name
    lines = [
        f"# From {name} of {peer} by `qwentune init --from`; change what you like.",
        *(f"#   qwentune {verb:<7} {recipe}    {what}".rstrip() for verb, what in _VERBS),
    ]
    sources: dict[int, Given] = {}
    kept = [setting for setting in _in_order(t) if _is_said(setting) or not _is_ours(setting, defaults)]
    for section, settings in groupby(kept, key=lambda setting: setting.ours.partition(".")[0]):
        found = list(settings)
        is_nested = "." in found[0].ours
        if is_nested:
            lines.append(f"{section}:")
        for setting in found:
            for line in _written(setting, "  " if is_nested else "", defaults):
                lines.append(line)
                if setting.sources:
                    sources[len(lines)] = setting.sources[0]
    return Draft("\n".join(lines) + "\n", sources)


def _in_order(t: Translation) -> list[Setting]:
    """The settings in the order of a recipe's sections."""
    return sorted(t.settings.values(), key=lambda setting: SECTIONS.index(setting.ours.partition(".")[0]))


_VERBS = (("preview", "what is trained?"), ("plan", "does it fit? (--gpu NAME)"), ("train", ""))


def _written(setting: Setting, indent: str, defaults: Mapping[str, str]) -> Iterator[str]:
    key = setting.ours.rpartition(".")[2]
    remark = _origin(setting, defaults) + (f": {setting.remark}" if setting.remark else "")
    if key in ("train", "eval"):
        yield f"{indent}{key}:  # {remark}"
        yield from (f"{indent}  - {flow(source)}" for source in setting.value)
    else:
        yield f"{indent}{key}: {flow(setting.value)}  # {remark}"


def _origin(setting: Setting, defaults: Mapping[str, str]) -> str:
    keys = ", ".join(dict.fromkeys(source.key for source in setting.sources if source.where))
    if keys or setting.ours == "tuning.kind":  # which has no default here
        return keys or "their default"
    return f"their default; ours is {_ours(setting, defaults) or 'none'}"


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    match value:
        case dict():
            pairs = as_mapping(value) or {}
            return "{" + ", ".join(f"{flow(str(key))}: {flow(item)}" for key, item in pairs.items()) + "}"
        case list():
            items = as_list(value)
            return "[" + ", ".join(flow(item) for item in items) + "]"
        case str() if value and all(letter.isalnum() or letter in "-_./" for letter in value) and value[0].isalpha():
            return value if value.lower() not in _WORDS else json.dumps(value)
        case _:
            return json.dumps(value, ensure_ascii=False)


_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def _is_said(setting: Setting) -> bool:
    return any(source.where for source in setting.sources)


def _ours(setting: Setting, defaults: Mapping[str, str]) -> str:
    """Our default, without the words on what it depends on."""
    return defaults.get(setting.ours, "").partition(";")[0]


def _is_ours(setting: Setting, defaults: Mapping[str, str]) -> bool:
    text = _ours(setting, defaults)
    try:
        return json.loads(text) == setting.value
    except ValueError:
        return text == setting.value


def table(t: Translation, defaults: Mapping[str, str]) -> list[str]:
    """Lines for the screen: every key that was written and what became of it, then what differs."""
    configuration = t.configuration
    said = [setting for setting in _in_order(t) if _is_said(setting)]
    silent = [one for one in _in_order(t) if not _is_said(one) and not _is_ours(one, defaults)]
    left = [one for one in t.left_out if not one.changes]
    other = [one for one in t.left_out if one.changes]
    lines = [f"{configuration.path} is a configuration of {configuration.table.peer} ({configuration.table.release})"]
    lines += _part("taken over", [line for one in said for line in _row(one, one.remark)])
    ours = [_row(one, f"ours is {_ours(one, defaults) or 'none'}; {CHANGES.get(one.ours, 'theirs')}") for one in silent]
    lines += _part("defaults of theirs that differ from ours: written out", [line for row in ours for line in row])
    lines += _part("left out; it has no effect on what is learnt", _reasons(left))
    lines += _part("left out; where it was in effect, something else is learnt without it", _reasons(other))
    lines += _part("off or empty there", wrap(", ".join(given.key for given in t.off), WIDTH - 2))
    differences = [f"there: {one.there}\nhere:  {one.here}" for one in t.differences]
    lines += _part("done otherwise", [line for one in differences for line in one.splitlines()])
    return lines


def _part(title: str, lines: Iterable[str]) -> list[str]:
    body = [f"  {line}" for line in lines]
    return ["", title, *body] if body else []


def _row(setting: Setting, remark: str) -> list[str]:
    theirs = ", ".join(_theirs(source) for source in setting.sources) or "their default"
    sources = setting.ours in ("data.train", "data.eval")
    values = [flow(source) for source in setting.value] if sources else [flow(setting.value)]
    ours = f"{setting.ours}: {', '.join(values)}" + (f"  ({remark})" if remark else "")
    if len(theirs) > _LEFT:
        return [theirs, f"{'':<{_LEFT}} → {ours}"]
    return [f"{theirs:<{_LEFT}} → {ours}"]


def _theirs(given: Given) -> str:
    return f"{given.key}: {'***' if names_a_secret(given.key) else shown(given.value)}"


def _reasons(left: Iterable[LeftOut]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for one in left:
        reasons.setdefault(one.why, []).append(_theirs(one.given))
    lines: list[str] = []
    for why, keys in reasons.items():
        lines += [*wrap(", ".join(keys), WIDTH - 2), *(f"    {line}" for line in wrap(why, WIDTH - 6))]
    return lines
