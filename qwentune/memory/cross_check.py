"""The trace has the last word: a plan judged by the real training step on meta tensors and a model of the allocator."""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.memory.allocator import CardIsFullError
from qwentune.memory.closed_form import Terms, trained_parameters
from qwentune.memory.meta_step import recorded_step, traced_evaluation, traced_peak
from qwentune.memory.plan import Choices, PhaseBytes, RunPlan, make_plan
from qwentune.memory.replay import replay
from qwentune.memory.search import Device, PlanRequest
from qwentune.memory.settings import MIB, Settings

LARGEST_DISAGREEMENT = 0.03
MOST_PLANS = 4


def cross_checked(
    spec: ModelSpec, device: Device, request: PlanRequest, plan: RunPlan, tell: Callable[[str], None]
) -> RunPlan:
    """The plan with its training step and evaluation traced; where they do not fit, the fastest plan that then does.

    `tell` gets the figures in words. A plan that shares weights or gradients among ranks comes back as it is.
    """
    traced: dict[Choices, dict[str, Terms]] = {}
    usable, asked, checked = plan.usable_bytes, request, plan
    for _ in range(MOST_PLANS):
        if plan.choices.sharding not in ("none", "ddp"):
            tell(f"The trace knows ranks that hold all weights; this plan has {plan.choices.sharding}.")
            return replace(plan, usable_bytes=usable)
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
    settings = Settings(
        kind=request.kind,
        max_tokens=request.max_tokens,
        num_ranks=request.num_gpus,
        rank=request.rank,
        targets=request.targets,
        **asdict(plan.choices),
    )
    planned, buckets = plan.phases["train_step"].terms, 0
    if settings.sharding == "ddp":  # gradients stay between steps, and a second time in DDP's buckets
        settings = replace(settings, accumulation=max(2, settings.accumulation))
        buckets = settings.trained_bytes * trained_parameters(spec, settings)
    overheads = {"workspaces": planned["workspaces"], "context": planned["context"]}
    step, evaluation = (
        replace(terms, gradients=terms.gradients + buckets, **overheads)
        for terms in (traced_peak(spec, settings), traced_evaluation(spec, settings))
    )
    evaluation = replace(evaluation, allocator=plan.phases["evaluate"].terms["allocator"])
    if isinstance(device, GpuSpec):
        recording, blocks = recorded_step(spec, settings)
        libraries, capacity = (planned["workspaces"], buckets), plan.usable_bytes - step.context
        reserved = replay(recording, blocks, libraries).peak_reserved
        if reserved > capacity:
            with suppress(CardIsFullError):
                reserved = replay(recording, blocks, libraries, capacity).peak_reserved
        step = replace(step, allocator=max(0, reserved - step.allocated))
    return {"train_step": step, "evaluate": evaluation}


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
        host_bytes=plan.host_bytes if on_gpu else peak * plan.gpus,
        mends=() if fits else plan.mends,
    )
