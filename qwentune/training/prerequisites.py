"""What a run needs of this machine beside memory: libraries, the adapter that it starts from, weights that are whole.

Without torch, so that a supervisor asks before it launches anything.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qwentune.errors import Problem, UsageError
from qwentune.facts.adapter_config import read_adapter_config
from qwentune.facts.generation_config import read_generation_config
from qwentune.facts.launch import uses_deepspeed
from qwentune.facts.weight_files import read_adapter, read_weights
from qwentune.memory.run_plan import Choices
from qwentune.recipe import Recipe


def refuse_what_is_not_here(recipe: Recipe, choices: Choices) -> None:
    """Returns where a run with these choices of its plan has all that it names.

    Raises:
        UsageError: everything that the recipe names and this machine does not have.
        ResumeError: a file of weights that is here is cut or broken.
    """
    problems: list[Problem] = []
    if uses_deepspeed(choices.sharding) and find_spec("deepspeed") is None:
        launch = choices.sharding if recipe.hardware.launch == "auto" else recipe.hardware.launch
        what = f"launch/{launch}.yaml needs DeepSpeed, which is not installed"
        problems.append(Problem("hardware.launch", what, "pip install 'qwentune[deepspeed]'"))
    if choices.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        fix = "Install flash-attn, or leave memory.attention at auto."
        problems.append(Problem("memory.attention", "flash_attention_2 is not installed", fix))
    for tracker in recipe.output.report_to:
        if find_spec(tracker) is None:
            problems.append(Problem("output.report_to", f"{tracker} is not installed", f"pip install {tracker}"))
    start = recipe.tuning.start_from
    names = ("adapter_config.json", "adapter_model.safetensors")
    if start is not None and not all(Path(start, name).is_file() for name in names):
        fix = f"Name a folder with {' and '.join(names)}."
        problems.append(Problem("tuning.start_from", f"{start!r} holds no adapter", fix))
    if problems:
        raise UsageError(problems)
    _refuse_damaged_weights(recipe)


def _refuse_damaged_weights(recipe: Recipe) -> None:
    if Path(recipe.model).is_dir():
        read_generation_config(Path(recipe.model))  # else it is read when all is trained
        if any(Path(recipe.model).glob("*.safetensors")):
            read_weights(Path(recipe.model))
    if recipe.tuning.start_from is not None:
        read_adapter_config(Path(recipe.tuning.start_from))
        read_adapter(Path(recipe.tuning.start_from))
