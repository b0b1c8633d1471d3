"""What a card was measured to do, kept in the cache: matrix products, copies, attention and launches.

The plan's roofline goes by it in place of the data sheet, and a run says which share of it its steps reach.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from qwentune import console
from qwentune.data.cache import cache_folder
from qwentune.durable import write_text
from qwentune.errors import UserError
from qwentune.facts.gpus import GpuSpec
from qwentune.memory.closed_form.roofline import BANDWIDTH_EFFICIENCY, GEMM_EFFICIENCY

Rate: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one card, forward alone.

    `product_tflops` is that of large square products in 16 bits, `layer_tflops` by model that of the products of a
    layer, `copy_gb_per_second` counts what is read and written, `attention_tflops` causal attention by row length;
    `launch_microseconds` is a small kernel's time on the host.
    """

    device: str
    product_tflops: Rate
    copy_gb_per_second: Rate
    launch_microseconds: Rate
    date: str
    versions: dict[str, str]
    layer_tflops: dict[str, Rate] = field(default_factory=dict[str, float])
    attention_tflops: dict[str, Rate] = field(default_factory=dict[str, float])


_RATES = TypeAdapter(Rates)


def keep_rates(rates: Rates) -> None:
    """Writes them for later plans; what could not be written is said."""
    try:
        path = _file(rates.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _RATES.dump_json(rates, indent=2).decode() + "\n")
    except (OSError, UserError) as error:
        console.say(f"warning: the card's measured rates could not be kept for later plans: {error}")


def find_rates(device: str) -> Rates | None:
    """What was measured on such a card; None where nothing was, or where the file holds something else."""
    path = _file(device)
    try:
        rates = _RATES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{error.errors()[0]['msg']}"
        console.say(f"warning: {path} holds no rates of {device} and is ignored: {why}; remove it")
        return None
    return rates if rates.device == device else None


def with_rates(gpu: GpuSpec, model: str) -> GpuSpec:
    """The card with the rates that were measured on it, as data sheets count them; itself where none were."""
    rates = find_rates(gpu.name)
    if rates is None or gpu.bf16_tflops is None:
        return gpu
    reached = rates.layer_tflops.get(model, rates.product_tflops)
    return replace(
        gpu,
        bf16_tflops=reached / GEMM_EFFICIENCY,
        bandwidth_gb_per_second=rates.copy_gb_per_second / BANDWIDTH_EFFICIENCY,
    )


def _file(device: str) -> Path:
    return cache_folder() / "rates" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
