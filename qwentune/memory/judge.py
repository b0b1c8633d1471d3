"""From the sections of a recipe and what the machine has to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwentune.data.sample import Json
from qwentune.errors import Problem
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import ModelSpec
from qwentune.facts.present import free_disk_bytes, free_host_bytes, present_gpus
from qwentune.memory.plan import RunPlan, make_plan, pinned
from qwentune.memory.search import Auto, Device, PlanRequest
from qwentune.memory.settings import HostMemory, Sharding
from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Tuning


def judge(
    spec: ModelSpec,
    *,
    tuning: Tuning,
    max_tokens: int,
    batch: BatchOptions,
    precision: Precision,
    memory: MemoryOptions,
    output: OutputOptions,
    device: Device,
    num_ranks: int,
    sharding: Sharding | Auto = "auto",
    optimizer_steps: int | None = None,
    stored: Mapping[str, Json] | None = None,
) -> RunPlan:
    """The plan of a run; with the plan `stored` by an earlier start its choices are judged again, not made anew.

    Raises UsageError where the batch cannot be shared among the ranks.
    """
    request = PlanRequest(
        kind=tuning.kind,
        max_tokens=max_tokens,
        sequences_per_step=batch.sequences_per_step,
        rank=tuning.rank,
        targets=tuning.targets if isinstance(tuning.targets, str) else tuple(tuning.targets),
        micro_batch=batch.micro_batch,
        gradient_checkpointing=memory.gradient_checkpointing,
        loss=memory.loss,
        attention=memory.attention,
        sharding=sharding,
        num_gpus=num_ranks,
        weights=precision.weights,
        adapters=precision.adapters,
        optimizer_state=precision.optimizer_state,
        headroom=memory.headroom,
        keep=output.keep,
        optimizer_steps=optimizer_steps,
        host_free_bytes=free_host_bytes(),
        disk_free_bytes=free_disk_bytes(Path(output.dir)),
    )
    if stored is not None:
        request = pinned(request, RunPlan.from_json(stored).choices)
        if sharding != "auto":
            request = replace(request, sharding=sharding)
    return make_plan(spec, device, request)


def device_of(hardware: Hardware, *, here: bool) -> tuple[Device, int]:
    """The device of each rank and how many there are.

    `here` asks for what this machine has, as a run that starts now does; else the recipe's GPU counts, and the
    machine's own only where the recipe leaves it open. A GPU that is present is judged by its free memory.
    """
    present = None if hardware.gpu == "cpu" else present_gpus()
    if hardware.gpu not in ("auto", "cpu") and not here and (present is None or present.spec.name != hardware.gpu):
        return gpu_spec(hardware.gpu), 1 if hardware.count == "auto" else hardware.count
    if present is None:
        return HostMemory(free_host_bytes()), 1 if hardware.count == "auto" else hardware.count
    return present.spec, present.count if hardware.count == "auto" else hardware.count


def refusal(plan: RunPlan) -> list[Problem]:
    """Why the plan does not fit, and the cheapest changes that do, as overrides to paste."""
    needed, usable = plan.peak_bytes / 2**30, plan.usable_bytes / 2**30
    shortage = {
        "host": f"needs {plan.host_bytes / 2**30:.1f} GiB of host memory",
        "disk": f"needs {plan.disk_bytes / 2**30:.1f} GiB of disk",
    }.get(plan.limiting_phase, f"needs {needed:.1f} of {usable:.1f} GiB in the phase {plan.limiting_phase}")
    fixes = [f"{mend.change}: {' '.join(mend.overrides)}" for mend in plan.mends[:3]]
    return [Problem(plan.gpu, f"the run does not fit: it {shortage}", "\n    ".join(fixes))]
