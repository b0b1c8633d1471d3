"""A plan drawn as text for 80 columns."""

from __future__ import annotations

import textwrap

from qwentune.facts.launch import offloads, uses_deepspeed
from qwentune.memory.profile import Profile
from qwentune.memory.run_plan import RunPlan, plan_warnings
from qwentune.memory.settings import GIB

_COLUMNS = 80
_BAR_COLUMNS = 50
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render_plan(plan: RunPlan, num_layers: int, title: str = "") -> str:
    """The verdict as text: a bar per term against the device, the choices, then the mends; no line over 80 columns.

    Args:
        num_layers: How many layers the model has.
        title: A line that names the model and the tuning, such as "Qwen3-8B · qlora r32 · 4096 tokens".
    """
    device = f"{plan.gpu} × {plan.gpus}" if plan.gpus > 1 else plan.gpu
    lines = [*_wrap(f"{title} · {device}" if title else device), ""]
    on_device = max(plan.phases, key=lambda name: plan.phases[name].total)
    for term, num_bytes in plan.phases[on_device].terms.items():
        if num_bytes:
            lines.append(f"{term:<12} {_gib(num_bytes):>8} GiB  {_bar(num_bytes, plan.usable_bytes)}".rstrip())
    totals = " · ".join(f"{name} {_gib(phase.total)}" for name, phase in plan.phases.items() if phase.total)
    lines += ["", *_wrap(f"GiB by phase: {totals}"), *_wrap(_total(plan)), "", *_wrap(_verdict(plan))]
    lines += [line for sentence in _explanation(plan, num_layers) for line in _wrap(sentence)]
    lines += [line for reason in plan.reasons for line in _wrap(reason)]
    lines += [line for warning in plan_warnings(plan) for line in _wrap(f"[!] {warning}")]
    if not plan.fits:
        lines += ["", *_mends(plan)]
    return "\n".join(lines)


def _mends(plan: RunPlan) -> list[str]:
    if not plan.mends:
        return _wrap("No change that qwentune knows makes it fit; use a smaller model or a larger GPU.")
    lines = ["These changes fit, cheapest first:"]
    for mend in plan.mends:
        lines += _wrap(f"{mend.change} (-{_gib(mend.saves_bytes)} GiB)", "  ")
        lines += _wrap(" ".join(mend.overrides), "      ")
    return lines


def _total(plan: RunPlan) -> str:
    filled = min(20, round(20 * plan.peak_bytes / plan.usable_bytes)) if plan.usable_bytes else 20
    gauge = "█" * filled + "░" * (20 - filled)
    return f"peak {_gib(plan.peak_bytes)} of {_gib(plan.usable_bytes)} GiB usable  [{gauge}]"


def _verdict(plan: RunPlan) -> str:
    spare = plan.usable_bytes - plan.peak_bytes
    if plan.fits:
        word = "FITS TIGHTLY" if plan.is_tight else "FITS"
        return f"{word}, {_gib(spare)} GiB spare; the peak is in {plan.limiting_phase}."
    if plan.limiting_phase == "host":
        return f"DOES NOT FIT: {_gib(plan.host_bytes)} GiB of host memory are needed."
    if plan.limiting_phase == "disk":
        return f"DOES NOT FIT: {_gib(plan.disk_bytes)} GiB of disk are needed."
    return f"DOES NOT FIT, {_gib(-spare)} GiB too much in {plan.limiting_phase}."


def _explanation(plan: RunPlan, num_layers: int) -> tuple[str, str]:
    """Two sentences: the shape of a step, and the kernels and types in it."""
    choices = plan.choices
    checkpointing = choices.gradient_checkpointing
    recomputed = num_layers * checkpointing if isinstance(checkpointing, bool) else min(checkpointing, num_layers)
    sharding = "" if choices.sharding == "none" else f", sharding {choices.sharding}"
    reason = "the fastest that fits" if plan.fits else "the leanest that the recipe allows"
    peak = f"peak {_gib(plan.peak_bytes)} of {_gib(plan.usable_bytes)} GiB"
    run = ""
    if plan.optimizer_steps is not None:
        run = f" {plan.optimizer_steps} steps"
        run += f", about {plan.gpu_hours:.2g} GPU-hours {_basis(plan.profile)}." if plan.gpu_hours is not None else "."
    if plan.expansion_factor is not None and round(plan.expansion_factor, 2) != 1:
        run += f" The data costs {plan.expansion_factor:.2f} times the tokens of one rendering."
    return (
        f"Micro-batch {choices.micro_batch} × accumulation {choices.accumulation}, {recomputed} of {num_layers} "
        f"layers recomputed{sharding}: {reason}, {peak}.{run}",
        f"Loss {choices.loss}, attention {choices.attention}; {_held(plan)}; host {_gib(plan.host_bytes)} "
        f"GiB{_merging(plan)}, disk {_gib(plan.disk_bytes)} GiB.",
    )


def _held(plan: RunPlan) -> str:
    """How weights, what makes them exact, and the optimizer's averages are held."""
    choices = plan.choices
    has_adapters = plan.phases["train_step"].terms["adapters"] > 0
    held = f"weights {choices.weights}, adapters {choices.adapters}" if has_adapters else f"weights {choices.weights}"
    if uses_deepspeed(choices.sharding):
        return f"{held}, fp32 masters and moments, shared" + (" in host memory" if offloads(choices.sharding) else "")
    if (choices.adapters if has_adapters else choices.weights) == "bf16":
        held += " with 16 more bits (exact fp32)"
    return f"{held}, moments {'in 8 bits' if choices.optimizer_state == '8bit' else choices.optimizer_state}"


def _merging(plan: RunPlan) -> str:
    merging = plan.host_phases.get("merge", 0)
    return f" ({_gib(merging)} to merge the adapters)" if merging else ""


def _basis(profile: Profile | None) -> str:
    if profile is None:
        return "by the bare roofline: no run on such a card has been timed here"
    return f"calibrated by {profile.num_steps} measured steps of {profile.model} on this card"


def _bar(num_bytes: int, whole_bytes: int) -> str:
    eighths = round(8 * _BAR_COLUMNS * min(1.0, num_bytes / whole_bytes)) if whole_bytes else 8 * _BAR_COLUMNS
    full, rest = divmod(eighths, 8)
    return ("█" * full + _EIGHTHS[rest].strip()) or "▏"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)
