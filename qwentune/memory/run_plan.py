"""The plan of a run: whether it fits, with which settings, where its bytes go, and what would mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import cast

from pydantic import TypeAdapter, ValidationError

from qwentune.data.sample import Json
from qwentune.errors import Problem, ResumeError
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding
from qwentune.memory.closed_form.host_memory import disk_bytes
from qwentune.memory.closed_form.roofline import step_seconds
from qwentune.memory.mends import Mend, find_mends
from qwentune.memory.plan_request import Device, PlanRequest, usable_bytes
from qwentune.memory.profile import Profile
from qwentune.memory.reasons import cost_reasons
from qwentune.memory.search import burden, candidates, fastest, host_phases, needed_host_bytes, shortages
from qwentune.memory.settings import GIB, MOST_BF16_SUMS, Attention, Dtype, Loss, Settings, StateDtype

FEWEST_USEFUL_STEPS = 50
FEWEST_SPARE = 0.03  # of the usable bytes


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """The bytes of one phase at its worst moment, and what they are for."""

    total: int
    terms: dict[str, int]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the plan chose (or the recipe pinned); a later start of the same run uses it unchanged."""

    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool | int
    loss: Loss
    attention: Attention
    sharding: Sharding
    weights: Dtype
    adapters: Dtype
    optimizer_state: StateDtype


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A plan as `plan --json` prints it, per rank.

    `limiting_phase` is the phase with the highest peak, or "host" or "disk" where only that does not suffice.
    `gpu` is "cpu" for a run on the CPU. `host_bytes` is what a run needs of the machine's memory, all ranks together;
    `host_phases` are its phases, where a merge beside GPUs may take more. `gpu_hours` are the roofline's, times the
    factor of a `profile`. `expansion_factor` says how many tokens the model is given for each of one rendering of the
    data, None where that has not been counted. `row_tokens` are those of the longest row that memory is judged by, and
    `reasons` say of large costs why they are. `step_seconds` are the roofline's of a step whose rows are all as
    long, None on a CPU.
    """

    schema: int
    fits: bool
    gpu: str
    gpus: int
    usable_bytes: int
    peak_bytes: int
    allocated_peak_bytes: int
    limiting_phase: str
    phases: dict[str, PhaseBytes]
    choices: Choices
    optimizer_steps: int | None
    gpu_hours: float | None
    host_bytes: int
    disk_bytes: int
    mends: tuple[Mend, ...]
    profile: Profile | None = None
    host_phases: dict[str, int] = field(default_factory=dict[str, int])
    expansion_factor: float | None = None
    row_tokens: int | None = None
    reasons: tuple[str, ...] = ()
    step_seconds: float | None = None

    @property
    def is_tight(self) -> bool:
        """Whether the run fits with so little spare that anything unforeseen ends it."""
        return self.fits and self.usable_bytes - self.peak_bytes < FEWEST_SPARE * self.usable_bytes

    def to_json(self) -> dict[str, Json]:
        """The plan as JSON values."""
        return {**cast("dict[str, Json]", _adapter().dump_python(self, mode="json")), "tight": self.is_tight}

    @staticmethod
    def from_json(values: Mapping[str, Json]) -> RunPlan:
        """The plan that `to_json` wrote.

        Raises:
            ResumeError: values that are no plan (all faults).
        """
        try:
            return _adapter().validate_python(values)
        except ValidationError as error:
            raise ResumeError(
                [
                    Problem(
                        "plan.json: " + ".".join(str(part) for part in fault["loc"]),
                        fault["msg"],
                        "It is damaged, or another version's; --fresh begins anew.",
                    )
                    for fault in error.errors()
                ]
            ) from None


@cache
def _adapter() -> TypeAdapter[RunPlan]:
    return TypeAdapter(RunPlan)


def make_plan(spec: ModelSpec, gpu: Device, request: PlanRequest) -> RunPlan:
    """The fastest settings that fit, or the leanest ones and their mends where none fit.

    Args:
        gpu: The GPU of every rank (`total_bytes` may be replaced by what is free), or the host's free memory.
    Raises:
        UsageError: a batch that the ranks cannot share, or unknown target modules.
    """
    chosen = fastest(spec, gpu, request)
    if chosen is None:
        chosen = min(candidates(spec, gpu, request), key=partial(burden, spec, gpu, request))
    missing = shortages(spec, gpu, request, chosen)
    limiting = chosen.limiting_phase
    is_gpu = isinstance(gpu, GpuSpec)
    seconds = step_seconds(spec, chosen.settings, gpu) if is_gpu else None
    gpu_hours = None
    if seconds is not None and request.optimizer_steps is not None:
        gpu_hours = request.optimizer_steps * seconds * request.num_gpus / 3600
    return RunPlan(
        schema=1,
        fits=not missing,
        gpu=gpu.name if is_gpu else "cpu",
        gpus=request.num_gpus,
        usable_bytes=usable_bytes(gpu, request),
        peak_bytes=chosen.peak_bytes,
        allocated_peak_bytes=chosen.phases[limiting].allocated,
        limiting_phase=missing[0] if missing else limiting,
        phases={name: PhaseBytes(terms.total, terms.as_dict()) for name, terms in chosen.phases.items()},
        choices=_choices(chosen.settings),
        optimizer_steps=request.optimizer_steps,
        gpu_hours=gpu_hours,
        host_bytes=needed_host_bytes(spec, gpu, chosen),
        disk_bytes=disk_bytes(spec, chosen.settings, request.keep),
        mends=find_mends(spec, gpu, request, chosen) if missing else (),
        host_phases=host_phases(spec, gpu, chosen),
        row_tokens=request.max_tokens,
        reasons=cost_reasons(spec, chosen.settings, chosen.phases[limiting]),
        step_seconds=seconds,
    )


def calibrated(plan: RunPlan, profile: Profile | None) -> RunPlan:
    """The plan with its time as long as the profile says, which leaves every choice as it is."""
    if profile is None:
        return plan
    gpu_hours = None if plan.gpu_hours is None else plan.gpu_hours * profile.factor
    return replace(plan, gpu_hours=gpu_hours, profile=profile)


def pinned(request: PlanRequest, choices: Choices) -> PlanRequest:
    """The request with every choice of an earlier plan, so that `make_plan` judges them again and chooses nothing."""
    return replace(
        request,
        micro_batch=choices.micro_batch,
        gradient_checkpointing=choices.gradient_checkpointing,
        loss=choices.loss,
        attention=choices.attention,
        sharding=choices.sharding,
        weights=choices.weights,
        adapters=choices.adapters,
        optimizer_state=choices.optimizer_state,
    )


def plan_warnings(plan: RunPlan) -> tuple[str, ...]:
    """What the user should change although the run fits."""
    found: list[str] = []
    if plan.is_tight:
        spare = plan.usable_bytes - plan.peak_bytes
        found.append(
            f"Only {spare / GIB:.2f} GiB are spare, {spare / plan.usable_bytes:.1%} of what is usable: whatever else "
            "takes memory there may end the run. A higher memory.headroom leaves more."
        )
    if plan.optimizer_steps is not None and plan.optimizer_steps < FEWEST_USEFUL_STEPS:
        found.append(
            f"The data makes {plan.optimizer_steps} optimizer steps; below {FEWEST_USEFUL_STEPS} little is learned. "
            "Lower batch.sequences_per_step or raise optimizer.epochs."
        )
    choices = plan.choices
    if choices.sharding == "zero2-offload" and choices.weights == "bf16" and choices.accumulation > MOST_BF16_SUMS:
        found.append(
            f"zero2-offload adds up the gradients of {choices.accumulation} micro-batches in bf16, which loses more "
            f"than 1 % above {MOST_BF16_SUMS}. Take hardware.launch=zero3-offload, or lower batch.sequences_per_step."
        )
    return tuple(found)


def _choices(settings: Settings) -> Choices:
    return Choices(
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        loss=settings.loss,
        attention=settings.attention,
        sharding=settings.sharding,
        weights=settings.weights,
        adapters=settings.adapters,
        optimizer_state=settings.optimizer_state,
    )
