"""Rows of tokens: what each may see, and what is predicted from it.

A row is a forest in depth-first order, a tree for each dialogue: examples that begin alike share the nodes of their
beginning. `position_ids` is a token's depth and `visible_until[k]` the end of its subtree; token q sees token k iff
`k <= q < visible_until[k]`, so it sees the example it stands in, up to itself, and nothing else. A token is predicted
from its parent, which need not be its left neighbour. An example alone is a tree without branches: plain packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwentune.data.layout.media_table import RunMedia

Example: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]  # its ids, and the loss weight of each


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of T tokens in trees, with N supervised positions.

    `input_ids`, `position_ids`, `visible_until`: int32, shape (T,). `predict_from`, `target`: int32, shape (N,);
    `weight`: float32, shape (N,). `trees`: in order the size of each, and whether it branches (1) or is a chain (0).
    `media` are the numbers of the media in the order of their pads, which are negative ids. `positions`, int32, shape
    (3, T), are those of a model whose positions have a time, a row and a column; None: they are the depths.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    visible_until: NDArray[np.int32]
    predict_from: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]
    trees: tuple[tuple[int, int], ...]
    media: tuple[int, ...] = ()
    positions: NDArray[np.int32] | None = None


def lay_out(tries: Sequence[Sequence[Example]], media: RunMedia | None = None) -> Packed:
    """The row of the given groups of examples, a tree for each group; `media` are those that the ids are pads of."""
    trees = [_tree(examples, media) for examples in tries]
    sizes = [len(tree.input_ids) for tree in trees]
    starts = np.cumsum([0, *sizes[:-1]])

    def joined(name: str, shift: bool = False) -> NDArray[np.int32]:
        parts = [getattr(tree, name) + (start if shift else 0) for tree, start in zip(trees, starts, strict=True)]
        return np.concatenate(parts).astype(np.int32)

    input_ids, positions = joined("input_ids"), [tree.positions for tree in trees if tree.positions is not None]
    return Packed(
        input_ids=input_ids,
        position_ids=joined("position_ids"),
        visible_until=joined("visible_until", shift=True),
        predict_from=joined("predict_from", shift=True),
        target=joined("target"),
        weight=np.concatenate([tree.weight for tree in trees]).astype(np.float32),
        trees=tuple(size for tree in trees for size in tree.trees),
        media=() if media is None else media.order(input_ids),
        positions=np.concatenate(positions, axis=1) if positions else None,
    )


def _tree(examples: Sequence[Example], media: RunMedia | None) -> Packed:
    """The trie of some examples: sorted, each begins with what it shares with the one before it, and with no more."""
    ordered = sorted(examples, key=lambda example: example[0].astype(">i4").tobytes())
    visible_until = np.zeros(sum(len(ids) for ids, _ in ordered), dtype=np.int32)
    path = np.zeros(max(len(ids) for ids, _ in ordered), dtype=np.int32)  # where the tokens of the example stand
    nodes: list[NDArray[np.int32]] = []
    depths: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int32]] = []
    triples: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
    size = 0
    previous = np.empty(0, dtype=np.int32)
    for ids, weights in ordered:
        shared = _num_common(previous, ids)
        visible_until[path[shared : len(previous)]] = size  # the subtrees that end where this example branches off
        path[shared : len(ids)] = np.arange(size, size + len(ids) - shared)
        nodes.append(ids[shared:])
        depths.append(np.arange(shared, len(ids), dtype=np.int32))
        if media is not None and media.has_axes:
            positions.append(media.positions(ids)[:, shared:])
        size += len(ids) - shared
        trained = np.flatnonzero(weights)
        assert not len(trained) or trained[0] > 0, "the first token of an example has no predictor"
        triples.append((path[trained - 1], ids[trained], weights[trained]))
        previous = ids
    visible_until[path[: len(previous)]] = size
    predict_from, target, weight = (np.concatenate(parts) for parts in zip(*triples, strict=True))
    return Packed(
        input_ids=np.concatenate(nodes),
        position_ids=np.concatenate(depths),
        visible_until=visible_until[:size],
        predict_from=predict_from,
        target=target,
        weight=weight,
        trees=((size, int((visible_until[:size] < size).any())),),
        positions=np.concatenate(positions, axis=1) if positions else None,
    )


def _num_common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length
