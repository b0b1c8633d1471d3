"""Rows: whole examples laid side by side, isolated from each other by what each token may see.

A row is a forest of token tries in depth-first order. `position_ids` is a token's depth, `visible_until[k]` the end of
its subtree, and token q sees token k iff `k <= q < visible_until[k]`. What is trained are triples of predictor, target
and weight. Here every example is a chain, so its tokens share one end and a token's predictor is its left neighbour.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of T tokens with N supervised positions.

    `input_ids`, `position_ids`, `visible_until`: int32, shape (T,). `predict_from`, `target`: int32, shape (N,);
    `weight`: float32, shape (N,).
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    visible_until: NDArray[np.int32]
    predict_from: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]


def pack(lengths: Sequence[int], tokens_per_row: int) -> list[list[int]]:
    """Indices of the examples of each row, best fit with the longest first; no example is cut.

    Every length is at most `tokens_per_row`. Rows stand in the order in which they were opened, so the result is a
    function of the lengths alone. Source: best-fit packing, https://huggingface.co/papers/2404.10830
    """
    rows: list[list[int]] = []
    rows_with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_with_space, sorted
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[example]
        assert length <= tokens_per_row, f"example {example} has {length} tokens, a row {tokens_per_row}"
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del rows_with_space[space], spaces[place]
            rows[row].append(example)
        else:
            space, row = tokens_per_row, len(rows)
            rows.append([example])
        left = space - length
        if left in rows_with_space:
            rows_with_space[left].append(row)
        else:
            rows_with_space[left] = [row]
            insort(spaces, left)
    return rows


def lay_out(examples: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]]) -> Packed:
    """The row that holds the given examples, each as its ids and its weights of equal length."""
    lengths = [len(ids) for ids, _ in examples]
    ends = np.cumsum(lengths, dtype=np.int32)
    input_ids = np.concatenate([ids for ids, _ in examples])
    weights = np.concatenate([weights for _, weights in examples])
    target_at = np.flatnonzero(weights)
    starts = ends - np.asarray(lengths, dtype=np.int32)
    assert not np.isin(target_at, starts).any(), "the first token of an example has no predictor"
    return Packed(
        input_ids=input_ids.astype(np.int32),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        visible_until=np.repeat(ends, lengths),
        predict_from=(target_at - 1).astype(np.int32),
        target=input_ids[target_at].astype(np.int32),
        weight=weights[target_at].astype(np.float32),
    )
