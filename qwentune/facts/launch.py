"""Launch files: accelerate's configurations, and how each spreads a model over its processes; free of torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from qwentune.bounded import UnreadableError, name_fault, read_text
from qwentune.errors import Problem, UsageError, nearest
from qwentune.shipped import shipped, shipped_files

MAX_BYTES = 100_000
MOST_PROCESSES = 4096

Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "fsdp2"]
# By the stage, and where the optimizer's states are.
_ZERO: dict[tuple[str, str], Sharding] = {
    ("1", "none"): "zero1",
    ("2", "none"): "zero2",
    ("3", "none"): "zero3",
    ("2", "cpu"): "zero2-offload",
    ("3", "cpu"): "zero3-offload",
}
_ZERO_OPTIONS = {"zero_stage": "not given", "offload_optimizer_device": "none", "offload_param_device": "none"}


def launch_file(name: str) -> Path:
    """The accelerate configuration of that name; UsageError where `launch/` has none."""
    file = shipped(f"launch/{name}.yaml")
    if name_fault(str(file)) or not os.path.lexists(file):
        names = [Path(known).stem for known in shipped_files("launch") if known.endswith(".yaml")]
        what = f"there is no launch file {name!r}.{nearest(name, names)}"
        raise UsageError(Problem("hardware.launch", what, f"There are {', '.join(names)}."))
    return file


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launch file says: what its processes share, and how many there are.

    Where it `takes_all_gpus`, there are as many as the machine has GPUs, and `num_processes` counts on a CPU alone.
    """

    sharding: Sharding
    num_processes: int
    takes_all_gpus: bool


def read_launch(name: str) -> Launch:
    """What the launch file of that name says; UsageError where it says nothing known."""
    file = launch_file(name)
    config = _mapping(_content(file), str(file))
    sharding = _sharding(config, file)
    number = 1 if sharding == "none" else config.get("num_processes", 1)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_PROCESSES:
        what = f"num_processes is {str(number)[:40]!r}"
        raise UsageError(Problem(str(file), what, f"It is a whole number from 1 to {MOST_PROCESSES}."))
    return Launch(sharding, number, config.get("gpu_ids") == "all")


def sharding_of(name: str) -> Sharding:
    """What the launch file of that name shares among its processes; UsageError where it says nothing known."""
    return read_launch(name).sharding


def _sharding(config: Mapping[str, Any], file: Path) -> Sharding:
    kind = config.get("distributed_type")
    deepspeed = _mapping(config.get("deepspeed_config") or {}, f"{file}: deepspeed_config")
    if kind == "DEEPSPEED":
        return zero(deepspeed, str(file))
    known: dict[Any, Sharding] = {"NO": "none", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}
    if not isinstance(kind, str) or kind not in known:
        raise UsageError(Problem(str(file), f"distributed_type is {kind!r}", "It is NO, MULTI_GPU, FSDP or DEEPSPEED."))
    return known[kind]


def _content(file: Path) -> object:
    try:
        return yaml.safe_load(read_text(file, MAX_BYTES))
    except (UnreadableError, yaml.YAMLError, RecursionError) as error:
        reason = str(error) if isinstance(error, UnreadableError) else "this is not YAML, or nested without end"
        raise UsageError(Problem(str(file), reason, "`accelerate config` writes such a file.")) from None


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(Problem(where, "this is no mapping of keys", "`accelerate config` writes such a file."))
    return cast("dict[str, Any]", value)


def zero(options: Mapping[str, Any], where: str) -> Sharding:
    """The sharding that accelerate's options for DeepSpeed make; UsageError, with `where`, for an unknown one."""
    asked = {name: str(options.get(name, default)).lower() for name, default in _ZERO_OPTIONS.items()}
    stage, states, weights = asked.values()
    if (stage, states) not in _ZERO or weights != "none":
        fix = "zero_stage is 1, 2 or 3, and in 2 and 3 offload_optimizer_device may be cpu."
        raise UsageError(Problem(where, ", ".join(f"{name} is {value}" for name, value in asked.items()), fix))
    return _ZERO[stage, states]


def zero_of_environment() -> Sharding:
    """The sharding that accelerate has told this process; UsageError for one that is not known."""
    prefix = "ACCELERATE_DEEPSPEED_"
    told = {name: os.environ[prefix + name.upper()] for name in _ZERO_OPTIONS if prefix + name.upper() in os.environ}
    return zero(told, "deepspeed_config")


def uses_deepspeed(sharding: Sharding) -> bool:
    """Whether DeepSpeed runs the optimizer, over an fp32 copy of the trained parameters."""
    return sharding in _ZERO.values()


def offloads(sharding: Sharding) -> bool:
    """Whether the optimizer and its states are in host memory."""
    return sharding in ("zero2-offload", "zero3-offload")
