"""The optimizer's states in a checkpoint: in one file, or of ranks that share the weights each its rows in its own.

Any number of ranks can go on from either: a rank reads the rows that it holds, from whichever files have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME

OF_A_RANK = "optimizer_{}.pt"


def write_states(optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Writes what one of several ranks holds."""
    torch.save(optimizer.state_dict(), folder / OF_A_RANK.format(rank))


def read_states(folder: Path, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """What `AdamW.load_state_dict` takes: of each of its parameters, in their order, the rows that this rank holds.

    Files are mapped, so that what goes to a GPU takes no room in the host; only rows that lie in several are copied.
    """
    whole, of_ranks = folder / OPTIMIZER_NAME, [*folder.glob(OF_A_RANK.format("*"))]
    files = [whole] if whole.exists() else [folder / OF_A_RANK.format(rank) for rank in range(len(of_ranks))]
    meshes = [parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)]
    if meshes and meshes[0].size() == len(files):  # as they were written
        return torch.load(files[meshes[0].get_local_rank()], map_location="cpu", mmap=True, weights_only=True)
    written = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    states = {
        number: {name: _held([one["state"][number][name] for one in written], parameters[number]) for name in state}
        for number, state in written[0]["state"].items()
    }
    return {**written[0], "state": states}


def _held(parts: Sequence[Tensor], parameter: Tensor) -> Tensor:
    """Of a state whose rows lie in `parts`, one part after another, those that this rank holds of the parameter."""
    if parts[0].ndim == 0:  # the number of steps
        return parts[0]
    start, stop = _rows(parameter)
    found: list[Tensor] = []
    first = 0
    for part in parts:
        begin, end = max(start - first, 0), min(stop - first, len(part))
        if begin < end:
            found.append(part[begin:end])
        first += len(part)
    return torch.cat(found) if len(found) > 1 else found[0] if found else parts[0][:0]


def _rows(parameter: Tensor) -> tuple[int, int]:
    """The rows of the first dimension that this rank holds, as `torch.chunk` cuts them: from, to before."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter)
    rows_of_a_rank = -(-len(parameter) // parameter.device_mesh.size())
    start = min(rows_of_a_rank * parameter.device_mesh.get_local_rank(), len(parameter))
    return start, start + len(parameter.to_local())
