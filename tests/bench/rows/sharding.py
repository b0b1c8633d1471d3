"""What FSDP (the first one) makes of the traced bytes of an unsharded step, on one rank.

Sources: torch.distributed.fsdp's runtime and peft's auto-wrap policy. The root unit (embedding, head, last norm) stays
whole from the first forward to the end of the backward pass; of the layers one is whole at a time, two where the next
one is fetched ahead in the backward pass. Under mixed precision what is trained is held in fp32 and used in 16 bits.
What bitsandbytes holds beside its packed weights is no parameter and stays whole; so do fused adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.rows.settings import RowSettings

DYNAMIC = ("activations", "recomputed", "logits", "temporaries")


@dataclass(frozen=True)
class Units:
    """Bytes of what FSDP shards, as the step uses it, and of what it does not."""

    root: int
    layer: int
    adapters: int
    whole: int  # per layer


def units_of(network: Any) -> Units:
    """The units of a network with one layer."""
    root = layer = adapters = 0
    for name, parameter in network.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if "lora_" in name:
            adapters += size
        elif ".layers." in name:
            layer += size
        else:
            root += size
    whole = sum(b.numel() * b.element_size() for name, b in network.named_buffers() if "scales" in name)
    return Units(root, layer, adapters, whole)


def sharded(moments: Mapping[str, Mapping[str, int]], units: Units, settings: RowSettings) -> dict[str, dict[str, int]]:
    """The moments of one rank under FSDP1."""
    ranks, num_layers = settings.ranks, settings.config["num_hidden_layers"]
    weights = units.root + num_layers * units.layer
    adapters = num_layers * units.adapters
    # Trained parameters are fp32 under mixed precision, in the trace they are 16-bit.
    wider = 2 if settings.autocast and not settings.fused_adapters else 1
    if settings.kind == "full":
        weights *= wider
    adapters *= wider
    trained_ranks = 1 if settings.fused_adapters else ranks
    found: dict[str, dict[str, int]] = {}
    for region, terms in moments.items():
        is_backward = region.startswith("backward")
        num_whole = 0 if region in ("embedding", "head", "optimizer") else 1
        if is_backward and "first" not in region:
            num_whole = 2
        moment = {name: terms.get(name, 0) for name in DYNAMIC}
        moment["weights"] = weights // ranks + num_layers * units.whole
        # The source adds up what the Trainer's stages allocate; fused adapters come to the GPU between two of them.
        moment["adapters"] = 0 if settings.fused_adapters else adapters // ranks
        moment["optimizer"] = wider * terms.get("optimizer", 0) // trained_ranks
        moment["gradients"] = wider * terms.get("gradients", 0) // trained_ranks
        if region == "optimizer":
            moment["temporaries"] = wider * moment["temporaries"] // trained_ranks
        else:
            moment["unsharded"] = units.root + num_whole * units.layer
            if settings.kind == "full" and is_backward:
                moment["unsharded"] += units.layer
        if region.startswith("backward first") and settings.kind != "full" and settings.reentrant:
            moment["activations"] += _retained(settings)
        found[region] = moment
    return found


def _retained(settings: RowSettings) -> int:
    """Inputs of the layers above the first one, and their gradients, of which the trace counts one.

    FSDP hangs a hook on the inputs of a unit in which nothing is trained. Recomputed reentrantly they are leaves, and
    the hook keeps them until the backward pass ends.
    """
    size = settings.micro_batch * settings.tokens * settings.config["hidden_size"]
    value_bytes = 4 if settings.upcast or settings.dtype == "fp32" else 2
    num_layers = settings.config["num_hidden_layers"]
    return (num_layers - 1 + num_layers - 2) * size * value_bytes
