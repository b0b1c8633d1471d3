"""Tokens and passwords have no place in a recipe, which is copied into the run folder."""

from __future__ import annotations

from collections.abc import Iterator

from qwentune.errors import Problem
from qwentune.recipe.syntax import Node
from qwentune.redaction import holds_a_token


def secrets(node: Node, name: str = "") -> Iterator[Problem]:
    """A problem for each text of the tree that holds what looks like a token or a password; never the text itself."""
    if isinstance(node.value, str) and holds_a_token(node.value):
        what = f"{name} holds what looks like a secret"
        yield Problem(
            node.place.where, what, "Log in, or set a variable such as HF_TOKEN; a recipe is copied and shared."
        )
    children = node.value.items() if isinstance(node.value, dict) else ()
    if isinstance(node.value, list):
        children = [(str(place), item) for place, item in enumerate(node.value)]
    for key, child in children:
        yield from secrets(child, f"{name}.{key}" if name else key)
