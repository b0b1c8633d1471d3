"""A plan drawn as text, as wide as it is asked for."""

from __future__ import annotations

import textwrap

from qwentune.facts.launch import offloads, uses_deepspeed
from qwentune.memory.profile import Profile
from qwentune.memory.run_plan import RunPlan, plan_warnings
from qwentune.memory.settings import GIB

_COLUMNS = 80
_LABEL_COLUMNS = 30  # before a bar
_GAUGE_COLUMNS = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render_plan(plan: RunPlan, num_layers: int, title: str = "", *, columns: int = _COLUMNS) -> str:
    """The verdict as text: a bar per term against the device, the choices, then the mends; no line over `columns`.

    Args:
        num_layers: How many layers the model has.
        title: A line that names the model and the tuning, such as "Qwen3-8B · qlora r32 · 4096 tokens".
    """
    device = f"{plan.gpu} × {plan.gpus}" if plan.gpus > 1 else plan.gpu
    lines = [f"{title} · {device}" if title else device, ""]
    largest = max(plan.phases.values(), key=lambda phase: phase.total)
    whole = max(plan.usable_bytes, *largest.terms.values())  # two terms that are larger than the device differ still
    for term, num_bytes in largest.terms.items():
        if num_bytes:
            lines.append(f"{term:<12} {_gib(num_bytes):>8} GiB  {_bar(num_bytes / whole, columns - _LABEL_COLUMNS)}")
    totals = " · ".join(f"{name} {_gib(phase.total)}" for name, phase in plan.phases.items() if phase.total)
    lines += ["", f"GiB by phase: {totals}", _total(plan), "", verdict(plan), *_explanation(plan, num_layers)]
    lines += plan.reasons
    lines += [f"[!] {warning}" for warning in plan_warnings(plan)]
    if not plan.fits:
        lines += ["", *_mends(plan)]
    return "\n".join(part for line in lines for part in _wrapped(line, columns))


def _mends(plan: RunPlan) -> list[str]:
    if not plan.mends:
        return ["No change that qwentune knows makes it fit; use a smaller model or a larger GPU."]
    lines = ["These changes fit, cheapest first:"]
    for mend in plan.mends:
        lines += [f"  {mend.change} (-{_gib(mend.saves_bytes)} GiB)", f"      {' '.join(mend.overrides)}"]
    return lines


def _total(plan: RunPlan) -> str:
    """The peak beside what there is; what is too much stands beyond a mark."""
    whole = max(plan.peak_bytes, plan.usable_bytes, 1)
    peak, usable = (round(_GAUGE_COLUMNS * part / whole) for part in (plan.peak_bytes, plan.usable_bytes))
    gauge = "█" * min(peak, usable) + ("░" * (usable - peak) if peak < usable else "")
    gauge += "" if plan.peak_bytes <= plan.usable_bytes else "|" + "█" * max(1, peak - usable)
    return f"peak {_gib(plan.peak_bytes)} of {_gib(plan.usable_bytes)} GiB usable  [{gauge}]"


def verdict(plan: RunPlan) -> str:
    """Whether the plan fits, in one sentence."""
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
        f"GiB, disk {_gib(plan.disk_bytes)} GiB.",
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


def _basis(profile: Profile | None) -> str:
    if profile is None:
        return "by the bare roofline: no run on such a card has been timed here"
    return f"calibrated by {profile.num_steps} measured steps of {profile.model} on this card"


def _bar(share: float, columns: int) -> str:
    full, rest = divmod(round(8 * columns * share), 8)
    return ("█" * full + _EIGHTHS[rest].strip()) or "▏"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _wrapped(line: str, columns: int) -> list[str]:
    """A line in parts of at most `columns`, the later ones further in; a bar is never too long."""
    indent = line[: len(line) - len(line.lstrip(" "))]
    if len(line) <= columns:
        return [line]
    return textwrap.wrap(
        line.strip(),
        columns,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
