"""The processes of one run: how many there are, how they share the model, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from qwentune.facts.launch import Sharding, offloads, read_launch, uses_deepspeed, zero_of_environment

if TYPE_CHECKING:
    import torch

    from qwentune.recipe import Hardware

T = TypeVar("T")
# How long a rank waits for others: they stand by while rank 0 writes and hashes a checkpoint, which can be a terabyte.
PATIENCE = timedelta(hours=1)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's two names: since 2.9, and before


def expand_segments() -> None:
    """Makes CUDA's allocator grow its segments, as the plan reckons; before torch is imported.

    What the user has set in either variable stays.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


def launch_remarks(hardware: Hardware, ranks: Ranks) -> list[str]:
    """What of the recipe's launch these processes were not given, in words: who launched them has decided."""
    asked: dict[str, tuple[object, object]] = {}
    if hardware.launch != "auto":
        launch = read_launch(hardware.launch)
        if launch.sharding != ranks.sharding:
            asked["hardware.launch"] = (hardware.launch, ranks.sharding)
        elif hardware.count == "auto" and not launch.takes_all_gpus and launch.num_processes != ranks.num_here:
            asked["hardware.launch"] = (f"{hardware.launch} ({launch.num_processes} processes)", ranks.num_here)
    if hardware.count not in ("auto", ranks.num_here):
        asked["hardware.count"] = (hardware.count, ranks.num_here)
    if hardware.machines not in ("auto", ranks.num_machines):
        asked["hardware.machines"] = (hardware.machines, ranks.num_machines)
    return [
        f"warning: {key} is {wanted}, but this run was launched with {given}; `qwentune train` follows the recipe"
        for key, (wanted, given) in asked.items()
    ]


@dataclass(frozen=True)
class Ranks:
    """What the launcher's environment says of this process."""

    rank: int
    num_ranks: int
    sharding: Sharding
    on_cpu: bool = False  # by the recipe's wish; without a GPU it is so anyway

    @classmethod
    def of_environment(cls, *, on_cpu: bool = False) -> Ranks:
        """This process's place, as accelerate and torchrun tell it."""
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        sharding: Sharding = "none" if num_ranks == 1 else "ddp"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            sharding = zero_of_environment()
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            sharding = "fsdp2"
        return cls(int(os.environ.get("RANK", "0")), num_ranks, sharding, on_cpu)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def num_here(self) -> int:
        """How many ranks this machine has, each with a card of its own."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks))

    @property
    def num_machines(self) -> int:
        """How many machines train together."""
        return self.num_ranks // self.num_here

    @property
    def device(self) -> torch.device:
        """Where this rank's model lives."""
        import torch

        local = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() and not self.on_cpu
        return torch.device("cuda", local) if on_gpu else torch.device("cpu")

    @property
    def shards_weights(self) -> bool:
        """Whether FSDP2 shards this run, once the ranks have joined; on a CPU accelerate runs DDP in its place."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        kinds = (DistributedType.NO, DistributedType.MULTI_CPU)
        return self.sharding == "fsdp2" and PartialState().distributed_type not in kinds

    def join(self, weights: str) -> None:
        """Makes the process group, on the CPU's gloo where there is no GPU; `weights` is the dtype of the plan."""
        is_deepspeed = uses_deepspeed(self.sharding)
        if is_deepspeed:
            import deepspeed

            from qwentune.training.shards import load_only_weights

            # Its shared-memory collectives for CPUs would be compiled here, for half a minute; gloo does as well.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            load_only_weights()
        # A user's accelerate defaults would switch autocast on behind the Trainer's back; DeepSpeed casts by it.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if is_deepspeed and weights == "bf16" else "no"
        from accelerate import PartialState

        state = PartialState(cpu=self.device.type == "cpu", timeout=PATIENCE)
        if offloads(self.sharding) and self.device.type == "cuda":
            import torch

            # Launchers leave one thread to each of several ranks; the optimizer needs all that the host has.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.num_here))
        assert state.num_processes == self.num_ranks, f"{state.num_processes} processes joined, not {self.num_ranks}"

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""
        if self.num_ranks == 1:
            return [value]
        import torch.distributed

        values: list[T | None] = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; its error is raised on every rank too."""
        outcome: list[tuple[T | None, BaseException | None]] = [(None, None)]
        if self.leads:
            try:
                outcome = [(decide(), None)]
            except Exception as error:
                outcome = [(None, error)]
        if self.num_ranks > 1:
            import torch.distributed

            torch.distributed.broadcast_object_list(outcome, src=0)
        value, raised = outcome[0]
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]
