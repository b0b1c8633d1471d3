"""The rows of a dataset: which examples make one tree, and which trees share a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwentune.data.layout.media_table import RunMedia
from qwentune.data.layout.pack import pack
from qwentune.data.layout.row_media import RowMedia, row_media
from qwentune.data.layout.store import Examples
from qwentune.data.layout.trie import Packed, lay_out

Trie: TypeAlias = tuple[int, ...]  # indices of the examples whose tokens make one tree


@dataclass(frozen=True)
class Rows:
    """The rows that a model is given: packed ones, or one example each.

    A row's members are groups of examples, each of which becomes one tree. Rows stand in blocks of `per_epoch`, one for
    each version of the examples. `media` are those that the examples show; None: they show none.
    """

    examples: Examples
    members: tuple[tuple[Trie, ...], ...]
    per_epoch: tuple[int, ...]
    media: RunMedia | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> Packed:
        return lay_out([[self.examples.tokens(i) for i in trie] for trie in self.members[row]], self.media)

    def examples_of(self, row: int) -> list[int]:
        """The indices of the examples in a row."""
        return [i for trie in self.members[row] for i in trie]

    @cached_property
    def trained_weights(self) -> list[float]:
        """The sum of loss weights of each row."""
        sums = self.examples.trained_weights
        return [float(sum(sums[i] for i in self.examples_of(row))) for row in range(len(self))]

    @cached_property
    def num_tokens(self) -> list[int]:
        """The number of tokens of each row."""
        return [sum(trie_size(self.examples, trie) for trie in tries) for tries in self.members]

    @cached_property
    def num_trained(self) -> list[int]:
        """The number of supervised tokens of each row."""
        counts = self.examples.num_trained
        return [int(sum(counts[i] for i in self.examples_of(row))) for row in range(len(self))]

    @cached_property
    def shown(self) -> list[RowMedia]:
        """What each row shows of pictures, videos and sounds."""
        return [row_media(self.media, self._tokens(row)) for row in range(len(self))]

    def _tokens(self, row: int) -> Iterator[NDArray[np.int32]]:
        """The tokens of a row's trees, shared ones once."""
        for first, *others in self.members[row]:
            yield self.examples.ids(first)
            yield from (self.examples.ids(i)[int(self.examples.shared[i]) :] for i in others)

    def trained_weight(self, row: int) -> float:
        """The sum of loss weights of a row: what its step is divided by."""
        return self.trained_weights[row]


def packed_rows(
    examples: Examples, chosen: Sequence[int], tokens_per_row: int, shares_prefixes: bool
) -> list[tuple[Trie, ...]]:
    """The members of full rows; examples that begin alike are one tree where the rows are to share prefixes."""
    tries = group_by_prefix(examples, chosen, tokens_per_row) if shares_prefixes else [(i,) for i in chosen]
    packed = pack([trie_size(examples, trie) for trie in tries], tokens_per_row)
    return [tuple(tries[k] for k in row) for row in packed]


def group_by_prefix(examples: Examples, chosen: Sequence[int], tokens_per_row: int) -> list[Trie]:
    """The examples in groups that share their beginnings and fit into a row; the next group repeats them."""
    tries: list[list[int]] = []
    sizes: list[int] = []
    groups: list[int] = []  # of each chosen example
    for k, i in enumerate(chosen):
        length, shared, back = examples.length(i), int(examples.shared[i]), int(examples.back[i])
        is_near = shared > 0 and k >= back and chosen[k - back] == i - back  # and of the same repetition
        group = groups[k - back] if is_near else -1
        if group >= 0 and sizes[group] + length - shared <= tokens_per_row:
            tries[group].append(i)
            sizes[group] += length - shared
        else:
            group = len(tries)
            tries.append([i])
            sizes.append(length)
        groups.append(group)
    return [tuple(trie) for trie in tries]


def trie_size(examples: Examples, trie: Trie) -> int:
    """The tokens of the tree that a group of examples makes."""
    first, *others = trie
    return examples.length(first) + sum(examples.length(i) - int(examples.shared[i]) for i in others)
