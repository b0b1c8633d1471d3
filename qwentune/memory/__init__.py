"""Bytes by phase and term, the plan that follows from them, and its drawing; free of torch."""

from qwentune.memory.drawing import render_plan, verdict
from qwentune.memory.plan_request import PlanRequest
from qwentune.memory.run_plan import Choices, RunPlan, make_plan, pinned, plan_warnings
from qwentune.memory.settings import HostMemory

__all__ = [
    "Choices",
    "HostMemory",
    "PlanRequest",
    "RunPlan",
    "make_plan",
    "pinned",
    "plan_warnings",
    "render_plan",
    "verdict",
]
