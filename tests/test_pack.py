"""Rows hold whole examples, lose none, and say for every token what it may see and what it predicts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwentune.data.pack import pack
from qwentune.data.trie import lay_out


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_every_example_stands_in_exactly_one_row_and_no_row_overflows(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    totals = sorted(sum(lengths[i] for i in row) for row in pack(lengths, 64))
    assert len(totals) < 2 or totals[0] + totals[1] > 64


def example(length: int, first_trained: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    weights = np.zeros(length, dtype=np.float32)
    weights[first_trained:] = 1.5
    return np.arange(start, start + length, dtype=np.int32), weights


@given(st.lists(st.tuples(st.integers(2, 20), st.integers(1, 19)), min_size=1, max_size=8))
def test_a_target_is_predicted_from_its_left_neighbour_in_the_same_example(shapes: list[tuple[int, int]]) -> None:
    examples = [example(length, first, 100 * k) for k, (length, first) in enumerate(shapes)]
    row = lay_out([[example] for example in examples])
    owner = np.concatenate([np.full(len(ids), k) for k, (ids, _) in enumerate(examples)])
    assert np.array_equal(row.target, row.input_ids[row.predict_from + 1])
    assert np.array_equal(owner[row.predict_from], owner[row.predict_from + 1])
    assert len(row.target) == sum(max(0, length - first) for length, first in shapes)
    assert (row.weight == 1.5).all()


def test_a_token_sees_what_stands_before_it_in_its_example_and_nothing_else() -> None:
    row = lay_out([[example(3, 1, 0)], [example(2, 1, 10)]])
    tokens = range(5)
    sees = [[bool(k <= q < row.visible_until[k]) for k in tokens] for q in tokens]
    assert sees == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, True, True],
    ]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
