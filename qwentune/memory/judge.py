"""From the sections of a recipe and what the machine has to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwentune.data.layout.row_media import RowMedia
from qwentune.data.sample import Json
from qwentune.errors import Problem, RecipeError, UsageError
from qwentune.facts.adapter_config import ADAPTER_CONFIG, read_adapter_config
from qwentune.facts.flex import flex_problem
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.launch import Launch, Sharding, read_launch
from qwentune.facts.models import ModelSpec
from qwentune.facts.present import free_disk_bytes, free_host_bytes, installed_kernels, present_gpus
from qwentune.memory.media_use import expects_media, tower_use
from qwentune.memory.plan_request import Auto, Device, PlanRequest
from qwentune.memory.profile import find_profile
from qwentune.memory.rates import with_rates
from qwentune.memory.run_plan import RunPlan, calibrated, make_plan, pinned
from qwentune.memory.settings import Attention, HostMemory, Settings, TowerUse
from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Recipe, Tuning

TRAINED_OBJECTIVES = ("sft",)
PLAN_KEYS = ("plan", "batch", "memory", "precision", "tuning")


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
    num_machines: int = 1,
    sharding: Sharding | Auto = "auto",
    optimizer_steps: int | None = None,
    learns_chat: bool = True,
    towers: TowerUse | None = None,
    largest: RowMedia | None = None,
    stored: Mapping[str, Json] | None = None,
    fresh: bool = False,
    tell: Callable[[str], None] | None = None,
) -> RunPlan:
    """The plan of a run; with the plan `stored` by an earlier start its choices are judged again, not made anew.

    Adapters of a base model that `learns_chat` train the rows of its control tokens too, unless they are continued. A
    `fresh` run leaves what the folder holds where it is on the disk.

    `towers` are what a row gives to what sees and hears, None where that is not loaded, and `largest` what the rendered
    data shows at most.

    Host memory and disk are judged where the device is this machine's; of another machine's nothing is known.

    With `tell` the training step is traced too, which takes torch and some seconds, and the trace has the last word;
    `tell` gets the figures in words. GPU-hours go by the rates that were measured on such a card, and are scaled by
    what steps took on it, where anything was measured.

    Raises UsageError where the batch cannot be shared among the ranks, or for a kernel that does not run.
    """
    is_here = _is_here(device)
    device = device if isinstance(device, HostMemory) else with_rates(device, spec.id)
    request = replace(
        _request(spec, tuning, max_tokens, batch, device, learns_chat),
        micro_batch=batch.micro_batch,
        gradient_checkpointing=memory.gradient_checkpointing,
        loss=memory.loss,
        attention=_attention(memory, device),
        sharding=sharding,
        num_gpus=num_ranks,
        num_machines=num_machines,
        weights=precision.weights,
        adapters=precision.adapters,
        optimizer_state=precision.optimizer_state,
        headroom=memory.headroom,
        keep=output.keep,
        answers=output.answers,
        optimizer_steps=optimizer_steps,
        host_free_bytes=free_host_bytes() if is_here else None,
        disk_free_bytes=free_disk_bytes(Path(output.dir), fresh=fresh) if is_here else None,
        towers=towers,
        largest=largest,
    )
    if stored is not None:
        request = pinned(request, RunPlan.from_json(stored).choices)
        if sharding != "auto":
            request = replace(request, sharding=sharding)
        elif request.sharding in ("none", "ddp"):  # which differ in the number of processes alone
            request = replace(request, sharding="none" if num_ranks == 1 else "ddp")
    plan = make_plan(spec, device, request)
    if tell is not None:
        from qwentune.memory.trace.cross_check import cross_checked

        plan = cross_checked(spec, device, request, plan, tell)
    _refuse_kernel_that_does_not_run(plan, device)
    return calibrated(plan, find_profile(spec, tuning.kind, device))


def judge_recipe(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    device: Device,
    num_ranks: int,
    sharding: Sharding | Auto,
    longest_row: int | None = None,
    media: RowMedia | None = None,
    **options: Any,
) -> RunPlan:
    """The plan of a recipe on so many devices that share so much; `options` are those of `judge`.

    Args:
        longest_row: The most tokens of a row of the rendered data; None judges by `data.max_tokens`.
        media: The most that a row of the rendered data shows; None judges by as many pads as a row can hold.

    Raises RecipeError for an objective that cannot be trained.
    """
    if recipe.objective.kind not in TRAINED_OBJECTIVES:
        what = f"{recipe.objective.kind} cannot be trained yet"
        fix = f"What is trained: {', '.join(TRAINED_OBJECTIVES)}. `qwentune preview` shows such rows."
        raise RecipeError(Problem("objective.kind", what, fix))
    max_tokens = min(recipe.data.max_tokens, longest_row or recipe.data.max_tokens)
    has_media = expects_media(spec, recipe.data, media)
    return judge(
        spec,
        tuning=recipe.tuning,
        max_tokens=max_tokens,
        batch=recipe.batch,
        precision=recipe.precision,
        memory=recipe.memory,
        output=recipe.output,
        device=device,
        num_ranks=num_ranks,
        sharding=sharding,
        learns_chat=recipe.data.has_turns,
        towers=tower_use(spec, recipe.tuning, max_tokens, media, has_media=has_media),
        largest=media,
        **options,
    )


def settings_of(
    plan: RunPlan,
    spec: ModelSpec,
    *,
    tuning: Tuning,
    max_tokens: int,
    batch: BatchOptions,
    device: Device,
    learns_chat: bool = True,
    towers: TowerUse | None = None,
) -> Settings:
    """The settings of the training step that the plan chose, or judged again."""
    request = _request(spec, tuning, max_tokens, batch, device, learns_chat)
    return replace(request, num_gpus=plan.gpus, towers=towers).settings(device, **asdict(plan.choices))


def _request(
    spec: ModelSpec, tuning: Tuning, max_tokens: int, batch: BatchOptions, device: Device, learns_chat: bool
) -> PlanRequest:
    """What the tuning fixes of a step on that device, with every choice of the plan still open."""
    has_adapters = tuning.kind != "full"
    return PlanRequest(
        kind=tuning.kind,
        max_tokens=max_tokens,
        sequences_per_step=batch.sequences_per_step,
        rank=tuning.rank,
        targets=tuning.targets if isinstance(tuning.targets, str) else tuple(tuning.targets),
        drops=has_adapters and tuning.dropout > 0,
        dora=has_adapters and tuning.variant == "dora",
        trains_rows=_trains_rows(spec, tuning, learns_chat),
        branches=learns_chat and _rewrites_history(spec),
        kernels=kernels_beside(device),
    )


def kernels_beside(device: Device) -> frozenset[str]:
    """What is installed here is taken to be installed where another GPU runs too."""
    return frozenset() if isinstance(device, HostMemory) else installed_kernels()


def _rewrites_history(spec: ModelSpec) -> bool:
    """Whether the model's chat template makes several examples of a dialogue, whose shared beginnings stand once.

    Templates of models that think drop old reasoning; those of Qwen3's base models are the same. Hybrids take every
    example for itself.
    """
    thinks = spec.kind in ("hybrid", "thinking") or (spec.kind == "base" and spec.model_type.startswith("qwen3"))
    return thinks and spec.linear_attention is None


def _trains_rows(spec: ModelSpec, tuning: Tuning, learns_chat: bool) -> bool:
    """Whether rows of embedding and head are trained beside adapters; which tokens' is known with the data alone."""
    if tuning.kind == "full":
        return False
    if tuning.start_from is not None and Path(tuning.start_from, ADAPTER_CONFIG).is_file():
        return bool(read_adapter_config(Path(tuning.start_from)).get("trainable_token_indices"))
    return spec.kind == "base" and learns_chat


def _attention(memory: MemoryOptions, device: Device) -> Attention | Auto:
    """The kernel that is asked for; where FlexAttention does not train the plan has one choice less."""
    if memory.attention == "auto" and (isinstance(device, HostMemory) or flex_problem(device)):
        return "sdpa"
    return memory.attention


def _refuse_kernel_that_does_not_run(plan: RunPlan, device: Device) -> None:
    """Flash kernels compute in 16 bits, from Ampere on; FlexAttention goes backward on GPUs alone.

    Source: torch 2.13's `_validate_device` in nn/attention/flex_attention.py.
    """
    choices, fix = plan.choices, "Leave it at auto, or take sdpa."
    if choices.attention == "flash_attention_2" and choices.weights != "bf16":
        what = f"flash_attention_2, which computes in 16 bits, but the weights are {choices.weights}"
        raise UsageError(Problem("memory.attention", what, "Leave it at auto, or set precision.weights=bf16."))
    if choices.attention not in ("flash_attention_2", "flex_attention"):
        return
    if isinstance(device, HostMemory):
        raise UsageError(Problem("memory.attention", f"{choices.attention} trains on a GPU only", fix))
    if choices.attention == "flex_attention":
        if problem := flex_problem(device):
            raise UsageError(problem)
    elif device.compute_capability < (8, 0):
        capability = ".".join(map(str, device.compute_capability))
        what = f"{choices.attention} needs compute capability 8.0 (Ampere), and {device.name} has {capability}"
        raise UsageError(Problem("memory.attention", what, fix))


def changes_the_plan(allowed: Sequence[str]) -> bool:
    """Whether a change that the user allows may make another plan than the stored one."""
    return any(key.startswith(PLAN_KEYS) for key in allowed)


def device_of(hardware: Hardware, *, here: bool) -> tuple[Device, int, Sharding | Auto]:
    """The device of each rank, how many a machine has, and what they share where the recipe names a launch file.

    `here` asks for what this machine has, as a run that starts now does; else the recipe's GPU counts, and the
    machine's own only where the recipe leaves it open. A GPU that is present is judged by its free memory.
    """
    launch = None if hardware.launch == "auto" else read_launch(hardware.launch)
    sharding: Sharding | Auto = "auto" if launch is None else launch.sharding
    if sharding == "none" and hardware.count not in ("auto", 1):
        what = f"{hardware.count}, but launch/{hardware.launch}.yaml runs one process"
        fix = "Leave out one of hardware.count and hardware.launch."
        raise UsageError(Problem("hardware.count", what, fix))
    present = None if hardware.gpu == "cpu" else present_gpus()
    count = _num_processes(hardware, launch, 0 if present is None else present.count)
    found = None if present is None else present.of_ranks(count)
    if hardware.gpu not in ("auto", "cpu") and not here:
        named = gpu_spec(hardware.gpu)
        if found is None or found.name != named.name:
            return named, _num_processes(hardware, launch, 1), sharding
    return HostMemory(free_host_bytes()) if found is None else found, count, sharding


def _num_processes(hardware: Hardware, launch: Launch | None, num_gpus: int) -> int:
    """As many as the recipe says, else the launch file, else one for each GPU; one on a CPU."""
    if hardware.count != "auto":
        return hardware.count
    if launch is not None and not (num_gpus and launch.takes_all_gpus):
        return launch.num_processes
    return max(1, num_gpus)


def _is_here(device: Device) -> bool:
    return isinstance(device, HostMemory) or device.is_here
