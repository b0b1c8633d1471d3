"""The learning rate rises over the warm-up, peaks at 1 and falls to its floor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune.training.learning_rate import learning_rate_factor

schedules = st.sampled_from(["cosine", "linear", "constant"])


@given(schedules, st.integers(1, 200), st.integers(0, 50), st.floats(0, 1))
def test_it_rises_to_one_and_never_leaves_its_bounds(schedule: str, num_steps: int, warmup: int, floor: float) -> None:
    factors = [
        learning_rate_factor(k, num_steps=num_steps, num_warmup_steps=warmup, schedule=schedule, min_factor=floor)
        for k in range(num_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors[: max(1, min(warmup, num_steps))])
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(min(floor, 1) <= factor <= 1 for factor in factors[warmup:])
    if warmup < num_steps:
        assert factors[warmup] == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_ends_at_the_floor(schedule: str) -> None:
    factor = learning_rate_factor(100, num_steps=100, num_warmup_steps=10, schedule=schedule, min_factor=0.1)
    assert factor == pytest.approx(0.1)
