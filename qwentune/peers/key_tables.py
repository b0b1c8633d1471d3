"""The keys of other fine-tuning tools: what each is called here, or why it has no counterpart.

A table is a YAML file beside this one and holds every key of one named release, which `tests/peer_keys.py` extracts:

- `takes`, their key to ours, with the name of a term before `>` where the value is converted (`hyperparameters.py`);
- `dropped`, reasons with their keys; `changes` marks those without which something else is learnt;
- `defaults`, by term, what a run of theirs has where its configuration is silent;
- `earlier`, the keys among these that only older releases take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PEERS = ("llama_factory", "axolotl", "ms_swift")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Taken:
    """A key that has a counterpart: the `term` that converts its value, and `ours`, a dotted key of a recipe."""

    term: str
    ours: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A key without a counterpart; `changes` where a run without it learns something else."""

    why: str
    changes: bool


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of a tool; those of the table that it builds on (`also`) are in `keys` too, but not in `own`."""

    peer: str
    release: str
    keys: Mapping[str, Taken | Dropped]
    own: frozenset[str]
    earlier: frozenset[str]
    known_by: frozenset[str]
    second_schema: frozenset[str]
    defaults: Mapping[str, Any]


@cache
def key_table(name: str) -> KeyTable:
    """The table of that name: one of `PEERS`, or transformers."""
    file = Path(__file__).with_name(f"{name}.yaml")
    tree: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    own: dict[str, Taken | Dropped] = {}
    for key, words in tree["takes"].items():
        term, _, ours = words.rpartition(" > ")
        own[key] = Taken(term or ours, ours)
    for group in tree["dropped"]:
        own |= dict.fromkeys(group["keys"].split(), Dropped(group["why"], group.get("changes", False)))
    below = key_table(tree["also"]) if "also" in tree else None
    listed = {name: frozenset(str(tree.get(name, "")).split()) for name in ("earlier", "known_by", "second_schema")}
    return KeyTable(
        tree["peer"],
        tree["release"],
        {**(below.keys if below else {}), **own},
        frozenset(own),
        listed["earlier"],
        listed["known_by"],
        listed["second_schema"],
        tree.get("defaults", {}),
    )


def counterpart(name: str) -> str:
    """What a key of another tool, dotted or not, is called in a recipe, in words; empty where it is none."""
    found = ((table, spelt, table.keys.get(spelt)) for spelt in _spellings(name) for table in map(key_table, PEERS))
    return next(
        (f"{table.peer}'s {spelt} is {entry.ours} here." for table, spelt, entry in found if isinstance(entry, Taken)),
        "",
    )


def reason_against(name: str) -> str:
    """Why a key of another tool has no counterpart in a recipe, in words; empty where it is none."""
    found = ((table, spelt, table.keys.get(spelt)) for spelt in _spellings(name) for table in map(key_table, PEERS))
    return next(
        (
            f"{table.peer}'s {spelt} has no counterpart: {entry.why}."
            for table, spelt, entry in found
            if isinstance(entry, Dropped)
        ),
        "",
    )


def _spellings(name: str) -> list[str]:
    """A dotted name, then its ends: of `tuning.lora.lora_r` the last part is a key that is known."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
