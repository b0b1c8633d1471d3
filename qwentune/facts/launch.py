"""Launch files: accelerate's configurations, and how each spreads a model over its processes; free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from qwentune.errors import Problem, UsageError, nearest
from qwentune.shipped import shipped, shipped_files

Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]


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
    stage = deepspeed.get("zero_stage")
    known: dict[tuple[Any, Any], Sharding] = {
        ("NO", None): "none",
        ("MULTI_GPU", None): "ddp",
        ("FSDP", None): "fsdp2",
        ("DEEPSPEED", 2): "zero2",
        ("DEEPSPEED", 3): "zero3",
    }
    if (kind, stage) not in known:
        fix = "It is NO, MULTI_GPU, FSDP, or DEEPSPEED with zero_stage 2 or 3."
        raise UsageError(Problem(str(file), f"distributed_type is {kind!r}, zero_stage {stage!r}", fix))
    return known[kind, stage]
