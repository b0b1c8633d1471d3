"""What a run takes beside its GPUs: host memory by phase, and disk."""

from __future__ import annotations

from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters
from qwentune.memory.closed_form.model_states import (
    largest_tensor_bytes,
    moving_bytes,
    share_of,
    state_bytes,
    trained_parameters,
)
from qwentune.memory.closed_form.terms import Terms, with_overheads
from qwentune.memory.settings import GIB, HostMemory, Settings, device_overheads

# Interpreter, torch, CUDA libraries and pinned buffers of a rank on a GPU, unverified.
HOST_BYTES_PER_RANK = 3 * GIB
MERGED_AT_ONCE = (
    128 * 2**20
)  # a block of rows as it is read, in fp32, its update, the sum and what is written; measured


def host_bytes(spec: ModelSpec, settings: Settings) -> dict[str, int]:
    """Bytes of host memory by phase that one machine needs beside its GPUs, the page cache left out.

    Its ranks train at once; adapters are merged later, by one process without a GPU.
    """
    running = settings.num_ranks * (HOST_BYTES_PER_RANK + offloaded_bytes(spec, settings))
    loading = saving = running
    if settings.is_sharded:  # rank 0 gathers what is trained, not the states, which every rank writes for itself
        saving += settings.trained_bytes * trained_parameters(spec, settings)
    if settings.is_sharded and settings.uses_deepspeed:  # what rank 0 fuses
        loading += settings.weight_bytes * spec.expert_parameters_per_layer
    elif settings.is_sharded:  # FSDP2 shares adapters out when all are there
        loading += settings.num_ranks * settings.trained_bytes * adapter_parameters(spec, settings)
    merged = with_overheads(merging(spec, settings), settings, device_overheads(HostMemory(0))).total
    phases = dict.fromkeys(("load", "train_step", "evaluate", "save", "resume"), running)
    return {**phases, "load": loading, "save": saving, "resume": loading, "merge": merged}


def offloaded_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of host memory for what a rank's GPU hands over: the optimizer's states, gradients, and staging.

    fp32 weights and gradients, the new weights and one tensor's gradient are pinned, in blocks of a power of two as
    torch takes them. The two moments are not; nor are the gradients summed over micro-batches, or, while a checkpoint
    is read, its fp32 weights, which are more; nor what the step takes.
    """
    if not settings.offloads:
        return 0
    trained = share_of(trained_parameters(spec, settings), settings.num_ranks)
    pinned = (4 * trained, 4 * trained, settings.trained_bytes * trained, largest_tensor_bytes(spec, settings))
    return sum(1 << (size - 1).bit_length() for size in pinned) + (8 + 4) * trained + moving_bytes(spec, settings)


def disk_bytes(spec: ModelSpec, settings: Settings, keep: int) -> int:
    """Bytes of the run folder: `keep` checkpoints, the one being written, and the final weights or adapter."""
    weights = settings.trained_bytes * trained_parameters(spec, settings)
    num_written = 2 if settings.uses_deepspeed and not settings.is_sharded else 1  # DeepSpeed's own file has them too
    return (keep + 1) * (num_written * weights + state_bytes(spec, settings)) + weights


def merging(spec: ModelSpec, settings: Settings) -> Terms:
    """One layer's adapters in fp32, and rows of one tensor at a time; full tuning has nothing to merge."""
    if settings.kind == "full":
        return Terms()
    return Terms(adapters=4 * adapter_parameters(spec, settings) // spec.num_layers, temporaries=MERGED_AT_ONCE)
