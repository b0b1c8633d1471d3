"""A traced training step at its full depth, replayed through a model of the caching allocator.

A step of four blocks of each kind (a block is a layer, or a period of different ones) is recorded: which storages each
visit of a block makes and releases, forward and backward. The third block stands for all between the second and the
last, so the true model's step is known storage by storage. Replayed as a run begins (weights, a step, the optimizer's
states, more steps), it tells what the allocator reserves beyond the tensors.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from qwentune.memory.trace.allocator import Allocator
from qwentune.memory.trace.live_bytes import Key, LiveStorage, Step, watch

# Of each kind: a first block, a second one, one that stands for all that follow, a last one.
BLOCKS_OF_A_KIND = 4
TEMPLATE = 2
# The optimizer's states lie where the first step left room; after that every step takes the same.
NUM_STEPS = 3

# The visit that made a storage, and which of its storages it is.
Name: TypeAlias = tuple[int, int]
# A storage of so many bytes comes, or with None goes.
Event: TypeAlias = tuple[Name, int | None]


@dataclass(frozen=True, slots=True)
class Recording:
    """A training step as the allocator sees it; bytes throughout.

    `held` are the storages between steps but for the optimizer's `states`; both are lists for each block, and a last
    one for what is outside of the blocks. `visits` are those of the embedding, of each block forward, of the head, of
    each block backward from the last to the first, and of the optimizer.
    """

    held: Sequence[Sequence[int]]
    states: Sequence[Sequence[int]]
    visits: Sequence[Sequence[Event]]


def record(step: Step, num_recomputed: int) -> Recording:
    """Runs the step once, of a model whose first blocks are recomputed."""
    tensors = [*step.network.parameters(), *step.network.buffers()]
    gradients = [*((x, x.grad) for x in tensors if x.grad is not None), *step.sums.items()]
    states = [(x, state) for x, states in step.states.items() for state in states]
    recorder = _Recorder()
    held = _by_block(step, [*zip(tensors, tensors, strict=True), *gradients])
    watch(step, num_recomputed, recorder)
    assert len(recorder.visits) == 2 * len(step.blocks) + 3
    return Recording(held, _by_block(step, states), recorder.visits)


def depth(num_recomputed: int, num_kept: int) -> list[int]:
    """For each block of the true model the recorded one that it is like."""
    found: list[int] = []
    for count in (num_recomputed, num_kept):
        first = min(num_recomputed, BLOCKS_OF_A_KIND) if found else 0
        shown = min(count, BLOCKS_OF_A_KIND)
        more = [TEMPLATE] * (count - shown)
        found += [first + k for k in (*range(min(shown, TEMPLATE)), *more, *range(TEMPLATE, shown))]
    return found


def replay(
    recording: Recording, blocks: Sequence[int], others: Iterable[int] = (), capacity: int | None = None
) -> Allocator:
    """The allocator after some steps of the model with such blocks (see `depth`).

    `others` are bytes that libraries hold.

    Raises:
        CardIsFullError: the steps do not fit into `capacity` bytes.
    """
    allocator = Allocator(capacity)
    for size in (*_deep(recording.held, blocks), *others):
        allocator.allocate(size)
    events = list(_deep_events(recording, blocks))
    for step in range(NUM_STEPS):
        alive: dict[Name, Any] = {}
        for name, size in events:
            if size is not None:
                alive[name] = allocator.allocate(size)
            elif name in alive:
                allocator.release(alive.pop(name))
        for size in _deep(recording.states, blocks) if step == 0 else ():
            allocator.allocate(size)
        for block in alive.values():  # gradients
            allocator.release(block)
    return allocator


def _by_block(step: Step, tensors: Iterable[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Bytes of storages by the block that owns the first of each pair; the last list is for no block."""
    owner = {
        id(x): k
        for k, block in enumerate(step.blocks)
        for layer in block
        for x in (*layer.parameters(), *layer.buffers())
    }
    found: list[list[int]] = [[] for _ in range(len(step.blocks) + 1)]
    for owned, tensor in tensors:
        found[owner.get(id(owned), -1)].append(tensor.untyped_storage().nbytes())
    return found


def _deep(sizes: Sequence[Sequence[int]], blocks: Sequence[int]) -> Iterator[int]:
    yield from sizes[-1]
    for block in blocks:
        yield from sizes[block]


def _deep_events(recording: Recording, blocks: Sequence[int]) -> Iterator[Event]:
    """The events of the true model, whose names count its own visits."""
    depth, shown = len(blocks), (len(recording.visits) - 3) // 2
    like: dict[int, list[int]] = {}
    for place, block in enumerate(blocks):
        like.setdefault(block, []).append(place)

    def shown_block(visit: int) -> int | None:
        """The recorded block of a recorded visit."""
        if 1 <= visit <= shown:
            return visit - 1
        return 2 * shown + 1 - visit if shown + 2 <= visit <= 2 * shown + 1 else None

    def deep_visit(visit: int, place: int) -> int:
        """The visit of a block of the true model that is of the same direction as a recorded one."""
        return 1 + place if visit <= shown else 2 * depth + 1 - place

    def deep_names(name: Name, block: int | None, place: int) -> list[Name]:
        """What a recorded storage is called in the visit of a block at that place; of a far block, all like it."""
        visit, number = name
        owner = shown_block(visit)
        if owner is None:
            return [({0: 0, shown + 1: depth + 1}.get(visit, 2 * depth + 2), number)]
        if block is not None and abs(owner - block) <= 1:
            return [(deep_visit(visit, place + owner - block), number)]
        return [(deep_visit(visit, at), number) for at in like[owner]]

    def visits() -> Iterator[tuple[int, int | None, int]]:
        yield 0, None, 0
        yield from ((1 + block, block, place) for place, block in enumerate(blocks))
        yield shown + 1, None, 0
        yield from ((2 * shown + 1 - block, block, place) for place, block in reversed(list(enumerate(blocks))))
        yield 2 * shown + 2, None, 0

    for visit, block, place in visits():
        for name, size in recording.visits[visit]:
            for deep_name in deep_names(name, block, place):
                yield deep_name, size


class _Recorder(LiveStorage):
    """Writes down which storages come and go between the beginnings of two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[list[Event]] = []
        self._names: dict[Key, Name] = {}

    def enter(self, region: str) -> None:
        super().enter(region)
        # What a tower does belongs to the visit of the embedding, and backward to that of the first block.
        if region not in ("tower", "backward tower") and (region != "embedding" or not self.visits):
            self.visits.append([])

    def made(self, key: Key, size: int) -> None:
        if self.visits and size:
            visit = len(self.visits) - 1
            name = (visit, sum(1 for _, size in self.visits[-1] if size is not None))
            self._names[key] = name
            self.visits[-1].append((name, size))

    def released(self, key: Key) -> None:
        super().released(key)
        if key in self._names:
            self.visits[-1].append((self._names.pop(key), None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.adds_in_place(func):
            self._rename(args[0], out)
        return out

    def _rename(self, old: Tensor, new: Tensor) -> None:
        """The sum takes the place of its first term."""
        old_key, new_key = (weakref.ref(x.untyped_storage()) for x in (old, new))
        if old_key in self._names and self._names.get(new_key) == self.visits[-1][-1][0]:
            self.visits[-1].pop()
            self._names[new_key] = self._names.pop(old_key)
