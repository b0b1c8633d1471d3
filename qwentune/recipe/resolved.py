"""The resolved recipe: every value that a run uses, and where it was said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias, cast

from qwentune.recipe.schema import ADAPTER_KEYS, Recipe
from qwentune.recipe.syntax import Node, resolve

DEFAULT = "default"

_Tree: TypeAlias = "bool | int | float | str | list[_Tree] | dict[str, _Tree] | None"

_SAFE_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
# What json.dumps leaves as it is, but YAML refuses, or reads as the end of a line.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def origins_of(recipe: Recipe, root: Node) -> dict[str, str]:
    """Where each value was said, by dotted key: `file:line`, `override` or `default`."""
    return {key: _origin(root, key, value) for key, value in _leaves(_values(recipe), "")}


def resolved_yaml(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """The recipe in full as YAML that loads to an equal one, each value followed by its origin.

    Without adapters there are no adapter keys: a recipe that gives them for `kind: full` contradicts itself.
    """
    return "".join(f"{line}\n" for line in _lines(_values(recipe), "", "", origins))


def _values(recipe: Recipe) -> dict[str, _Tree]:
    values = cast("dict[str, _Tree]", recipe.model_dump(mode="json", by_alias=True))
    if recipe.tuning.kind == "full":
        tuning = cast("dict[str, _Tree]", values["tuning"])
        values["tuning"] = {key: value for key, value in tuning.items() if key not in ADAPTER_KEYS}
    return values


def _children(value: _Tree) -> dict[str, _Tree]:
    """The parts that have an origin of their own: entries of mappings, and mappings in lists."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return {}


def _leaves(value: _Tree, key: str) -> Iterator[tuple[str, _Tree]]:
    children = _children(value)
    if not children:
        yield key, value
    for name, child in children.items():
        yield from _leaves(child, f"{key}.{name}" if key else name)


def _origin(root: Node, key: str, value: _Tree) -> str:
    node = root
    for part in key.split("."):
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list):
            node = node.value[int(part)]
        else:
            return DEFAULT
    return DEFAULT if node.value is None and value is not None else node.place.origin


def _lines(value: _Tree, key: str, indent: str, origins: Mapping[str, str]) -> Iterator[str]:
    for name, child in _children(value).items():
        inner_key = f"{key}.{name}" if key else name
        inner = list(_lines(child, inner_key, "  ", origins))
        if not inner:
            yield f"{indent}{_flow(name)}: {_flow(child)}  # {origins[inner_key]}"
        elif isinstance(value, list):
            yield f"{indent}- {inner[0].lstrip()}"
            yield from (indent + line for line in inner[1:])
        else:
            yield f"{indent}{_flow(name)}:"
            yield from (indent + line for line in inner)


def _flow(value: _Tree) -> str:
    if isinstance(value, str):
        if _SAFE_TEXT.fullmatch(value) and isinstance(resolve(value), str):
            return value
        return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(value, ensure_ascii=False))
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    return json.dumps(value)
