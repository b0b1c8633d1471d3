"""Mends for processes that are launched already: another launch file or number of processes takes a command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from qwentune.facts.launch import Sharding, launch_file, sharding_of
from qwentune.memory.mends import Mend
from qwentune.memory.plan_request import Auto
from qwentune.memory.run_plan import RunPlan


def relaunched(
    mend: Mend,
    arguments: Sequence[str],
    num_ranks: int,
    judged: Callable[[Sequence[str], int, Sharding | Auto], RunPlan],
) -> str:
    """The mend as it can be pasted: overrides, or where they name processes, a command for the shell.

    Args:
        arguments: What stands after `qwentune.train`: the recipe, its overrides, flags.
        num_ranks: How many processes there are.
        judged: The plan of the recipe with more overrides, for so many processes that share so much.
    """
    asked = dict(override.split("=", 1) for override in mend.overrides)
    launch, count = asked.pop("hardware.launch", None), asked.pop("hardware.count", None)
    if launch is None and count is None:
        return " ".join(mend.overrides)
    others = [f"{key}={value}" for key, value in asked.items()]
    sharding = "auto" if launch in (None, "auto") else sharding_of(launch)
    plan = judged(others, num_ranks if count is None else int(count), sharding)
    name = "single" if plan.choices.sharding == "none" else plan.choices.sharding
    command = ["accelerate", "launch", "--config_file", _short(launch_file(name)), "--num_processes", str(plan.gpus)]
    return shlex.join([*command, "-m", "qwentune.train", *arguments, *others])


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
