"""The typed recipe and its loader: file and overrides in, a frozen `Recipe` or every problem at once out."""

from qwentune.recipe.keys import Key, describe_keys, render_keys
from qwentune.recipe.loader import LoadedRecipe, load_recipe, parse_recipe
from qwentune.recipe.resolved import resolved_yaml
from qwentune.recipe.schema import (
    LIKELIHOODS,
    BatchOptions,
    DataOptions,
    DataSource,
    Fim,
    Hardware,
    MediaOptions,
    MemoryOptions,
    Objective,
    OptimizerOptions,
    OutputOptions,
    Precision,
    Recipe,
    ScoreName,
    Tuning,
)

__all__ = [
    "LIKELIHOODS",
    "BatchOptions",
    "DataOptions",
    "DataSource",
    "Fim",
    "Hardware",
    "Key",
    "LoadedRecipe",
    "MediaOptions",
    "MemoryOptions",
    "Objective",
    "OptimizerOptions",
    "OutputOptions",
    "Precision",
    "Recipe",
    "ScoreName",
    "Tuning",
    "describe_keys",
    "load_recipe",
    "parse_recipe",
    "render_keys",
    "resolved_yaml",
]
