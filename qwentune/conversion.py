"""A recipe from a configuration of another tool, checked as one that a user wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from qwentune.errors import Problem, RecipeError, UsageError
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import MODELS, model_spec, refuse_untrainable
from qwentune.peers.configuration import Given
from qwentune.peers.draft import draft, table
from qwentune.peers.translate import translate_file
from qwentune.peers.translation import Translation
from qwentune.recipe import describe_keys, parse_recipe


def recipe_from(source: Path, recipe: str, gpu: str | None) -> tuple[str, list[str]]:
    """The text of the recipe `recipe` that a configuration means, and the lines of a table of every key.

    Raises UsageError with everything that has no counterpart and without which there is no recipe.
    """
    translation = translate_file(source)
    if gpu not in (None, "auto"):
        name = gpu if gpu == "cpu" else gpu_spec(gpu).name
        translation.set("hardware.gpu", name, Given("--gpu", gpu, "--gpu"))
    problems = [*translation.problems, *_problems_of_model(translation)]
    defaults = {key.name: key.default for key in describe_keys()}
    made = draft(translation, recipe, defaults)
    try:
        parse_recipe(made.text, recipe)
    except RecipeError as error:
        for problem in error.problems:
            line = re.search(r":(\d+)(:\d+)?$", problem.where)
            given = made.sources.get(int(line[1])) if line else None
            if given is not None and given.where not in {one.where for one in problems}:
                problem = replace(problem, where=given.where or problem.where, what=f"{given.key}: {problem.what}")
                problems.append(problem)
            elif given is None and not problems:
                problems.append(problem)
    if problems:
        raise UsageError(list(dict.fromkeys(problems)), "Nothing was written.")
    return made.text, table(translation, defaults)


def _problems_of_model(translation: Translation) -> list[Problem]:
    """Why a configuration's model is none to train here; a folder that is elsewhere becomes the hub id of its name."""
    setting = translation.settings.get("model")
    if setting is None:
        return []
    name, where = setting.value, setting.sources[0].where
    last = Path(name).name
    published = next((known for known in MODELS if known.lower() == f"qwen/{last}".lower()), None)
    if published is not None and name != published and not Path(name).is_dir():
        remark = "" if name.lower() == published.lower() else f"{name} is not here: the hub id of that name"
        translation.set("model", published, *setting.sources, remark=remark)
        name = published
    try:
        refuse_untrainable(model_spec(name))
    except UsageError as error:
        if not any(word in name.lower() for word in ("qwen", "qwq", "qvq")) and not Path(name).is_dir():
            return [Problem(where, f"model: {name} is no Qwen, and only Qwen models are trained here")]
        return [replace(problem, where=where) for problem in error.problems]
    return []
