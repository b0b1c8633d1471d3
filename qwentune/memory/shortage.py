"""What is said where memory is short: before a run that would not fit, after its first steps, when it ran out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qwentune.errors import Problem, UserError
from qwentune.memory.mends import Mend
from qwentune.memory.run_plan import FEWEST_SPARE, RunPlan


def _overrides(mend: Mend) -> str:
    return " ".join(mend.overrides)


def refusal(plan: RunPlan, pasted: Callable[[Mend], str] = _overrides) -> list[Problem]:
    """Why the plan does not fit, and the cheapest changes that do, as overrides to paste or what `pasted` makes."""
    needed, usable = plan.peak_bytes / 2**30, plan.usable_bytes / 2**30
    shortage = {
        "host": f"needs {plan.host_bytes / 2**30:.1f} GiB of host memory",
        "disk": f"needs {plan.disk_bytes / 2**30:.1f} GiB of disk",
    }.get(plan.limiting_phase, f"needs {needed:.1f} of {usable:.1f} GiB in the phase {plan.limiting_phase}")
    fixes = [f"{mend.change}: {pasted(mend)}" for mend in plan.mends[:3]]
    return [Problem(plan.gpu, f"the run does not fit: it {shortage}", "\n    ".join([*plan.reasons, *fixes]))]


def compared(plan: RunPlan, measured: Mapping[str, int]) -> str:
    """What torch handed out at its worst beside what the plan reckoned, in words; a warning where little is left.

    `measured` has bytes of `max_memory_allocated`: of the longest training batch (`train`) and evaluation batch
    (`evaluate`) before the first step, and of the first two steps (`steps`).
    """
    what = {"train": "the longest batch", "evaluate": "the longest evaluation", "steps": "the first two steps"}
    parts = [f"{what[name]} {_gib(peak)}" for name, peak in measured.items()]
    said = f"GPU memory: plan {_gib(plan.allocated_peak_bytes)}, {', '.join(parts)}"
    left = plan.usable_bytes - (plan.peak_bytes - plan.allocated_peak_bytes) - max(measured.values(), default=0)
    if left < FEWEST_SPARE * plan.usable_bytes:
        said += f"; warning: {max(left, 0) / 2**30:.2f} GiB are left: lower batch.micro_batch or data.max_tokens"
    return said


def ran_out(
    plan: RunPlan,
    where: str,
    said: str,
    *,
    max_tokens: int,
    headroom: float,
    phase: str,
    held: Mapping[str, int],
    judged: Callable[[Sequence[str]], RunPlan],
) -> Problem:
    """A device whose memory ran out, mostly although the plan fits: what torch said, and what to lower.

    The plan's terms of the `phase` stand beside the bytes that the rank `held` by term when it ran out. `judged` is the
    plan that the recipe gets anew with more overrides; a change is offered where that also leaves free what this plan
    missed.
    """
    fixes = _beside(plan.phases[phase].terms, held)
    if phase == "load":
        fixes.append("The same command goes on when other programs have left the GPU; nvidia-smi lists them.")
    elif lower := _lower(plan, phase, max_tokens, headroom, held, judged):
        fixes += ["The same command goes on with one of:", *lower]
    else:
        fixes.append("Nothing that can be lowered alone suffices; `qwentune plan` tells what would fit.")
    expected = "though the plan fits" if plan.fits else "as the plan said it would"
    what = f"the GPU's memory ran out, {expected}: {said.splitlines()[0]}"
    return Problem(where, what, "\n    ".join(fixes))


def _lower(
    plan: RunPlan,
    phase: str,
    max_tokens: int,
    headroom: float,
    held: Mapping[str, int],
    judged: Callable[[Sequence[str]], RunPlan],
) -> list[str]:
    """What can be pasted after the command, each of it with a plan that takes less in that phase."""
    terms, choices = plan.phases[phase].terms, plan.choices
    planned = sum(terms.values()) - terms["allocator"] - terms["context"]
    missed = max(0, held.get("peak", 0) - planned)
    more = headroom + missed / max(1, plan.usable_bytes)
    # Without it a plan made anew would fill again what a change has freed.
    free = (f"memory.headroom={math.ceil(100 * more) / 100:g}",) if missed else ()
    offered = [
        *([(free, "--allow-change plan")] if free else []),
        *(
            ((override, *free), f"--allow-change {override.partition('=')[0]}")
            for applies, override in (
                (choices.micro_batch % 2 == 0, f"batch.micro_batch={choices.micro_batch // 2}"),
                (choices.gradient_checkpointing is not True, "memory.gradient_checkpointing=true"),
                (choices.loss == "full", "memory.loss=supervised"),
            )
            if applies
        ),
        *(((f"data.max_tokens={max_tokens >> halvings}", *free), "--fresh") for halvings in range(1, 4)),
    ]
    if more >= 1:
        return []
    lower: list[str] = []
    for overrides, flags in offered:
        if flags == "--fresh" and lower and lower[-1].endswith("--fresh"):  # the longest that suffices
            break
        try:
            anew = judged(overrides)
        except UserError:  # the run does not take the change
            continue
        takes_less = anew.phases[phase].total < plan.phases[phase].total
        if anew.fits and takes_less and anew.peak_bytes + missed <= plan.usable_bytes:
            lower.append(f"{' '.join(overrides)} {flags}")
    return lower


def _beside(planned: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """A table of the terms in MiB; what is not told apart when measured is one row."""
    rows = [(name, planned[name], held.get(name)) for name in ("weights", "adapters", "gradients", "optimizer")]
    rest = ["activations", "logits", "temporaries", "workspaces", *(["cache"] if planned.get("cache") else [])]
    rows.append((", ".join(rest), sum(planned[name] for name in rest), held.get("rest")))
    allocated = sum(planned.values()) - planned["allocator"] - planned["context"]
    rows.append(("all that torch hands out, at most", allocated, held.get("peak")))
    rows.append(("allocator", planned["allocator"], held.get("allocator")))
    lines = [f"{'MiB':<51}{'plan':>9}{'held':>9}"]
    for name, plan_bytes, held_bytes in rows:
        if plan_bytes or held_bytes:
            lines.append(f"{name:<51}{_mib(plan_bytes):>9}{'-' if held_bytes is None else _mib(held_bytes):>9}")
    return lines


def _mib(number: int) -> str:
    return f"{number / 2**20:.1f}"


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"
