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
from qwentune.memory.closed_form.phases import Terms, phases, trained_parameters
from qwentune.memory.plan_request import Device, PlanRequest
from qwentune.memory.run_plan import Choices, PhaseBytes, RunPlan, make_plan
from qwentune.memory.settings import MIB, device_overheads
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
    traced: dict[Choices, dict[str, Terms]] = {}
    usable, asked, checked = plan.usable_bytes, request, plan
    for _ in range(MOST_PLANS):
        if plan.choices not in traced:
            traced[plan.choices] = _traced_phases(spec, device, request, plan)
            _compare(plan, traced[plan.choices]["train_step"], tell)
        found = traced[plan.choices]
        checked = _with_phases(plan, found, usable, isinstance(device, GpuSpec))
        if checked.fits or not plan.fits:
            break
        # The next plan must leave free what the closed form missed in this one.
        missed = max(terms.total - plan.phases[name].total for name, terms in found.items())
        missed *= (1 - request.headroom) / usable
        asked = replace(asked, headroom=max(asked.headroom, request.headroom + missed))
        plan = make_plan(spec, device, asked)
    return checked


def _traced_phases(spec: ModelSpec, device: Device, request: PlanRequest, plan: RunPlan) -> dict[str, Terms]:
    settings = request.settings(device, **asdict(plan.choices))
    if settings.sharding != "none":  # gradients stay between steps
        settings = replace(settings, accumulation=max(2, settings.accumulation))
    shared, alone = (
        phases(spec, replace(settings, sharding=sharding), device_overheads(device), merges_here=False)
        for sharding in (settings.sharding, "none")
    )
    step, evaluation = (
        _among_ranks(terms, shared[name], alone[name])
        for name, terms in (
            ("train_step", traced_peak(spec, settings)),
            ("evaluate", traced_evaluation(spec, settings)),
        )
    )
    if isinstance(device, GpuSpec) and settings.sharding in ("none", "ddp"):
        recording, blocks = recorded_step(spec, settings)
        buckets = settings.trained_bytes * trained_parameters(spec, settings) if settings.sharding == "ddp" else 0
        libraries, capacity = (step.workspaces, buckets), plan.usable_bytes - step.context
        reserved = replay(recording, blocks, libraries).peak_reserved
        if reserved > capacity:
            with suppress(CardIsFullError):
                reserved = replay(recording, blocks, libraries, capacity).peak_reserved
        step = replace(step, allocator=max(0, reserved - step.allocated))
    return {"train_step": step, "evaluate": evaluation}


def _among_ranks(traced: Terms, shared: Terms, alone: Terms) -> Terms:
    """A traced phase, which is that of a rank that holds everything, with what the closed form says sharding changes.

    What lies outside tensors is the closed form's.
    """
    given, without = shared.as_dict(), alone.as_dict()
    tensors = {name: max(0, size + given[name] - without[name]) for name, size in traced.as_dict().items()}
    outside = {name: given[name] for name in ("workspaces", "allocator", "context")}
    return Terms(**{**tensors, **outside})


def _compare(plan: RunPlan, traced: Terms, tell: Callable[[str], None]) -> None:
    planned = plan.phases["train_step"].terms
    closed = sum(planned.values()) - planned["allocator"] - planned["context"]
    tell(
        f"The training step's tensors: {traced.allocated / MIB:.0f} MiB by the trace, {closed / MIB:.0f} by the plan"
        + (f"; the allocator reserves {traced.allocator / MIB:.0f} more." if traced.allocator else ".")
    )
    if abs(closed / traced.allocated - 1) > LARGEST_DISAGREEMENT:
        tell("They differ by more than 3 %, which is a bug of qwentune; please report it with the recipe.")


def _with_phases(plan: RunPlan, traced: Mapping[str, Terms], usable: int, on_gpu: bool) -> RunPlan:
    """The plan with the traced phases in place of its own, judged by what is usable."""
    phases = {**plan.phases, **{name: PhaseBytes(terms.total, terms.as_dict()) for name, terms in traced.items()}}
    limiting = max(phases, key=lambda name: phases[name].total)
    peak, terms = phases[limiting].total, phases[limiting].terms
    is_short_elsewhere = not plan.fits and plan.limiting_phase in ("host", "disk")
    fits = peak <= usable and not is_short_elsewhere
    return replace(
        plan,
        fits=fits,
        usable_bytes=usable,
        peak_bytes=peak,
        allocated_peak_bytes=peak - terms["allocator"] - terms["context"],
        limiting_phase=plan.limiting_phase if is_short_elsewhere else limiting,
        phases=phases,
        host_bytes=plan.host_bytes + (0 if on_gpu else (peak - plan.peak_bytes) * plan.gpus),
        host_phases={
            name: size + (0 if on_gpu else (phases[name].total - plan.phases[name].total) * plan.gpus)
            for name, size in plan.host_phases.items()
        },
        mends=() if fits else plan.mends,
    )
