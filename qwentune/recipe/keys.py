"""What a recipe may say, in words: the list behind `qwentune keys` and the wording of type errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from qwentune.recipe.schema import Recipe, Section

_WORDS: dict[Any, list[str]] = {
    bool: ["true", "false"],
    int: ["a whole number"],
    float: ["a number"],
    str: ["text"],
    NoneType: ["null"],
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the recipe; `default` is as a recipe would write it, or `required`."""

    name: str
    type: str
    default: str
    description: str


def describe_keys() -> list[Key]:
    """Every key of a recipe, in the order of the schema; `[]` stands for the number of a list's item."""
    return list(_keys(Recipe, ""))


def is_key(name: str) -> bool:
    """Whether a dotted name is a key of the recipe with a value of its own; items of lists are numbered."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", name) in _names()


@cache
def _names() -> frozenset[str]:
    return frozenset(key.name.replace("[]", "") for key in describe_keys())


def render_keys(keys: Sequence[Key]) -> list[str]:
    """Plain text, two lines for each key."""
    lines: list[str] = []
    for key in keys:
        default = key.default if key.default == "required" else f"default {key.default}"
        lines += [f"{key.name}: {key.type} ({default})", f"    {key.description}"]
    return lines


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a section, as a recipe spells them."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def hint(info: FieldInfo) -> Any:
    """The annotation of a key with its bounds."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def bare(annotation: Any) -> Any:
    """An annotation without its bounds and without null."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType}:
        others = [member for member in get_args(annotation) if member is not NoneType]
        if len(others) == 1:
            return bare(others[0])
    return annotation


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether an annotation, without bounds and null, is a mapping with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def in_words(annotation: Any) -> str:
    """The values that an annotation takes, as a phrase: `auto or a whole number >= 1`."""
    *rest, last = _alternatives(annotation, "")
    return f"{', '.join(rest)} or {last}" if rest else last


def choices(annotation: Any) -> list[str]:
    """The words among the values that an annotation takes."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [str(member) for member in members]
    if origin is Annotated:
        return choices(members[0])
    if origin in {Union, UnionType}:
        return [word for member in members for word in choices(member)]
    return []


def _keys(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, info in fields(section).items():
        inner = bare(hint(info))
        if is_section(inner):
            yield from _keys(inner, f"{prefix}{name}.")
            continue
        yield Key(prefix + name, in_words(hint(info)), _default(info), info.description or "")
        if get_origin(inner) is list and is_section(item := get_args(inner)[0]):
            yield from _keys(item, f"{prefix}{name}[].")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.examples:
        return info.examples[0]
    return info.default if isinstance(info.default, str) else json.dumps(info.default)


def _alternatives(annotation: Any, bounds: str) -> list[str]:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(members[0], _bounds(members[1:]))
    if origin in {Union, UnionType}:
        return [phrase for member in members for phrase in _alternatives(member, "")]
    if origin is Literal:
        return [str(member) for member in members]
    if origin is list:
        return [f"a list of {in_words(members[0])}"]
    if origin is tuple:
        return [f"a list of {len(members)}, each {in_words(members[0])}"]
    if origin is dict:
        return ["a mapping of names to values"]
    if is_section(annotation):
        return [f"{{{', '.join(fields(annotation))}}}"]
    return [phrase + bounds for phrase in _WORDS[annotation]]


def _bounds(metadata: Sequence[object]) -> str:
    bounds: list[str] = []
    for bound in metadata:
        match bound:
            case Ge(limit):
                bounds.append(f">= {limit:,}")
            case Gt(limit):
                bounds.append(f"> {limit:,}")
            case Le(limit):
                bounds.append(f"<= {limit:,}")
            case Lt(limit):
                bounds.append(f"< {limit:,}")
            case _:
                pass  # a minimal length, which every message about an empty value makes plain
    return f" {' and '.join(bounds)}" if bounds else ""
