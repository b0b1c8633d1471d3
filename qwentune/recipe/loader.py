"""From a recipe file and overrides to a frozen recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qwentune.bounded import UnreadableError, name_fault, read_bytes
from qwentune.errors import Problem, RecipeError, ResumeError, UserError, nearest
from qwentune.recipe.check import validate
from qwentune.recipe.keys import is_key
from qwentune.recipe.overrides import apply_override
from qwentune.recipe.resolved import origins_of
from qwentune.recipe.schema import DECAY_FRACTION, EITHER, FULL_LEARNING_RATE, OptimizerOptions, OutputOptions, Recipe
from qwentune.recipe.syntax import Node, Place, places, read_file_text
from qwentune.shipped import shipped, shipped_files

MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and its history.

    `origins` maps dotted keys (`data.train.0.path`) to `file:line`, `override` or `default`, `places` those that are
    given to `file:line:column` or the override. `path` is as given, `text` is the file as it stands.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    places: Mapping[str, str]
    path: str
    text: str

    @contextmanager
    def located(self) -> Generator[None]:
        """Puts in front of a problem that names a key of the recipe where that key is said.

        A key that the recipe leaves out is sought where its section stands.
        """
        try:
            yield
        except ResumeError:  # its table names keys, of now and of then
            raise
        except UserError as error:
            raise error.at(self._located) from None

    def _located(self, problem: Problem) -> Problem:
        key = problem.where
        if not is_key(key):
            return problem
        parts = key.split(".")
        said = (self.places.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
        return replace(problem, where=next(filter(None, said), self.path), what=f"{key}: {problem.what}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of a file with `key.path=value` overrides applied, all defaults settled.

    A path under `recipes/` that does not exist falls back to the recipe of that name shipped with qwentune.

    Raises:
        RecipeError: every problem of the file and the overrides at once.
    """
    return parse_recipe(_read(str(path)), str(path), overrides)


def parse_recipe(text: str, path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe that the file `path` holds, or held, as `text`; otherwise as `load_recipe`."""
    problems: list[Problem] = []
    root = read_file_text(text, path, problems)
    if root is None and problems:
        raise RecipeError(problems)
    if root is None or root.value is None:
        root = Node({}, Place(f"{path}:1:1", f"{path}:1"), {})
    if not isinstance(root.value, dict):
        what = "a recipe is a mapping of keys, like `model: Qwen/Qwen3-8B`; this file holds something else"
        raise RecipeError([Problem(root.place.where, what), *problems])
    expand_sources(root)
    for override in overrides:
        apply_override(root, override, problems)
    expand_sources(root)
    checked = validate(root)
    if not isinstance(checked, Recipe) or problems:
        found = [] if isinstance(checked, Recipe) else checked
        raise RecipeError(sorted([*problems, *found], key=_position))
    recipe = _settle(checked, Path(path).stem)
    return LoadedRecipe(recipe, origins_of(recipe, root), dict(places(root)), path, text)


def expand_sources(root: Node) -> None:
    """Writes bare paths under `data.train` and `data.eval` as the sources they stand for."""
    data = root.value.get("data") if isinstance(root.value, dict) else None
    if data is None or not isinstance(data.value, dict):
        return
    for key in {"train", "eval"} & data.value.keys():
        node = data.value[key]
        if isinstance(node.value, str):
            data.value[key] = Node([_source(node)], node.place, {})
        elif isinstance(node.value, list):
            node.value[:] = [_source(item) if isinstance(item.value, str) else item for item in node.value]


def _source(path: Node) -> Node:
    return Node({"path": path}, path.place, {"path": path.place})


def _read(path: str) -> str:
    file = shipped(path)
    if not name_fault(path) and not os.path.lexists(file):
        known = shipped_files("recipes")
        fix = nearest(path, known).strip() or f"Shipped recipes: {', '.join(known)}."
        raise RecipeError(Problem(path, "there is no such file", fix))
    try:
        content = read_bytes(file, MAX_BYTES)
    except UnreadableError as error:
        fix = "A recipe is a YAML file of some lines; it names data files under data.train."
        raise RecipeError(Problem(path, str(error), fix)) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        what = f"the byte 0x{content[error.start]:02x} is not UTF-8"
        raise RecipeError(Problem(f"{path}:{line}:{column}", what, "Save the file as UTF-8.")) from None


def _position(problem: Problem) -> tuple[float, int]:
    """Problems are reported down the file, then the overrides in the order in which they were found."""
    match = re.search(r":(\d+):(\d+)$", problem.where)
    return (int(match[1]), int(match[2])) if match else (float("inf"), 0)


def _settle(recipe: Recipe, name: str) -> Recipe:
    """Puts in the defaults that depend on other keys or on the recipe's name."""
    settled: dict[str, dict[str, object]] = {"optimizer": {}, "output": {}}
    defaults = {"optimizer": OptimizerOptions(), "output": OutputOptions()}
    for first, second, _ in EITHER:
        section, _, key = first.partition(".")
        given = getattr(recipe, section)
        if getattr(given, second.partition(".")[2]) is not None:
            settled[section][key] = None
        elif getattr(given, key) is None:
            settled[section][key] = getattr(defaults[section], key)
    optimizer, output = recipe.optimizer, recipe.output
    if recipe.tuning.kind == "full" and "learning_rate" not in optimizer.model_fields_set:
        settled["optimizer"]["learning_rate"] = FULL_LEARNING_RATE
    if optimizer.schedule == "wsd" and optimizer.decay_fraction is None:
        settled["optimizer"]["decay_fraction"] = DECAY_FRACTION
    if "dir" not in output.model_fields_set:
        settled["output"]["dir"] = f"runs/{name}"
    return recipe.model_copy(
        update={key: getattr(recipe, key).model_copy(update=update) for key, update in settled.items()}
    )
