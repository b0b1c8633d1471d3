"""What a rank holds of the memory that it trains in, by the terms of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def held_bytes(model: nn.Module | None, optimizer: Any, device: torch.device) -> dict[str, int]:
    """Bytes on `device` by term: weights, adapters, gradients, optimizer, each storage once.

    On a GPU also the `rest` of what torch handed out (activations, logits, temporaries, and the buffers of DDP and
    DeepSpeed), the `peak` of all it handed out, and what its allocator keeps without handing it out. A rank that shares
    weights or states holds its share; `model` and `optimizer` are None where there is none yet.
    """
    parameters = [] if model is None else list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counted: set[int] = set()
    held = {
        name: _bytes(tensors, device, counted)
        for name, tensors in (
            ("adapters", trained if len(trained) < len(parameters) else ()),
            ("weights", chain(_with_scales(parameters), () if model is None else model.buffers())),
            ("gradients", chain((parameter.grad for parameter in parameters), _sums(optimizer))),
            ("optimizer", () if optimizer is None else _states(optimizer)),
        )
    }
    if device.type != "cuda":
        return held
    stats = torch.cuda.memory_stats(device)
    allocated = stats["allocated_bytes.all.current"]
    return {
        **held,
        "rest": allocated - sum(held.values()),
        "peak": stats["allocated_bytes.all.peak"],
        "allocator": stats["reserved_bytes.all.current"] - allocated,
    }


def _with_scales(parameters: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """The parameters, and what bitsandbytes keeps beside those in 4 bits; DeepSpeed's stage 3 keeps shares beside."""
    for parameter in parameters:
        yield getattr(parameter, "ds_tensor", parameter)
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            yield state.absmax
            state = state.state2


def _sums(optimizer: Any) -> Iterable[Tensor]:
    """What gradients are added up in beside their own storage."""
    own: Any = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
    return getattr(own, "sums", {}).values()


def _states(optimizer: Any) -> Iterator[Tensor]:
    """The moments and what is behind 16 bits, and the fp32 weights that DeepSpeed steps on in the model's place."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for group in optimizer.param_groups:
        yield from group["params"]


def _bytes(tensors: Iterable[Tensor | None], device: torch.device, counted: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        local: Any = getattr(tensor, "_local_tensor", tensor)  # of FSDP's shards
        storage = local.untyped_storage()
        if storage.device == device and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total
