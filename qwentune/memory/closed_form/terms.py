"""What the bytes of one moment are for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from qwentune.memory.settings import MIB, Overheads, Settings

# One NCCL communicator; up to 1.6 GB was reported once (NVIDIA/nccl#864), unverified.
NCCL_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True)
class Terms:
    """What the bytes of one moment are for.

    `workspaces` are libraries' own buffers inside torch's count; `allocator` (reserved but not handed out) and
    `context` (CUDA and NCCL) stand outside of it. `towers` are the weights of what sees and hears, `media` the pixels
    and sounds of a batch and what towers make and keep of them, `cache` keys and values of prompts that are answered.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0
    workspaces: int = 0
    allocator: int = 0
    context: int = 0
    towers: int = 0
    media: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All bytes that the process takes, as nvidia-smi shows them."""
        return self.allocated + self.allocator + self.context

    @property
    def allocated(self) -> int:
        """Bytes of tensors: torch's `max_memory_allocated`."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.temporaries
            + self.workspaces
            + self.towers
            + self.media
            + self.cache
        )

    def as_dict(self) -> dict[str, int]:
        """The terms by name."""
        return asdict(self)


def with_overheads(terms: Terms, settings: Settings, overheads: Overheads) -> Terms:
    if terms.allocated == 0:
        return terms
    communicator = NCCL_BYTES if settings.sharding != "none" and overheads.context_bytes else 0
    terms = replace(terms, workspaces=overheads.workspace_bytes)
    slack = int(terms.allocated * overheads.allocator_fraction) + overheads.allocator_bytes
    return replace(terms, allocator=slack, context=overheads.context_bytes + communicator)
