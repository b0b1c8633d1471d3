"""What `qwentune init` may be asked instead where nothing fits: another kind of tuning, another card, another model."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GPUS
from qwentune.facts.published import MODELS
from qwentune.memory.mends import Mend
from qwentune.memory.plan_request import Device
from qwentune.memory.run_plan import RunPlan

Kind = Literal["full", "lora", "qlora"]
LEANER: dict[Kind, str] = {"lora": "train adapters (LoRA)", "qlora": "train adapters on 4-bit weights (QLoRA)"}
Judge = Callable[[ModelSpec, Kind, Device], RunPlan]


def alternatives(spec: ModelSpec, device: Device, kinds: Sequence[Kind], judged: Judge) -> tuple[Mend, ...]:
    """Options of `init`, each of which alone suffices, by what it changes; `kinds` are in the order of their memory.

    The first of `kinds` was tried in vain. Offered are a leaner one, the smallest single card that holds the leanest
    of those that were tried, and the largest smaller model of the same series.
    """
    tried, *leaner = kinds
    needed = judged(spec, tried, device).peak_bytes
    mends: list[Mend] = []

    def offer(change: str, option: str, spec: ModelSpec, kind: Kind, device: Device) -> bool:
        plan = judged(spec, kind, device)
        if plan.fits:
            mends.append(Mend(change, max(0, needed - plan.peak_bytes), (option,)))
        return plan.fits

    any(offer(LEANER[kind], f"--kind {kind}", spec, kind, device) for kind in leaner)
    cards = sorted((gpu for gpu in GPUS.values() if gpu.has_bf16), key=lambda gpu: gpu.total_bytes)
    place = bisect_left(cards, True, key=lambda gpu: judged(spec, tried, gpu).fits)
    if place < len(cards):
        size = range(cards[place].total_bytes, cards[place].total_bytes + 2**30)
        card = next(gpu for gpu in GPUS.values() if gpu.has_bf16 and gpu.total_bytes in size)  # of its size the first
        offer(f"train on a card of {size.start / 2**30:.0f} GiB", f"--gpu {card.name}", spec, tried, card)
    kin = [one for one in MODELS.values() if (_series(one), one.kind) == (_series(spec), spec.kind)]
    smaller = sorted((one for one in kin if one.parameters < spec.parameters), key=lambda one: -one.parameters)
    any(offer("tune a smaller model", f"--model {one.id}", one, tried, device) for one in smaller)
    return tuple(mends)


def _series(spec: ModelSpec) -> str:
    """The name without its size."""
    return re.sub(r"\d+(\.\d+)?B(-A\d+B)?", "", spec.id)
