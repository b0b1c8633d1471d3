"""From what a recipe asks for to the fastest settings that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from qwentune.errors import UsageError
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding
from qwentune.facts.towers import sharding_problem
from qwentune.memory.closed_form.host_memory import ahead_bytes, disk_bytes, host_bytes, offloaded_bytes
from qwentune.memory.closed_form.phases import phases
from qwentune.memory.closed_form.roofline import step_seconds
from qwentune.memory.closed_form.terms import Terms
from qwentune.memory.plan_request import Device, PlanRequest, adapts_head, divisors, request_problems, usable_bytes
from qwentune.memory.settings import (
    Attention,
    Dtype,
    HostMemory,
    Settings,
    device_overheads,
)

# Beyond this a forward pass gains no speed, and kernels index with 32 bits.
MAX_FORWARD_TOKENS = 65536


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice of settings and the bytes of its phases."""

    settings: Settings
    phases: Mapping[str, Terms]

    @property
    def limiting_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak_bytes(self) -> int:
        """The highest total of all phases."""
        return self.phases[self.limiting_phase].total


def candidates(spec: ModelSpec, device: Device, request: PlanRequest) -> Iterator[Candidate]:
    """Every choice of settings that the request leaves open, of checkpointing only all layers or none.

    Raises:
        UsageError: what `request_problems` finds.
    """
    _check(spec, request)
    for micro_batch in _micro_batches(spec, request):
        for checkpointing in _checkpointing(request):
            for sharding in _shardings(spec, device, request):
                found = _candidate(spec, device, request, micro_batch, checkpointing, sharding)
                if _adds_up(request, found):
                    yield found


def leanest(spec: ModelSpec, device: Device, request: PlanRequest) -> Candidate:
    """The choice with the lowest peak among the smallest and the largest micro-batch."""
    sizes = _micro_batches(spec, request)
    return min(
        (
            found
            for micro_batch in {sizes[0], sizes[-1]}
            for checkpointing in _checkpointing(request)
            for sharding in _shardings(spec, device, request)
            if _adds_up(request, found := _candidate(spec, device, request, micro_batch, checkpointing, sharding))
        ),
        key=partial(burden, spec, device, request),
    )


def burden(spec: ModelSpec, device: Device, request: PlanRequest, candidate: Candidate) -> tuple[bool, int]:
    """Orders candidates from the leanest on: by peak, and last those that offload more than the host can hold."""
    return not _host_takes(spec, device, request, candidate), candidate.peak_bytes


def fastest(spec: ModelSpec, device: Device, request: PlanRequest) -> Candidate | None:
    """The fastest choice that fits the device; among equals the leanest. None where none fits.

    Raises:
        UsageError: what `request_problems` finds.
    """
    _check(spec, request)
    fitting = [
        found
        for micro_batch in _micro_batches(spec, request)
        for sharding in _shardings(spec, device, request)
        if (found := _least_recomputing(spec, device, request, micro_batch, sharding)) is not None
        and _adds_up(request, found)
    ]
    return min(
        fitting,
        key=lambda found: (step_seconds(spec, found.settings, device), found.peak_bytes),
        default=None,
    )


def host_phases(spec: ModelSpec, device: Device, candidate: Candidate) -> dict[str, int]:
    """Host memory of all ranks of one machine by phase; for a CPU run that is everything. One process merges."""
    settings = candidate.settings
    if not isinstance(device, HostMemory):
        return host_bytes(spec, settings)
    offloaded = offloaded_bytes(spec, settings)
    each = {name: terms.total + offloaded for name, terms in candidate.phases.items()}
    ahead = ahead_bytes(spec, settings)
    return {
        name: size * (1 if name == "merge" else settings.num_ranks) + ahead.get(name, 0) for name, size in each.items()
    }


def needed_host_bytes(spec: ModelSpec, device: Device, candidate: Candidate) -> int:
    """Host memory that a run needs; beside GPUs not that of a merge, which servers of adapters do without."""
    phases = host_phases(spec, device, candidate)
    return max(size for name, size in phases.items() if name != "merge" or isinstance(device, HostMemory))


def shortages(spec: ModelSpec, device: Device, request: PlanRequest, candidate: Candidate) -> list[str]:
    """What does not suffice: the limiting phase on the device, "host", "disk"."""
    found: list[str] = []
    if candidate.peak_bytes > usable_bytes(device, request):
        found.append(candidate.limiting_phase)
    if not _has_host_bytes(spec, device, request, candidate):
        found.append("host")
    disk = disk_bytes(spec, candidate.settings, request.keep)
    if request.disk_free_bytes is not None and disk > request.disk_free_bytes:
        found.append("disk")
    return found


def _has_host_bytes(spec: ModelSpec, device: Device, request: PlanRequest, candidate: Candidate) -> bool:
    free = request.host_free_bytes
    return free is None or needed_host_bytes(spec, device, candidate) <= free


def _host_takes(spec: ModelSpec, device: Device, request: PlanRequest, candidate: Candidate) -> bool:
    """Whether the host holds what the candidate offloads; where it holds too little for any run, nothing is chosen."""
    return not candidate.settings.offloads or _has_host_bytes(spec, device, request, candidate)


def _adds_up(request: PlanRequest, candidate: Candidate) -> bool:
    """Whether sums of gradients lose little enough to be chosen; a launch file that is named is taken as it is."""
    return request.sharding != "auto" or not candidate.settings.sums_lose_too_much


def _check(spec: ModelSpec, request: PlanRequest) -> None:
    if problems := request_problems(spec, request):
        raise UsageError(problems)


def _candidate(
    spec: ModelSpec,
    device: Device,
    request: PlanRequest,
    micro_batch: int,
    checkpointing: bool | int,
    sharding: Sharding,
) -> Candidate:
    has_bf16 = isinstance(device, GpuSpec) and device.has_bf16
    weights: Dtype = ("bf16" if has_bf16 else "fp32") if request.weights == "auto" else request.weights
    # DoRA divides by norms of the adapted weights, whose changes are below the last place of bf16.
    are_half = has_bf16 and weights == "bf16" and not request.dora
    adapters: Dtype = ("bf16" if are_half else "fp32") if request.adapters == "auto" else request.adapters
    settings = request.settings(
        device,
        micro_batch=micro_batch,
        accumulation=request.sequences_per_step // request.num_gpus // micro_batch,
        gradient_checkpointing=checkpointing,
        loss=("full" if adapts_head(request) else "supervised") if request.loss == "auto" else request.loss,
        attention=_attention(spec, has_bf16) if request.attention == "auto" else request.attention,
        sharding=sharding,
        weights=weights,
        adapters=adapters,
        optimizer_state="fp32" if request.optimizer_state == "auto" else request.optimizer_state,
    )
    overheads = device_overheads(device)
    merges_here = isinstance(device, HostMemory)
    return Candidate(settings, phases(spec, settings, overheads, merges_here))


def _least_recomputing(
    spec: ModelSpec, device: Device, request: PlanRequest, micro_batch: int, sharding: Sharding
) -> Candidate | None:
    """The choice that fits and recomputes the fewest layers; None where even recomputing all does not fit."""
    usable = usable_bytes(device, request)

    def tried(checkpointing: bool | int) -> Candidate | None:
        found = _candidate(spec, device, request, micro_batch, checkpointing, sharding)
        return found if found.peak_bytes <= usable and _host_takes(spec, device, request, found) else None

    if request.gradient_checkpointing != "auto":
        return tried(request.gradient_checkpointing)
    if (found := tried(False)) is not None:
        return found
    if (found := tried(True)) is None:
        return None
    # Each layer more that is recomputed takes fewer bytes; in hybrids each period.
    too_few, enough = 0, spec.num_layers // spec.period
    while enough - too_few > 1:
        between = (too_few + enough) // 2
        if (fewer := tried(between * spec.period)) is None:
            too_few = between
        else:
            enough, found = between, fewer
    return found


def _attention(spec: ModelSpec, has_bf16: bool) -> Attention:
    """Rows need a mask that flash kernels do not take; FlexAttention compiles it, where Ampere or later runs.

    A hybrid's row is one example, which SDPA takes without a mask.
    """
    return "flex_attention" if has_bf16 and spec.linear_attention is None else "sdpa"


def _micro_batches(spec: ModelSpec, request: PlanRequest) -> list[int]:
    if request.micro_batch != "auto":
        return [request.micro_batch]
    if spec.linear_attention is not None:
        return [1]
    most = max(1, MAX_FORWARD_TOKENS // request.max_tokens)
    return [size for size in divisors(request.sequences_per_step // request.num_gpus) if size <= most]


def _checkpointing(request: PlanRequest) -> tuple[bool | int, ...]:
    return (False, True) if request.gradient_checkpointing == "auto" else (request.gradient_checkpointing,)


def _shardings(spec: ModelSpec, device: Device, request: PlanRequest) -> tuple[Sharding, ...]:
    if request.sharding != "auto":
        return (request.sharding,)
    if request.towers is not None:
        takes_fsdp2 = isinstance(device, GpuSpec) and request.kind != "qlora"
        takes_fsdp2 = takes_fsdp2 and sharding_problem(spec, "fsdp2", tuned=request.towers.is_tuned) is None
        return ("none",) if request.num_gpus == 1 else ("ddp", "fsdp2") if takes_fsdp2 else ("ddp",)
    # Adapters have few states, and DeepSpeed takes none in 8 bits.
    uses_zero = isinstance(device, GpuSpec) and request.kind == "full" and request.optimizer_state != "8bit"
    # A host that nobody knows is not counted on.
    offloads_states = uses_zero and request.host_free_bytes is not None
    offloading: tuple[Sharding, ...] = ("zero2-offload", "zero3-offload") if offloads_states else ()
    if request.num_gpus == 1:
        return ("none", *offloading)
    # bitsandbytes' weights are not sharded; on a CPU accelerate runs FSDP2 as DDP.
    if isinstance(device, HostMemory) or request.kind == "qlora":
        return ("ddp",)
    return ("ddp", "zero1", "zero2", "fsdp2", *offloading) if uses_zero else ("ddp", "fsdp2")
