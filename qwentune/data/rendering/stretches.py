"""Token ids as stretches of sequences that the turns of a dialogue share, so that no beginning is copied for each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

Run: TypeAlias = tuple[list[int], int, int]  # ids, and the two places between which they are meant
_FIRST_COMPARED = 64  # ids; most sequences that part do so soon


class Tokens:
    """The ids of some runs, one after the other."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = [run for run in runs if run[1] < run[2]]
        self.ends = list(accumulate(stop - start for _, start, stop in self.runs))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, place: int) -> int:
        return self.ids(place, place + 1)[0]

    def ids(self, start: int, stop: int) -> list[int]:
        """The ids at the places `start` to `stop`."""
        found: list[int] = []
        for ids, first, last in self._runs(start, stop):
            found += ids[first:last]
        return found

    def num_common(self, other: Tokens, start: int, stop: int) -> int:
        """Up to which place, at most `stop`, both are the same from `start` on."""
        ours, theirs = self._runs(start, stop), other._runs(start, stop)
        one, another = next(ours, None), next(theirs, None)
        place = start
        while one is not None and another is not None:
            size = min(one[2] - one[1], another[2] - another[1])
            is_shared = one[0] is another[0] and one[1] == another[1]
            same = size if is_shared else _num_same(one, another, size)
            place += same
            if same < size:
                break
            one, another = _rest(one, size) or next(ours, None), _rest(another, size) or next(theirs, None)
        return place

    def _runs(self, start: int, stop: int) -> Iterator[Run]:
        for k in range(bisect_right(self.ends, start), len(self.runs)):
            ids, first, last = self.runs[k]
            begin = self.ends[k] - (last - first)
            if begin >= stop:
                return
            yield ids, first + max(0, start - begin), min(last, first + stop - begin)


@dataclass(slots=True)
class _Node:
    """A place where sequences part, or where one ends: `tokens`, of which the first `end` ids lead there."""

    tokens: Tokens
    end: int
    children: dict[int, _Node] = field(default_factory=dict[int, "_Node"])
    latest: int = 0  # the last sequence that leads through it, where that is not the last of all


class Beginnings:
    """Which earlier sequence each one begins most alike: a trie, entered where the last sequence is left."""

    def __init__(self) -> None:
        self.last = Tokens(())
        self.num_added = 0
        self.path = [_Node(self.last, 0)]  # from the root to the end of the last sequence

    def add(self, tokens: Tokens) -> tuple[int, int]:
        """How many ids an earlier sequence has as well, at most, and how many sequences back the last such one is."""
        shared, back = tokens.num_common(self.last, 0, min(len(tokens), len(self.last))), 1
        while self.path[-1].end > shared:
            self.path.pop().latest = self.num_added - 1
        if self.path[-1].end < shared:
            self._part(self.last, shared)
        elif shared < len(tokens):
            while child := self.path[-1].children.get(tokens[shared]):
                shared = tokens.num_common(child.tokens, shared, min(len(tokens), child.end))
                back = self.num_added - child.latest
                if shared < child.end:
                    self._part(child.tokens, shared)
                    break
                self.path.append(child)
                if shared == len(tokens):
                    break
        if shared < len(tokens):
            self.path[-1].children[tokens[shared]] = _Node(tokens, len(tokens))
            self.path.append(self.path[-1].children[tokens[shared]])
        self.last, self.num_added = tokens, self.num_added + 1
        return shared, back

    def _part(self, tokens: Tokens, end: int) -> None:
        """Lets sequences part at `end`, between the end of the path and the node that `tokens` lead to from there."""
        parent, first = self.path[-1], tokens[self.path[-1].end]
        node = _Node(tokens, end, {tokens[end]: parent.children[first]})
        parent.children[first] = node
        self.path.append(node)


def _rest(run: Run, size: int) -> Run | None:
    """What is left of a run after its first `size` ids."""
    ids, start, stop = run
    return (ids, start + size, stop) if start + size < stop else None


def _num_same(one: Run, other: Run, size: int) -> int:
    """How many of the first `size` ids of two runs are the same."""
    (ours, first, _), (theirs, second, _) = one, other
    low, high = 0, min(size, _FIRST_COMPARED)
    while ours[first + low : first + high] == theirs[second + low : second + high]:  # quicker than id by id
        if high == size:
            return size
        low, high = high, min(size, 3 * high)
    return next((k for k in range(low, high) if ours[first + k] != theirs[second + k]), high)
