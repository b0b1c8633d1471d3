"""What stands above and below a run on the screen: what is trained, on what, where it is kept; how the loss fell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from qwentune.data.dataset import Dataset
from qwentune.data.layout.schedule import Schedule
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.towers import loads_towers
from qwentune.memory import RunPlan
from qwentune.memory.closed_form.limit import Limit
from qwentune.memory.closed_form.roofline import bound
from qwentune.memory.plan_request import Device
from qwentune.memory.settings import Settings
from qwentune.recipe import Recipe
from qwentune.training.progress import MetricsRow, sparkline


def heading(
    recipe: Recipe, spec: ModelSpec, plan: RunPlan, dataset: Dataset, schedule: Schedule, versions: Mapping[str, str]
) -> str:
    """What is about to be trained, with what, on what, and where it will stand."""
    report = dataset.report
    kind = recipe.tuning.kind + ("" if recipe.tuning.kind == "full" else f" r{recipe.tuning.rank}")
    towers = loads_towers(spec.checkpoint_type, has_media=dataset.media is not None)
    count = spec.all_parameters if towers else spec.parameters
    unit = "packed rows" if dataset.packing else "examples"
    lines = {
        "with": " · ".join(f"{name} {number}" for name, number in versions.items()),
        "model": f"{recipe.model} · {_in_words(count)} parameters · {kind}",
        "on": f"{plan.gpus} × {plan.gpu} · {plan.choices.sharding} sharding" if plan.gpus > 1 else plan.gpu,
        "data": f"{report['samples']:,} rows: {report['train_examples']:,} examples to train on, "
        f"{report['eval_examples']:,} to evaluate on",
        "steps": f"{schedule.num_steps:,} of {recipe.batch.sequences_per_step} {unit}",
        "in": recipe.output.dir,
    }
    return "\n".join(f"{name:<6} {value}" for name, value in lines.items())


def trained_share(model: Any) -> str:
    """Which share of the weights of a torch module is trained."""
    parameters = [(_num_values(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained, whole = sum(count for count, is_trained in parameters if is_trained), sum(c for c, _ in parameters)
    return f"trains {trained:,} of {whole:,} parameters ({trained / max(1, whole):.2%})"


def speed(rows: Sequence[MetricsRow], limit: Limit | None, spec: ModelSpec, settings: Settings, device: Device) -> str:
    """The median speed of a process's logged steps, which share of the limit that is, and what bounds a step."""
    if not rows:
        return ""
    text = f"speed {median(row['tokens_per_second'] or 0.0 for row in rows):,.0f} tokens/s"
    shares = [row["limit_share"] for row in rows if row["limit_share"] is not None]
    if limit is None or not shares:
        return text
    whose = "measured" if limit.is_measured else "reckoned from the data sheet"
    text += f" · {median(shares):.0%} of the card's limit ({limit.tflops:,.0f} TFLOP/s, {whose})"
    return f"{text} · bound by {bound(spec, settings, device)}, as the roofline says"


def curve(losses: Sequence[float]) -> str:
    """A line with the loss from the first step to the last; empty where nothing was measured."""
    return f"loss  {losses[0]:.4f} {sparkline(losses)} {losses[-1]:.4f}\n" if losses else ""


def _in_words(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _num_values(parameter: Any) -> int:
    """How many weights a parameter holds: of shards the whole, of 4 bits two a byte."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    is_packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * parameter.element_size() * 2 if is_packed else parameter.numel()
