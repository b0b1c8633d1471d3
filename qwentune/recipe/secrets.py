"""Tokens and passwords have no place in a recipe, which is copied into the run folder."""

from __future__ import annotations

from collections.abc import Iterator

from qwentune.errors import Problem
from qwentune.recipe.syntax import Node, Place
from qwentune.redaction import holds_a_token, variable_in


def secrets(node: Node, name: str = "") -> Iterator[Problem]:
    """A problem for each text of the tree that holds a secret, never the text itself.

    To hide it in the copies alone would not do: what is read back from them, such as a system prompt, would be another.
    """
    if isinstance(node.value, str):
        yield from _in(node.value, node.place, name)
    children = node.value.items() if isinstance(node.value, dict) else ()
    if isinstance(node.value, list):
        children = [(str(place), item) for place, item in enumerate(node.value)]
    for key, child in children:
        yield from _in(key, child.place, f"a key of {name or 'the recipe'}")
        yield from secrets(child, f"{name}.{key}" if name else key)


def _in(text: str, place: Place, name: str) -> Iterator[Problem]:
    if holds_a_token(text):
        fix = "Log in, or set a variable such as HF_TOKEN; a recipe is copied and shared."
        yield Problem(place.where, f"{name} holds what looks like a secret", fix)
    elif variable := variable_in(text):
        what = f"{name} holds the value of the variable {variable}, which names a secret"
        fix = f"A recipe is copied and shared: write it without. Where it is no secret, unset {variable}."
        yield Problem(place.where, what, fix)
