"""Which examples share a row: best-fit packing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


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
