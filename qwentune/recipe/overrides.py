"""`key.path=value` on the command line, written into the tree of a recipe."""

from __future__ import annotations

import re

from qwentune.errors import Problem
from qwentune.recipe.syntax import MAX_DEPTH, Node, Place, half_characters, read_override_value

_ITEM = re.compile("[0-9]{1,9}")  # of a list


def apply_override(root: Node, override: str, problems: list[Problem]) -> None:
    """Sets one value in the tree; `key=null` takes a key out, back to its default.

    An unknown key is written too: the check of the whole recipe names it with its nearest neighbour.
    """
    shown = override.encode("utf-8", "backslashreplace").decode()
    place = Place(f"override '{shown}'", "override")
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if halves := half_characters(override, place.where):
        problems += halves
    elif override[:1] in {"~", "+"}:
        what = f"'{override[0]}' before a key has no meaning here"
        fix = "key=value sets a key, whether the recipe has it or not; key=null takes it back to its default."
        problems.append(Problem(place.where, what, fix))
    elif not equals or not all(parts):
        problems.append(Problem(place.where, "this is no override", "Write key=value, as in data.max_tokens=2048."))
    elif len(parts) > MAX_DEPTH:
        what = f"a key of {len(parts):,} parts is nested more than {MAX_DEPTH} levels deep"
        problems.append(Problem(place.where, what, "`qwentune keys` lists the keys of a recipe."))
    elif not text.strip():
        problems.append(Problem(place.where, f"{key} gets no value", f"{key}=null takes it back to its default."))
    elif value := read_override_value(text, place, problems):
        _set(root, parts, value, problems)


def _set(root: Node, parts: list[str], value: Node, problems: list[Problem]) -> None:
    place, node = value.place, root
    for depth, part in enumerate(parts):
        name, is_last = ".".join(parts[:depth]), depth == len(parts) - 1
        if isinstance(node.value, dict):
            if is_last and value.value is None:
                node.value.pop(part, None)
                return
            child = value if is_last else node.value.setdefault(part, Node({}, place, {}))
            if child.place is place:
                node.value[part], node.keys[part] = child, place
        elif isinstance(node.value, list):
            count = len(node.value)
            if not _ITEM.fullmatch(part) or int(part) >= count:
                what = f"{name} has no item '{part}'; its {count} items are counted from 0"
                problems.append(Problem(place.where, what, f"To give all of them: {name}=[...]."))
                return
            if is_last:
                node.value[int(part)] = value
            child = node.value[int(part)]
        else:
            problems.append(Problem(place.where, f"{name} is a single value: there is no '{part}' in it"))
            return
        node = child
