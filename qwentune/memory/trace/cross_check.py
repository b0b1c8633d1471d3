"""The trace has the last word: a plan judged by the real training step on meta tensors and a model of the allocator."""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace

from qwentune.console import busy
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.memory.closed_form.model_states import trained_parameters
from qwentune.memory.closed_form.phases import phases as planned_phases
from qwentune.memory.closed_form.terms import Terms
from qwentune.memory.plan_request import Device, PlanRequest
from qwentune.memory.run_plan import Choices, PhaseBytes, RunPlan, make_plan
from qwentune.memory.settings import MIB, Settings, device_overheads
from qwentune.memory.trace.allocator import CardIsFullError
from qwentune.memory.trace.meta_step import recorded_step, traced_evaluation, traced_peak
from qwentune.memory.trace.replay import replay

LARGEST_DISAGREEMENT = 0.03
MOST_PLANS = 4


@busy("tracing the real step")
def cross_checked(
    spec: ModelSpec, device: Device, request: PlanRequest, plan: RunPlan, tell: Callable[[str], None]
) -> RunPlan:
    """The plan with its training step and evaluation traced; where they do not fit, the fastest plan that then does.

    `tell` gets the figures in words.
    """
    usable_bytes = plan.usable_bytes  # by the recipe's headroom: later plans are asked to leave more
    device_bytes = usable_bytes / (1 - request.headroom)
    traced: dict[Choices, dict[str, Terms]] = {}
    asked, judged = request, plan
    for _ in range(MOST_PLANS):
        if plan.choices not in traced:
            traced[plan.choices] = _trace(spec, device, request, plan)
            _compare(plan, traced[plan.choices]["train_step"], tell)
        found = traced[plan.choices]
        judged = _judged(plan, found, usable_bytes, is_on_gpu=isinstance(device, GpuSpec))
        if judged.fits or not plan.fits:
            break
        # The next plan must leave free what the closed form missed in this one.
        missed_bytes = max(terms.total - plan.phases[name].total for name, terms in found.items())
        headroom = request.headroom + missed_bytes / device_bytes
        asked = replace(asked, headroom=max(asked.headroom, headroom))
        plan = make_plan(spec, device, asked)
    return judged


def _trace(spec: ModelSpec, device: Device, request: PlanRequest, plan: RunPlan) -> dict[str, Terms]:
    """The terms of the training step and of an evaluation on one rank, by the trace."""
    settings = request.settings(device, **asdict(plan.choices))
    if settings.sharding != "none":  # gradients stay between steps
        settings = replace(settings, accumulation=max(2, settings.accumulation))
    overheads = device_overheads(device)
    shared = planned_phases(spec, settings, overheads, merges_here=False)
    whole = planned_phases(spec, replace(settings, sharding="none"), overheads, merges_here=False)
    step = _of_a_rank(traced_peak(spec, settings), shared["train_step"], whole["train_step"])
    evaluation = _of_a_rank(traced_evaluation(spec, settings), shared["evaluate"], whole["evaluate"])
    if isinstance(device, GpuSpec) and settings.sharding in ("none", "ddp"):
        step = replace(step, allocator=_allocator_bytes(spec, settings, step, plan.usable_bytes))
    return {"train_step": step, "evaluate": evaluation}


def _of_a_rank(traced: Terms, shared: Terms, whole: Terms) -> Terms:
    """A traced phase, which is that of a rank that holds everything, with what the closed form says sharding changes.

    What lies outside tensors is the closed form's.
    """
    of_rank, of_all = shared.as_dict(), whole.as_dict()
    tensors = {name: max(0, size + of_rank[name] - of_all[name]) for name, size in traced.as_dict().items()}
    outside = {name: of_rank[name] for name in ("workspaces", "allocator", "context")}
    return Terms(**{**tensors, **outside})


def _allocator_bytes(spec: ModelSpec, settings: Settings, step: Terms, usable_bytes: int) -> int:
    """What torch's allocator reserves beyond the tensors of a step, by a replay of all that the step asks of it."""
    recording, blocks = recorded_step(spec, settings)
    buckets = settings.trained_bytes * trained_parameters(spec, settings) if settings.sharding == "ddp" else 0
    libraries, capacity = (step.workspaces, buckets), usable_bytes - step.context
    reserved = replay(recording, blocks, libraries).peak_reserved
    if reserved > capacity:
        # On a full card the allocator gives back what it holds for nothing; where even that does not help, the
        # figure without a limit says how much is missing.
        with suppress(CardIsFullError):
            reserved = replay(recording, blocks, libraries, capacity).peak_reserved
    return max(0, reserved - step.allocated)


def _compare(plan: RunPlan, traced: Terms, tell: Callable[[str], None]) -> None:
    planned = plan.phases["train_step"].terms
    closed = sum(planned.values()) - planned["allocator"] - planned["context"]
    tell(
        f"The training step's tensors: {traced.allocated / MIB:.0f} MiB by the trace, {closed / MIB:.0f} by the plan"
        + (f"; the allocator reserves {traced.allocator / MIB:.0f} more." if traced.allocator else ".")
    )
    if abs(closed / traced.allocated - 1) > LARGEST_DISAGREEMENT:
        tell("They differ by more than 3 %, which is a bug of qwentune; please report it with the recipe.")


def _judged(plan: RunPlan, traced: Mapping[str, Terms], usable_bytes: int, *, is_on_gpu: bool) -> RunPlan:
    """The plan with the traced phases in place of its own, judged by the bytes that are usable on a rank's device."""
    phases = {**plan.phases, **{name: PhaseBytes(terms.total, terms.as_dict()) for name, terms in traced.items()}}
    limiting = max(phases, key=lambda name: phases[name].total)
    peak, terms = phases[limiting].total, phases[limiting].terms
    is_short_elsewhere = not plan.fits and plan.limiting_phase in ("host", "disk")
    fits = peak <= usable_bytes and not is_short_elsewhere
    host_bytes, host_phases = plan.host_bytes, plan.host_phases
    if not is_on_gpu:  # where the device's bytes are the host's, of all ranks
        host_bytes += (peak - plan.peak_bytes) * plan.gpus
        host_phases = {
            name: size + (phases[name].total - plan.phases[name].total) * plan.gpus
            for name, size in host_phases.items()
        }
    return replace(
        plan,
        fits=fits,
        usable_bytes=usable_bytes,
        peak_bytes=peak,
        allocated_peak_bytes=peak - terms["allocator"] - terms["context"],
        limiting_phase=plan.limiting_phase if is_short_elsewhere else limiting,
        phases=phases,
        host_bytes=host_bytes,
        host_phases=host_phases,
        mends=() if fits else plan.mends,
    )
