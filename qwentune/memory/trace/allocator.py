"""torch's caching allocator for CUDA with expandable segments, on one stream: what a card must hold for given tensors.

A pool is a range of addresses without end, of which whole pages are backed by memory. A tensor takes the smallest free
block that holds it; where there is none, pages are mapped behind a block. Where the card has no page left, every page
that lies whole in a free block is given back first. Source of the rules: c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

from qwentune.memory.settings import MIB

BLOCK_BYTES = 512
LARGEST_SMALL_BYTES = MIB
SMALL_PAGE_BYTES, LARGE_PAGE_BYTES = 2 * MIB, 20 * MIB
_END_OF_ADDRESSES = 1 << 60


class CardIsFullError(Exception):
    """A tensor for which the card has no page left."""


@dataclass(slots=True, eq=False)
class _Block:
    """Neighbouring addresses of one state; an `unmapped` block has no memory behind it."""

    start: int
    size: int
    state: Literal["used", "free", "unmapped"]
    before: _Block | None = None
    after: _Block | None = None

    @property
    def reach(self) -> int:
        """The size to which a free block can grow."""
        after = self.after
        return self.size + (after.size if after is not None and after.state == "unmapped" else 0)

    def split(self, size: int, state: Literal["used", "free", "unmapped"]) -> _Block:
        """Cuts the block to `size`; the rest, in another state."""
        rest = _Block(self.start + size, self.size - size, state, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.size, self.after = size, rest
        return rest

    def swallow_next(self) -> None:
        """Takes the next block in."""
        gone = self.after
        assert gone is not None
        self.size, self.after = self.size + gone.size, gone.after
        if gone.after is not None:
            gone.after.before = self


class _Pool:
    """The blocks of all small or of all large tensors. A free block has no free neighbour."""

    def __init__(self, page: int) -> None:
        self.page = page
        self._first = _Block(0, _END_OF_ADDRESSES, "unmapped")
        self._free: list[tuple[int, int, _Block]] = []  # by size, then by address

    def smallest(self, size: int) -> _Block | None:
        """The free block to take for `size` bytes: the smallest, counted with what it can grow by."""
        place = bisect_left(self._free, (size, 0))
        if place == len(self._free):
            return None
        while place + 1 < len(self._free) and self._free[place + 1][2].reach < self._free[place][2].reach:
            place += 1
        return self._free[place][2]

    def take(self, block: _Block, size: int) -> None:
        """Marks the first `size` bytes of a free block as used."""
        self._unlist(block)
        block.state = "used"
        if block.size > size:
            self._list(block.split(size, "free"))

    def release(self, block: _Block) -> None:
        """Marks a used block as free, together with its free neighbours."""
        block.state = "free"
        if block.after is not None and block.after.state == "free":
            self._unlist(block.after)
            block.swallow_next()
        if block.before is not None and block.before.state == "free":
            block = block.before
            self._unlist(block)
            block.swallow_next()
        self._list(block)

    def grow(self, size: int, allowance: int) -> int:
        """Maps pages so that a free block of `size` bytes is there; their bytes.

        Raises CardIsFullError where they are more than the allowance; nothing is mapped then.
        """
        chain = self._room(size)
        needs: list[int] = []
        held = 0
        for block in chain:
            needs.append(0 if block.state == "free" else min(block.size, _rounded(size - held, self.page)))
            held += needs[-1] or block.size
        if sum(needs) > allowance:
            raise CardIsFullError
        whole = chain[0]
        for block, need in zip(chain, needs, strict=True):
            if block.state == "free":
                self._unlist(block)
            elif block.size > need:
                block.split(need, "unmapped")
            block.state = "used"
            if block is not whole:
                whole.swallow_next()
        self.release(whole)
        return sum(needs)

    def _room(self, size: int) -> list[_Block]:
        """The lowest neighbours that hold `size` bytes, of which the first or the second is unmapped and none used."""
        block = self._first
        while True:
            if block.state == "unmapped":
                start = block.before if block.before is not None and block.before.state == "free" else block
                chain, held = [start], start.size
                while held < size and (following := chain[-1].after) is not None and following.state != "used":
                    chain.append(following)
                    held += following.size
                if held >= size:
                    return chain
            assert block.after is not None, "addresses have no end"
            block = block.after

    def unmap_free_pages(self) -> int:
        """Gives back every page that lies whole in a free block; their bytes."""
        given = 0
        for _, _, block in list(self._free):
            begin = -(-block.start // self.page) * self.page
            size = (block.start + block.size) // self.page * self.page - begin
            if size <= 0:
                continue
            self._unlist(block)
            if begin > block.start:
                middle = block.split(begin - block.start, "unmapped")
                self._list(block)
            else:
                middle, middle.state = block, "unmapped"
            if middle.size > size:
                self._list(middle.split(size, "free"))
            for unmapped in (middle, middle.before):
                if unmapped is not None and unmapped.state == "unmapped":
                    while unmapped.after is not None and unmapped.after.state == "unmapped":
                        unmapped.swallow_next()
            given += size
        return given

    def _list(self, block: _Block) -> None:
        insort(self._free, (block.size, block.start, block))

    def _unlist(self, block: _Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.start))]


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class Allocator:
    """What a process has reserved on a card for the tensors that it made and has not released.

    `capacity` is what the card can give, in bytes; None: as much as is asked for.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = _END_OF_ADDRESSES if capacity is None else capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._small, self._large = _Pool(SMALL_PAGE_BYTES), _Pool(LARGE_PAGE_BYTES)

    def allocate(self, size: int) -> _Block:
        """The block of a tensor of `size` bytes.

        Raises:
            CardIsFullError: even with all free pages given back there is no room.
        """
        size = max(BLOCK_BYTES, _rounded(size, BLOCK_BYTES))
        pool = self._small if size <= LARGEST_SMALL_BYTES else self._large
        block = pool.smallest(size)
        if block is None:
            try:
                self.reserved += pool.grow(size, self.capacity - self.reserved)
            except CardIsFullError:
                self.reserved -= self._small.unmap_free_pages() + self._large.unmap_free_pages()
                self.reserved += pool.grow(size, self.capacity - self.reserved)
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            block = pool.smallest(size)
            assert block is not None
        pool.take(block, size)
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: _Block) -> None:
        """Frees the block of a tensor; its pages stay."""
        self.allocated -= block.size
        (self._small if block.size <= LARGEST_SMALL_BYTES else self._large).release(block)
