"""The optimizer of a traced step, with its states, and one that moves what a deeper model has."""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwentune.memory.settings import Settings
from qwentune.model.adamw import PIECE_VALUES, AdamW


def embedding_weights(network: nn.Module) -> set[Tensor]:
    """The weights whose moments stay in fp32."""
    return {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}


def optimizer_of(
    trained: Sequence[Tensor], embeddings: set[Tensor], settings: Settings
) -> tuple[AdamW, dict[Tensor, list[Tensor]]]:
    """The optimizer of a run as the Trainer sets it up, with its states, which are there from the first step on."""
    in_8_bits = settings.optimizer_state == "8bit"
    groups = [
        {"params": [x for x in trained if (in_8_bits and x not in embeddings) == eight_bit], "eight_bit": eight_bit}
        for eight_bit in (False, True)
    ]
    optimizer = AdamW([group for group in groups if group["params"]])
    device = trained[0].device
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
    states = {
        parameter: list(optimizer._state(parameter, group["eight_bit"]).values())
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return optimizer, states


def fp32_sums(trained: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Gradients of earlier micro-batches, added up in fp32."""
    return {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained}


def standing_in(network: nn.Module, blocks: Sequence[Any], settings: Settings, num_blocks: int) -> AdamW:
    """The optimizer of a network of so many blocks, whose tensors take no bytes: those of the network count."""
    inside = {parameter for block in blocks for layer in block for parameter in layer.parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    block = [parameter for layer in blocks[0] for parameter in layer.parameters() if parameter.requires_grad]
    outside, embeddings = [parameter for parameter in trained if parameter not in inside], embedding_weights(network)
    num_before = next(place for place, parameter in enumerate(trained) if parameter in inside)
    pairs = [(_alike(x), x) for x in (*outside[:num_before], *block * num_blocks, *outside[num_before:])]
    alikes = [alike for alike, _ in pairs]
    optimizer, states = optimizer_of(alikes, {alike for alike, x in pairs if x in embeddings}, settings)
    if settings.adds_in_fp32:
        optimizer.sums = fp32_sums(alikes)
    gradients = [*optimizer.sums.values(), *(alike.grad for alike in alikes if alike.grad is not None)]
    for tensor in (*alikes, *gradients, *(state for held in states.values() for state in held)):
        tensor.untyped_storage().resize_(0)
    return optimizer


def _alike(parameter: Tensor) -> Tensor:
    """A parameter on meta with a gradient; of several whole pieces, which are moved alike, it has one."""
    size = parameter.numel()
    size = size if size <= PIECE_VALUES else PIECE_VALUES + size % PIECE_VALUES
    alike = nn.Parameter(torch.empty(size, dtype=parameter.dtype, device="meta"))
    alike.grad = torch.empty_like(alike)
    return alike
