"""Typed values out of a checkpoint's config.json, every problem gathered on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from qwentune.errors import Problem
from qwentune.facts.documents import read_object, shown

_LARGEST = 2**24  # of any size in a config.json but those below; vocabularies have some 2**18 rows
_LARGEST_OF = {
    **{"num_hidden_layers": 2**10, "num_experts": 2**14, "num_local_experts": 2**14},
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 2**30),
}


class ConfigFile:
    """Reads typed values out of a config.json, or of a section of one, and gathers every problem on the way."""

    def __init__(self, path: Path, section: str = "", values: Mapping[str, object] | None = None) -> None:
        self.path, self.name = path, section
        self.problems: list[Problem] = []
        self.values: Mapping[str, object] = read_object(path) if values is None else values

    def section(self, name: str) -> ConfigFile:
        """What stands under a key, empty where nothing does; its problems are gathered with the others."""
        found = ConfigFile(self.path, f"{self.name}{name}.", self.nested(name))
        found.problems = self.problems
        return found

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        most = _LARGEST_OF.get(key, _LARGEST)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            return value
        is_large = isinstance(value, int) and value > most
        self.refuse(key, value, f"a whole number {f'from 1 to {most}' if is_large else '>= 1'} is needed")
        return 1

    def numbers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of whole numbers, which may be 0."""
        value = self.values.get(key)
        if value is None:
            return default
        items: list[object] = cast("list[object]", value) if isinstance(value, list) else [None]
        if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _LARGEST for item in items):
            return tuple(cast("list[int]", items))
        self.refuse(key, cast(object, value), "a list of whole numbers is needed")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.refuse(key, value, "true or false is needed")
        return default

    def positive(self, key: str, default: float, section: str = "") -> float:
        """A number above 0, of a section of the file where one is named."""
        value = (self.nested(section) if section else self.values).get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST**2:
            return float(value)
        self.refuse(f"{section}.{key}" if section else key, value, "a number > 0 is needed")
        return default

    def nested(self, key: str) -> dict[str, object]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, value, "an object is needed")
        return cast("dict[str, object]", value) if isinstance(value, dict) else {}

    @property
    def max_positions(self) -> int:
        known = self.number("max_position_embeddings")
        stretched = known
        for section in ("rope_parameters", "rope_scaling"):
            factor = self.positive("factor", 0.0, section)
            original = self.positive("original_max_position_embeddings", known, section)
            stretched = max(stretched, int(factor * original))  # YaRN and its like stretch what was trained
        return stretched

    @property
    def rope_theta(self) -> float:
        # transformers 5 writes rope_parameters, older versions rope_theta.
        return self.positive("rope_theta", self.positive("rope_theta", 1e4), "rope_parameters")

    def refuse(self, key: str, value: object, needed: str) -> None:
        """Notes a value of another kind than is needed."""
        found = "is missing" if value is None else f"is {shown(value)}"
        problem = Problem(f"{self.path}: {self.name}{key}", f"{self.name}{key} {found}; {needed}.")
        if problem not in self.problems:
            self.problems.append(problem)
