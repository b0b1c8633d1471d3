"""What becomes of a configuration of another tool: keys of a recipe, what is left out and why, what differs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qwentune.errors import Problem, nearest
from qwentune.peers.configuration import Configuration, Given
from qwentune.peers.key_tables import Dropped, Taken

LARGEST = 1e15  # of a number; a recipe's own bounds are narrower


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the recipe with its value, what it was made of, and what should be known of it."""

    ours: str
    value: Any
    sources: tuple[Given, ...]
    remark: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A key of theirs that the recipe has no counterpart of."""

    given: Given
    why: str
    changes: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """What a run here does in another way: how it was there, and how it is here."""

    there: str
    here: str


@dataclass(slots=True)
class Translation:
    """The translation of a configuration while it is made; every part of it adds what it finds.

    `written` has the values by term (by key of theirs in `configuration.given`), `defaults` those of the tool itself;
    `off` are the keys that say nothing, or switch something off that is off here too.
    """

    configuration: Configuration
    written: Mapping[str, Given]
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    off: list[Given] = field(default_factory=list[Given])
    differences: list[Difference] = field(default_factory=list[Difference])
    problems: list[Problem] = field(default_factory=list[Problem])
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])

    def get(self, term: str) -> Given | None:
        """What is said of a term, or the tool's default; None where neither says anything."""
        if term in self.written:
            return self.written[term]
        return Given(self._key_of(term), self.defaults[term], "") if term in self.defaults else None

    def _key_of(self, term: str) -> str:
        """What the tool calls a term."""
        keys, earlier = self.configuration.table.keys, self.configuration.table.earlier
        named = (key for key, entry in keys.items() if isinstance(entry, Taken) and entry.term == term)
        return next((key for key in named if key not in earlier), term)

    def number(self, term: str) -> float | int | None:
        """The number of a term; None where there is none, after a problem if it is something else."""
        given = self.get(term)
        if given is None:
            return None
        try:
            value = float(given.value) if not isinstance(given.value, bool) else math.nan
        except (TypeError, ValueError):
            value = math.nan
        if math.isfinite(value) and abs(value) < LARGEST:
            return int(value) if value.is_integer() and not isinstance(given.value, float) else value
        self.refuse(given, f"{shown(given.value)} is given; a number is needed", "Correct it there first.")
        return None

    def flag(self, term: str) -> bool:
        """Whether a term is switched on."""
        given = self.get(term)
        return given is not None and is_on(given.value)

    def words(self, term: str) -> list[str]:
        """The texts of a term: a list, or one text with commas."""
        given = self.get(term)
        value: Any = [] if given is None else given.value
        items = as_list(value) if not isinstance(value, str) else value.split(",")
        return [text for item in items if (text := str(item).strip())]

    def set(self, ours: str, value: Any, *sources: Given | None, remark: str = "") -> None:
        """Writes a key of the recipe."""
        self.settings[ours] = Setting(ours, value, tuple(one for one in sources if one is not None), remark)

    def leave_out(self, given: Given | None, why: str, *, changes: bool = False) -> None:
        """Notes that a value which was written is not taken over."""
        if given is not None and given.where:
            self.left_out.append(LeftOut(given, why, changes))

    def differs(self, there: str, here: str) -> None:
        """Notes what a run here does in another way."""
        self.differences.append(Difference(there, here))

    def refuse(self, given: Given, what: str, fix: str = "") -> None:
        """Notes why there can be no recipe."""
        where = given.where or str(self.configuration.path)
        self.problems.append(Problem(where, f"{given.key}: {what}", fix))


def begin(configuration: Configuration) -> Translation:
    """A translation in which every key is looked up, and those without a counterpart are left out with their reason."""
    written: dict[str, Given] = {}
    translation = Translation(configuration, written, defaults=dict(configuration.table.defaults))
    for key, given in configuration.given.items():
        match configuration.table.keys.get(key):
            case Taken(term) if given.value is False or not is_off(given.value) or is_number(given.value):
                written[term] = given
            case Dropped(why, changes) if not is_off(given.value):
                translation.leave_out(given, why, changes=changes)
            case None if not is_off(given.value):
                why = f"no key of {configuration.table.release}.{nearest(key, configuration.table.keys)}"
                translation.leave_out(given, why, changes=True)
            case _:
                translation.off.append(given)
    return translation


def finish(translation: Translation) -> None:
    """Accounts for the keys of which no part of the translation has said anything."""
    said = {source.key for setting in translation.settings.values() for source in setting.sources}
    said |= {one.given.key for one in translation.left_out} | {given.key for given in translation.off}
    for key, given in translation.configuration.given.items():
        if key not in said:
            if is_off(given.value):
                translation.off.append(given)
            else:
                translation.leave_out(given, "it has no effect beside the other keys, or is the rule here")


def is_hybrid(t: Translation) -> bool:
    """Whether the model answers with and without reasoning, as far as its name tells: Qwen3, 3.5 and later."""
    given = t.written.get("model")
    name = str(given.value).lower() if given else ""
    return "qwen3" in name and not any(part in name for part in ("2507", "coder", "instruct", "base", "embedding"))


def file_of(t: Translation, name: str) -> str:
    """The path of a file from here; one that is not here may stand beside the configuration."""
    beside = t.configuration.path.parent / name
    return os.path.normpath(beside) if not Path(name).exists() and beside.exists() else name


def joined(t: Translation) -> None:
    """Notes how texts of continued pre-training share rows."""
    t.differs("texts were joined and cut into blocks, in which one saw the end of another", "each is alone in its rows")


def is_off(value: Any) -> bool:
    """Whether a value switches something off, or says nothing."""
    return value in (None, False, "", 0) or value == [] or value == {}


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_on(value: Any) -> bool:
    """Whether a value switches something on; a command line writes it as text."""
    return str(value).lower() in {"true", "1", "yes", "on", "auto"}


def as_list(value: Any) -> list[Any]:
    """A value that may be one or several."""
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A mapping with its keys as text; None where the value is none, nor JSON of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict):
        return None
    return {str(key): item for key, item in cast("dict[Any, Any]", value).items()}


def shown(value: Any, longest: int = 48) -> str:
    """A value in a few words, as a configuration would write it; of anything nested only the beginning."""
    match value:
        case bool():
            text = "true" if value else "false"
        case list():
            items = as_list(value)
            text = f"[{', '.join(_part(item) for item in items[:6])}{', …' if len(items) > 6 else ''}]"
        case dict():
            pairs = as_mapping(value) or {}
            text = "{" + ", ".join(f"{key}: {_part(item)}" for key, item in list(pairs.items())[:4])
            text += ", …}" if len(pairs) > 4 else "}"
        case float():
            text = f"{value:g}"
        case _:
            text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _part(value: Any) -> str:
    return "…" if isinstance(value, list | dict) else shown(value, 20)
