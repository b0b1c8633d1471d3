"""What a run takes beside its GPUs: host memory by phase, and disk."""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.layout.row_media import NUM_AHEAD
from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters
from qwentune.memory.closed_form.media_activations import media_bytes
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
    loading = settings.num_ranks_here * (HOST_BYTES_PER_RANK + offloaded_bytes(spec, settings))
    ahead = ahead_bytes(spec, settings)
    running = saving = loading + ahead["train_step"]
    if settings.is_sharded:  # rank 0 gathers what is trained, not the states, which every rank writes for itself
        saving += settings.trained_bytes * trained_parameters(spec, settings)
    if settings.is_sharded and settings.uses_deepspeed:  # what rank 0 fuses
        loading += settings.weight_bytes * spec.expert_parameters_per_layer
    elif settings.is_sharded:  # FSDP2 shares adapters out when all are there
        loading += settings.num_ranks_here * settings.trained_bytes * adapter_parameters(spec, settings)
    merged = with_overheads(merging(spec, settings), settings, device_overheads(HostMemory(0))).total
    evaluating = running + ahead["evaluate"] - ahead["train_step"]
    phases = {"load": loading, "train_step": running, "evaluate": evaluating, "save": saving, "resume": loading}
    return {**phases, "merge": merged}


def ahead_bytes(spec: ModelSpec, settings: Settings) -> dict[str, int]:
    """Bytes of host memory by phase for the batches with media of all ranks of a machine.

    That of the step is there as it was made and pinned; of those that are made ahead of it, each twice: pictures, and
    the patches that they are cut into. While rows are evaluated, those of training wait. The bytes of a picture as it
    is decoded, three a pixel, are left out.
    """
    copies = settings.num_ranks_here * (2 + 2 * NUM_AHEAD)
    training, row = copies * media_bytes(spec, settings).inputs, replace(settings, micro_batch=1)
    evaluating = training + copies * media_bytes(spec, row).inputs
    return {"train_step": training, "evaluate": evaluating, "save": training}


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
