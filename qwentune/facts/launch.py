"""Launch files: accelerate's configurations, and how each spreads a model over its processes; free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from qwentune.errors import Problem, UsageError, nearest
from qwentune.shipped import shipped, shipped_files

Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
_ZERO: tuple[Sharding, ...] = ("zero1", "zero2", "zero3")


def launch_file(name: str) -> Path:
    """The accelerate configuration of that name; UsageError where `launch/` has none."""
    file = shipped(f"launch/{name}.yaml")
    if not file.exists():
        names = [Path(known).stem for known in shipped_files("launch")]
        what = f"there is no launch file {name!r}.{nearest(name, names)}"
        raise UsageError(Problem("hardware.launch", what, f"There are {', '.join(names)}."))
    return file


def sharding_of(name: str) -> Sharding:
    """What the launch file of that name shares among its processes; UsageError where it says nothing known."""
    file = launch_file(name)
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    kind = config.get("distributed_type")
    deepspeed: dict[str, Any] = config.get("deepspeed_config") or {}
    if kind == "DEEPSPEED":
        return zero(deepspeed.get("zero_stage"), str(file))
    known: dict[Any, Sharding] = {"NO": "none", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}
    if kind not in known:
        raise UsageError(Problem(str(file), f"distributed_type is {kind!r}", "It is NO, MULTI_GPU, FSDP or DEEPSPEED."))
    return known[kind]


def zero(stage: Any, where: str) -> Sharding:
    """The sharding of a stage of DeepSpeed's ZeRO that was read from `where`; UsageError for any but 1, 2 and 3."""
    found: Sharding | None = next((name for name in _ZERO if name == f"zero{stage}"), None)
    if found is None:
        raise UsageError(Problem(where, f"zero_stage is {stage!r}", "It is 1, 2 or 3."))
    return found


def uses_deepspeed(sharding: Sharding) -> bool:
    """Whether DeepSpeed runs the optimizer, over an fp32 copy of the trained parameters."""
    return sharding in _ZERO
