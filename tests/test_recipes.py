"""Every shipped recipe loads, whatever folder of `recipes/` it stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwentune.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_shipped_recipe_loads_and_writes_to_a_folder_of_its_own_name(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.recipe.output.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_shipped_recipe_opens_with_the_commands_that_run_it(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").partition("model:")[0]
    assert f"preview  recipes/{path.name}" in opening.replace("preview recipes", "preview  recipes")
    assert all(line.startswith("#") for line in opening.splitlines())
