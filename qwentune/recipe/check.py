"""Everything that is wrong with a recipe's tree: unknown and missing keys, wrong values, contradictions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast, get_args, get_origin

from pydantic import ValidationError

from qwentune.bounded import name_fault
from qwentune.errors import Problem, nearest
from qwentune.peers.key_tables import counterpart, reason_against
from qwentune.recipe.contradictions import contradictions
from qwentune.recipe.keys import bare, choices, describe_keys, fields, hint, in_words, is_section
from qwentune.recipe.schema import REASONS_AGAINST, Recipe, Section
from qwentune.recipe.secrets import secrets
from qwentune.recipe.syntax import Node, Place, plain, resolve
from qwentune.redaction import redact

NUM_EXPLAINED = 30  # mistakes


def validate(root: Node) -> Recipe | list[Problem]:
    """The recipe of a tree, its derived defaults not yet settled; or every problem of the tree."""
    problems = [*contradictions(root), *secrets(root)]
    try:
        recipe = Recipe.model_validate(plain(root), by_alias=True, by_name=False)
    except ValidationError as error:
        found: dict[str, Problem] = {}
        for line in error.errors(include_url=False, include_context=False, include_input=False):
            spot = _follow(line["loc"], root)
            # A union reports each of its members: the first report of a key stands for all.
            if spot.name not in found:
                found[spot.name] = _problem(spot, is_explained=len(found) < NUM_EXPLAINED)
        return [*found.values(), *problems]
    return problems or recipe


@dataclass(frozen=True, slots=True)
class _Spot:
    """A place that the schema complains about.

    `annotation` is None where the schema does not know the key, `node` is None where the recipe lacks it.
    """

    name: str
    place: Place
    annotation: Any
    node: Node | None
    section: type[Section]
    known: tuple[str, ...] = ()  # the names that may stand here, where they are not the keys of the section


def _follow(path: tuple[int | str, ...], root: Node) -> _Spot:
    """Walks tree and schema together, as far into `path` as it names keys and list items of the recipe."""
    spot = _Spot("", root.place, Recipe, root, Recipe)
    for step, after in zip_longest(path, path[1:]):
        inner, node, known = bare(spot.annotation), spot.node, tuple[str, ...]()
        name = f"{spot.name}.{step}" if spot.name else str(step)
        if step == "[key]":
            return spot
        if is_section(inner):
            info = fields(inner).get(str(step))
            annotation = None if info is None else hint(info)
            section = inner
        elif get_origin(inner) in {list, dict}:
            annotation, section = get_args(inner)[-1], spot.section
            if after == "[key]":  # the name itself is wrong, not what stands under it
                annotation, known = None, tuple(choices(get_args(inner)[0]))
        else:
            return spot
        if node is not None and isinstance(node.value, dict) and str(step) in node.value:
            child = node.value[str(step)]
            key_place = node.keys[str(step)]
            spot = _Spot(name, key_place if annotation is None else child.place, annotation, child, section, known)
        elif node is not None and isinstance(node.value, list) and isinstance(step, int):
            child = node.value[step]
            spot = _Spot(name, child.place, annotation, child, section)
        else:
            return _Spot(name, spot.place, annotation, None, section)
    return spot


def _problem(spot: _Spot, *, is_explained: bool) -> Problem:
    if spot.annotation is None:
        return _unknown(spot, is_explained=is_explained)
    if spot.node is None:
        return _missing(spot)
    expected = in_words(spot.annotation)
    value, fix = spot.node.value, ""
    if isinstance(value, str) and (reason := REASONS_AGAINST.get((spot.name, value))):
        fix = reason
    elif isinstance(value, str) and (fault := name_fault(value)):
        fix = f"It is {fault}." if fault.startswith("a name") else f"In a recipe {fault}."
    elif isinstance(value, str):
        fix = nearest(value, choices(spot.annotation)).strip()
        if not isinstance(resolve(value), str):
            fix = "Remove the quotes."
    elif isinstance(value, bool | int | float) and "text" in expected:
        fix = "In quotes it is text."
    head = f"{spot.name}: " if spot.name else ""
    return Problem(spot.place.where, f"{head}{_shown(value)} is given; {expected} is needed", fix)


def _unknown(spot: _Spot, *, is_explained: bool) -> Problem:
    """With what may be meant for the first ones: a file of another kind may have thousands."""
    prefix, _, key = spot.name.rpartition(".")
    what = f"{spot.name}: '{key}' is not a key of {prefix or 'a recipe'}."
    if not is_explained:
        return Problem(spot.place.where, what)
    known = spot.known or tuple(fields(spot.section))
    elsewhere = [other.name for other in describe_keys() if other.name.rpartition(".")[2] == key and not spot.known]
    is_ours = elsewhere or spot.known
    taken, dropped = ("", "") if is_ours else (counterpart(spot.name), reason_against(spot.name))
    if not taken and (near := nearest(key, known)):
        return Problem(spot.place.where, what + near)
    fix = f"Is it {' or '.join(elsewhere)}?" if elsewhere else taken or dropped or f"The keys are {', '.join(known)}."
    return Problem(spot.place.where, what, fix)


def _missing(spot: _Spot) -> Problem:
    inner, name = bare(spot.annotation), spot.name
    info = fields(spot.section)[name.rpartition(".")[2]]
    if is_section(inner):
        key, info = next((key, info) for key, info in fields(inner).items() if info.is_required())
        name = f"{name}.{key}"
    fix = f"It takes {in_words(hint(info))}: {info.description}."
    return Problem(spot.place.where, f"{name} is missing", fix)


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            value = redact(value)  # before it is cut, lest a part is left that is not known again
            return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'" if value else "an empty text"
        case list():
            return f"a list of {len(cast('list[object]', value))}"
        case dict():
            return "a mapping"
        case _:
            return f"the number {value}"
