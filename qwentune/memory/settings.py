"""What decides a run's bytes: the settings of a training step and the overheads of the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding, offloads, uses_deepspeed

Tuning: TypeAlias = Literal["full", "lora", "qlora"]
Loss: TypeAlias = Literal["full", "supervised"]
Attention: TypeAlias = Literal["sdpa", "eager", "flex_attention", "flash_attention_2"]
Dtype: TypeAlias = Literal["bf16", "fp32"]
StateDtype: TypeAlias = Literal["fp32", "8bit"]
Targets: TypeAlias = Literal["all-linear"] | tuple[str, ...]
TowerTuning: TypeAlias = Literal["frozen", "trained", "adapters"]

# The most micro-batches whose gradients may be added up in bf16. Of 32 the sums of a tensor were off by 6e-3 to 8e-3 of
# their norm, of 256 by 1.7e-2; 1e-2 is allowed.
MOST_BF16_SUMS = 32

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class TowerUse:
    """How a run uses what sees and hears: the most patches and mel frames of one row, and what of it is tuned.

    Patches are those of pictures and of all steps of videos, frames those of all sounds. Where it `is_bound` no row
    has been counted, and no row can have more.
    """

    patches: int = 0
    frames: int = 0
    body: TowerTuning = "frozen"
    merger: TowerTuning = "frozen"
    is_bound: bool = field(default=False, compare=False)

    @property
    def is_tuned(self) -> bool:
        """Whether the backward pass goes through the mergers at least."""
        return (self.body, self.merger) != ("frozen", "frozen")


@dataclass(frozen=True, slots=True)
class Settings:
    """One way to run the training step on one rank.

    `gradient_checkpointing` is a claim about all layers, or the number of layers that are recomputed. `loss` "full"
    holds all logits; "supervised" computes the loss and its slopes in chunks of positions, forward.
    `rank`, `targets`, `drops` (dropout on the adapters' inputs), `dora` and `trains_rows` (some rows of embedding and
    head are trained too) count only for adapters. `branches` says that rows may hold examples that share beginnings,
    `on_cpu` that the step runs on a CPU. Hybrids run the delta rule and the convolution before it in torch, or
    fused by flash-linear-attention and causal-conv1d. `towers` is None where what sees and hears is not loaded.
    `answers` says that evaluations answer held-out prompts.
    """

    kind: Tuning
    max_tokens: int
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool | int
    loss: Loss
    attention: Attention
    sharding: Sharding
    num_ranks: int
    weights: Dtype
    adapters: Dtype
    optimizer_state: StateDtype
    rank: int
    targets: Targets
    drops: bool = False
    dora: bool = False
    trains_rows: bool = False
    branches: bool = False
    on_cpu: bool = False
    fuses_delta_rule: bool = False
    fuses_convolution: bool = False
    towers: TowerUse | None = None
    answers: bool = False
    num_machines: int = 1

    @property
    def num_ranks_here(self) -> int:
        """Ranks of one machine, which share its host memory."""
        return self.num_ranks // self.num_machines

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward pass on one rank, rows at their fullest."""
        return self.micro_batch * self.max_tokens

    @property
    def forward_patches(self) -> int:
        """Patches of one forward pass on one rank, rows at their fullest."""
        return 0 if self.towers is None else self.micro_batch * self.towers.patches

    @property
    def forward_frames(self) -> int:
        """Mel frames of one forward pass on one rank, rows at their fullest."""
        return 0 if self.towers is None else self.micro_batch * self.towers.frames

    @property
    def recomputes_towers(self) -> bool:
        """Whether the blocks of towers are recomputed: where they are tuned and layers of the decoder are too."""
        return self.tunes_towers and bool(self.gradient_checkpointing)

    @property
    def tunes_towers(self) -> bool:
        """Whether the backward pass goes through the blocks of towers, not their mergers alone."""
        return self.towers is not None and self.towers.body != "frozen"

    @property
    def weight_bytes(self) -> int:
        """Bytes per unquantised weight, and per value of most activations."""
        return bytes_of(self.weights)

    @property
    def trained_bytes(self) -> int:
        """Bytes per trained parameter, and per value of its gradient."""
        return self.weight_bytes if self.kind == "full" else bytes_of(self.adapters)

    @property
    def adds_in_fp32(self) -> bool:
        """Whether a rank adds up its gradients in fp32 beside those of a micro-batch, as ZeRO-2 and 3 always do."""
        is_asked = not self.uses_deepspeed or self.sharding == "zero1"
        return self.trained_bytes == 2 and self.accumulation > MOST_BF16_SUMS and is_asked

    @property
    def sums_lose_too_much(self) -> bool:
        """Whether too many gradients are added up in 16 bits, as DeepSpeed's stage 2 does that has sums in the host."""
        adds_in_16_bits = self.sharding == "zero2-offload" and self.trained_bytes == 2
        return adds_in_16_bits and self.accumulation > MOST_BF16_SUMS

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds only its share of the weights."""
        return self.sharding in ("zero3", "zero3-offload", "fsdp2")

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed keeps an fp32 copy of the trained parameters."""
        return uses_deepspeed(self.sharding)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer and its states are in host memory."""
        return offloads(self.sharding)

    def num_checkpointed(self, num_layers: int) -> int:
        """How many of `num_layers` layers are recomputed in the backward pass."""
        if isinstance(self.gradient_checkpointing, bool):
            return num_layers if self.gradient_checkpointing else 0
        return min(self.gradient_checkpointing, num_layers)


def bytes_of(dtype: Dtype) -> int:
    """Bytes per value."""
    return 2 if dtype == "bf16" else 4


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A CPU as the training device: `free_bytes` of host memory, which its ranks share."""

    free_bytes: int


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a device takes beside tensors: bytes outside torch, bytes inside, and the allocator's slack."""

    context_bytes: int
    workspace_bytes: int
    allocator_fraction: float
    allocator_bytes: int


def device_overheads(device: GpuSpec | HostMemory) -> Overheads:
    """The overheads of one process on `device`.

    Source: cuBLAS takes 8.125 MiB per thread that multiplies matrices (two: forward and backward), 32 MiB since
    Hopper. T4 contexts of 141 MiB were read, newer cards' are taken high (unverified). The allocator's slack is meant
    for expandable segments. On a CPU 1 GiB stands for the interpreter and the libraries.
    """
    if isinstance(device, HostMemory):
        return Overheads(context_bytes=0, workspace_bytes=GIB, allocator_fraction=0.0, allocator_bytes=0)
    major = device.compute_capability[0]
    context_mib = 160 if major < 8 else 300 if major == 8 else 520
    workspace_bytes = 2 * (32 * MIB if major >= 9 else 8 * MIB + MIB // 8)
    return Overheads(context_mib * MIB, workspace_bytes, allocator_fraction=0.03, allocator_bytes=100 * MIB)
