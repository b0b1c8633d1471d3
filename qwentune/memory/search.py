"""From what a recipe asks for to the fastest settings that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from qwentune.errors import Problem, UsageError
from qwentune.facts.architecture import FUSED_ADAPTED_EXPERTS, ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding, offloads
from qwentune.memory.closed_form import Terms, disk_bytes, host_bytes, offloaded_bytes, phases
from qwentune.memory.roofline import step_seconds
from qwentune.memory.settings import (
    Attention,
    Dtype,
    HostMemory,
    Loss,
    Settings,
    StateDtype,
    Targets,
    Tuning,
    device_overheads,
)

Auto: TypeAlias = Literal["auto"]
Device: TypeAlias = GpuSpec | HostMemory

NOT_FOR_BITSANDBYTES: tuple[Sharding, ...] = ("zero3", "fsdp2", "zero2-offload", "zero3-offload")
# Beyond this a forward pass gains no speed, and kernels index with 32 bits.
MAX_FORWARD_TOKENS = 65536


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a recipe asks for, as far as it decides bytes and seconds; "auto" leaves the choice to the plan.

    `branches` says that rows may hold examples that share beginnings.
    `kernels` are the packages of fused kernels for hybrids that the run will find. `sharding` is what the launch file
    gives. `optimizer_steps` is None where the data has not been counted.
    `host_free_bytes` and `disk_free_bytes` are what the system says, None where it is not judged. `headroom` is the
    fraction of the device's memory that stays free.
    """

    kind: Tuning
    max_tokens: int
    sequences_per_step: int
    rank: int = 16
    targets: Targets = "all-linear"
    drops: bool = False
    dora: bool = False
    trains_rows: bool = False
    branches: bool = False
    micro_batch: int | Auto = "auto"
    gradient_checkpointing: bool | int | Auto = "auto"
    loss: Loss | Auto = "auto"
    attention: Attention | Auto = "auto"
    sharding: Sharding | Auto = "auto"
    num_gpus: int = 1
    weights: Dtype | Auto = "auto"
    adapters: Dtype | Auto = "auto"
    optimizer_state: StateDtype | Auto = "auto"
    kernels: frozenset[str] = frozenset()
    headroom: float = 0.03
    keep: int = 3
    optimizer_steps: int | None = None
    host_free_bytes: int | None = None
    disk_free_bytes: int | None = None


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


def usable_bytes(device: Device, request: PlanRequest) -> int:
    """What one rank may take of the device; the ranks of a CPU run share its memory."""
    if isinstance(device, GpuSpec):
        return int(device.total_bytes * (1 - request.headroom))
    return int(device.free_bytes // request.num_gpus * (1 - request.headroom))


def request_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    """Why the ranks cannot share the batch, or what model, libraries or host do not take; empty where all is well."""
    problems = [*_target_problems(spec, request), *_expert_problems(spec, request), *_hybrid_problems(spec, request)]
    if request.loss == "supervised" and _adapts_head(request):
        what = "supervised, but an adapter on lm_head makes all logits at once"
        problems.append(Problem("memory.loss", what, "Leave it at auto, or leave lm_head out of tuning.targets."))
    if request.kind == "qlora" and request.sharding in NOT_FOR_BITSANDBYTES:
        what = f"{request.sharding}, but bitsandbytes' 4-bit weights are neither sharded nor offloaded"
        problems.append(Problem("hardware.launch", what, "Leave it at auto, or take ddp, or tuning.kind=lora."))
    if request.optimizer_state == "8bit" and request.sharding in ("zero3", "fsdp2"):
        what = f"8bit, but {request.sharding} shards the states, and bitsandbytes' are not"
        problems.append(
            Problem("precision.optimizer_state", what, "Leave it at auto, or take another hardware.launch.")
        )
    if request.optimizer_state == "8bit" and request.sharding != "auto" and offloads(request.sharding):
        what = f"8bit, but {request.sharding} holds the states in host memory, and 8 bits are a matter of GPU kernels"
        problems.append(
            Problem("precision.optimizer_state", what, "Leave it at auto, or take another hardware.launch.")
        )
    rows, ranks = request.sequences_per_step, request.num_gpus
    if rows % ranks:
        below = rows // ranks * ranks
        nearby = f"{below} or {below + ranks}" if below else str(ranks)
        problems.append(
            Problem(
                "batch.sequences_per_step",
                f"{rows} rows per step cannot be shared evenly by {ranks} processes.",
                f"Use {nearby}, or change hardware.count.",
            )
        )
    elif request.micro_batch != "auto" and rows // ranks % request.micro_batch:
        fitting = ", ".join(str(divisor) for divisor in _divisors(rows // ranks))
        problems.append(
            Problem(
                "batch.micro_batch",
                f"{request.micro_batch} does not divide the {rows // ranks} rows that each process takes per step.",
                f"Use auto, or one of {fitting}.",
            )
        )
    return problems


def _target_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    fused = ("gate_proj", "up_proj")
    if request.kind == "full" or request.targets == "all-linear" or spec.model_type not in FUSED_ADAPTED_EXPERTS:
        return []
    given = [name.rpartition(".")[2] for name in request.targets]
    named = [name for name in fused if name in given]
    if len(named) != 1:
        return []
    other = fused[1 - fused.index(named[0])]
    what = f"{named[0]} without {other}, but the experts of {spec.checkpoint_type} hold both as one matrix"
    fix = f"Name both or neither: tuning.targets=[{','.join((*request.targets, other))}]"
    return [Problem("tuning.targets", what, fix)]


def _expert_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    """PEFT 0.21 adapts fused experts neither with dropout nor with DoRA."""
    names = ("gate_proj", "up_proj", "down_proj")
    adapts = request.targets == "all-linear" or any(name.rpartition(".")[2] in names for name in request.targets)
    if request.kind == "full" or spec.model_type not in FUSED_ADAPTED_EXPERTS or not adapts:
        return []
    fix = "Leave it out, or adapt attention alone: tuning.targets=[q_proj,k_proj,v_proj,o_proj]"
    given = {"tuning.dropout": request.drops and "dropout", "tuning.variant": request.dora and "dora"}
    return [
        Problem(key, f"{what}, which adapters on the experts of {spec.checkpoint_type} do not know", fix)
        for key, what in given.items()
        if what
    ]


def _hybrid_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    if spec.linear_attention is None:
        return []
    problems: list[Problem] = []
    if request.micro_batch not in ("auto", 1):
        what = (
            f"{request.micro_batch} rows, but linear attention ({spec.checkpoint_type}) reads on from one to the next"
        )
        problems.append(Problem("batch.micro_batch", what, "batch.micro_batch=auto"))
    count = request.gradient_checkpointing
    if count != "auto" and not isinstance(count, bool) and count < spec.num_layers and count % spec.period:
        below = count // spec.period * spec.period
        what = f"{count} layers, but {spec.checkpoint_type} repeats itself after {spec.period} different ones"
        problems.append(Problem("memory.gradient_checkpointing", what, f"Use {below} or {below + spec.period}."))
    return problems


def candidates(spec: ModelSpec, device: Device, request: PlanRequest) -> Iterator[Candidate]:
    """Every choice of settings that the request leaves open, of checkpointing only all layers or none.

    Raises:
        UsageError: what `request_problems` finds.
    """
    _check(spec, request)
    for micro_batch in _micro_batches(spec, request):
        for checkpointing in _checkpointing(request):
            for sharding in _shardings(device, request):
                yield _candidate(spec, device, request, micro_batch, checkpointing, sharding)


def leanest(spec: ModelSpec, device: Device, request: PlanRequest) -> Candidate:
    """The choice with the lowest peak among the smallest and the largest micro-batch."""
    sizes = _micro_batches(spec, request)
    return min(
        (
            _candidate(spec, device, request, micro_batch, checkpointing, sharding)
            for micro_batch in {sizes[0], sizes[-1]}
            for checkpointing in _checkpointing(request)
            for sharding in _shardings(device, request)
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
        for sharding in _shardings(device, request)
        if (found := _least_recomputing(spec, device, request, micro_batch, sharding)) is not None
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
    return {name: size * (1 if name == "merge" else settings.num_ranks) for name, size in each.items()}


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
    adapters: Dtype = "fp32" if request.adapters == "auto" else request.adapters
    trained = weights if request.kind == "full" else adapters
    settings = Settings(
        kind=request.kind,
        max_tokens=request.max_tokens,
        micro_batch=micro_batch,
        accumulation=request.sequences_per_step // request.num_gpus // micro_batch,
        gradient_checkpointing=checkpointing,
        loss=("full" if _adapts_head(request) else "supervised") if request.loss == "auto" else request.loss,
        attention=_attention(spec, has_bf16) if request.attention == "auto" else request.attention,
        sharding=sharding,
        num_ranks=request.num_gpus,
        weights=weights,
        adapters=adapters,
        optimizer_state=trained if request.optimizer_state == "auto" else request.optimizer_state,
        rank=request.rank,
        targets=request.targets,
        drops=request.drops,
        dora=request.dora,
        trains_rows=request.trains_rows,
        branches=request.branches,
        on_cpu=isinstance(device, HostMemory),
        fuses_delta_rule="fla" in request.kernels,
        fuses_convolution="causal_conv1d" in request.kernels,
    )
    overheads = device_overheads(device)
    merges_here = isinstance(device, HostMemory)
    return Candidate(settings, phases(spec, settings, overheads, merges_here))


def _adapts_head(request: PlanRequest) -> bool:
    """Whether an adapter stands around the head, which then gives all logits at once."""
    if request.kind == "full" or request.targets == "all-linear":
        return False
    return any(name.rpartition(".")[2] == "lm_head" for name in request.targets)


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


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _micro_batches(spec: ModelSpec, request: PlanRequest) -> list[int]:
    if request.micro_batch != "auto":
        return [request.micro_batch]
    if spec.linear_attention is not None:
        return [1]
    most = max(1, MAX_FORWARD_TOKENS // request.max_tokens)
    return [size for size in _divisors(request.sequences_per_step // request.num_gpus) if size <= most]


def _checkpointing(request: PlanRequest) -> tuple[bool | int, ...]:
    return (False, True) if request.gradient_checkpointing == "auto" else (request.gradient_checkpointing,)


def _shardings(device: Device, request: PlanRequest) -> tuple[Sharding, ...]:
    if request.sharding != "auto":
        return (request.sharding,)
    # Adapters have few states; bitsandbytes' weights and moments are neither sharded nor offloaded.
    is_bitsandbytes = request.kind == "qlora" or request.optimizer_state == "8bit"
    has_states = isinstance(device, GpuSpec) and request.kind == "full" and not is_bitsandbytes
    # A host that nobody knows is not counted on.
    offloads_states = has_states and request.host_free_bytes is not None
    offloading: tuple[Sharding, ...] = ("zero2-offload", "zero3-offload") if offloads_states else ()
    if request.num_gpus == 1:
        return ("none", *offloading)
    if isinstance(device, HostMemory) or is_bitsandbytes:  # on a CPU accelerate runs FSDP2 as DDP
        return ("ddp",)
    return ("ddp", "zero1", "zero2", "fsdp2", *offloading) if request.kind == "full" else ("ddp", "fsdp2")
