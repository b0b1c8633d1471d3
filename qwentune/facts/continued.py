"""What a recipe takes over from the adapter that it starts from, and what it must not say otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from qwentune.errors import Problem, RecipeError, ResumeError
from qwentune.facts.adapter_config import ADAPTER_CONFIG, read_adapter_config
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.modules import adaptable_modules, adapted_modules
from qwentune.recipe import LoadedRecipe
from qwentune.recipe.resolved import DEFAULT

FREE = ("alpha", "dropout")  # what the tensors of an adapter do not decide
# Fused experts are adapted as parameters; what they are called in a list of modules.
_OF_PARAMETERS = {
    "gate_up_proj": ("experts.gate_proj", "experts.up_proj"),
    "down_proj": ("experts.down_proj",),
    "gate.weight": ("gate",),
}


def continued(loaded: LoadedRecipe, spec: ModelSpec) -> tuple[LoadedRecipe, list[str]]:
    """The recipe with the shape of the adapter that it starts from, and what is to be said of that, in words.

    What the recipe leaves open is the adapter's. Its alpha and dropout may be changed.

    Raises:
        RecipeError: a rank, targets or a variant that the recipe gives otherwise than the adapter has them (all).
        ResumeError: the adapter's configuration cannot be used.
    """
    tuning = loaded.recipe.tuning
    if tuning.kind == "full" or tuning.start_from is None:
        return loaded, []
    path = Path(tuning.start_from, ADAPTER_CONFIG)
    if not path.is_file():
        return loaded, [f"tuning.start_from: there is no {path} yet; what it decides is taken from the recipe"]
    found = _tuning_of(read_adapter_config(path.parent), spec, path)
    problems: list[Problem] = []
    taken: dict[str, Any] = {}
    changed: list[str] = []
    for key, value in found.items():
        asked = getattr(tuning, key)
        if loaded.origins[f"tuning.{key}"] == DEFAULT:
            taken[key] = value
        elif key in FREE and asked != value:
            changed.append(f"tuning.{key}: {asked:g} from the first step on; the adapter was trained with {value:g}")
        elif key not in FREE and not _is_same(key, asked, value, spec):
            what = f"{_in_words(asked)}, but the adapter {tuning.start_from} has {_in_words(value)}"
            fix = "Leave it out to continue that adapter; without tuning.start_from a new one is trained."
            problems.append(Problem(f"tuning.{key}", what, fix))
    if "alpha" in taken and (taken["alpha"] % 1 or not taken["alpha"]):
        what = f"the adapter {tuning.start_from} has {taken['alpha']:g}, and a recipe takes whole numbers from 1 on"
        problems.append(Problem("tuning.alpha", what, "Give tuning.alpha: it counts from the first step on."))
    if problems:
        raise RecipeError(problems)
    if "alpha" in taken:
        taken["alpha"] = int(taken["alpha"])
    recipe = loaded.recipe.model_copy(update={"tuning": tuning.model_copy(update=taken)})
    origins = {**loaded.origins, **{f"tuning.{key}": str(path) for key in taken}}
    remarks = [f"{key}: {_in_words(value)}" for key, value in taken.items() if value != getattr(tuning, key)]
    said = [f"tuning.start_from: the recipe leaves open what {path} says: {', '.join(remarks)}"] if remarks else []
    return replace(loaded, recipe=recipe, origins=origins), [*said, *changed]


def _tuning_of(config: Mapping[str, Any], spec: ModelSpec, path: Path) -> dict[str, Any]:
    """The adapter's shape under the keys of a recipe's `tuning`."""
    variants = [name for name, key in (("rslora", "use_rslora"), ("dora", "use_dora")) if config.get(key)]
    return {
        "rank": config["r"],
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout") or 0.0,
        "targets": _targets(config, spec, path),
        "variant": "+".join(variants) or "plain",
    }


def _targets(config: Mapping[str, Any], spec: ModelSpec, path: Path) -> str | list[str]:
    """What the adapter stands around, as short as `tuning.targets` can say it."""
    given: str | list[str] = config["target_modules"] or []
    parameters = [name.rpartition("experts.")[2] for name in config.get("target_parameters") or ()]
    of_parameters = [module for name in parameters for module in _OF_PARAMETERS.get(name, ())]
    if isinstance(given, str) and given != "all-linear":
        try:
            names = frozenset(name for name in adaptable_modules(spec) if re.fullmatch(given, name))
        except re.error as error:
            what = f"target_modules is {given[:100]!r}, which is no regular expression: {error}"
            raise ResumeError(Problem(str(path), what)) from None
    else:
        names = adapted_modules(spec, given)
    names |= adapted_modules(spec, of_parameters)
    if not names:
        what = f"the adapter {path.parent} stands around no module of {spec.id}"
        raise RecipeError(Problem("tuning.start_from", what, "Name one that was trained on this model."))
    if names == adapted_modules(spec, "all-linear"):
        return "all-linear"
    short = sorted({name.rpartition(".")[2] for name in names})
    return short if names == adapted_modules(spec, short) else sorted(names)


def _is_same(key: str, asked: Any, value: Any, spec: ModelSpec) -> bool:
    if key == "targets":
        return adapted_modules(spec, asked) == adapted_modules(spec, value)
    return asked == value


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, cast('list[object]', value)))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
