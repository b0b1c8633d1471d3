"""The learning rate rises over the warm-up, peaks at 1 and falls to its floor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune.recipe import OptimizerOptions
from qwentune.training.learning_rate import learning_rate_factor, learning_rate_of

schedules = st.sampled_from(["cosine", "linear", "wsd", "constant"])


@given(schedules, st.integers(1, 200), st.integers(0, 50), st.integers(0, 200), st.floats(0, 1))
def test_it_rises_to_one_and_never_leaves_its_bounds(
    schedule: str, num_steps: int, warmup: int, decay: int, floor: float
) -> None:
    settings = {"num_steps": num_steps, "num_warmup_steps": warmup, "num_decay_steps": decay}
    factors = [learning_rate_factor(k, **settings, schedule=schedule, min_factor=floor) for k in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors[: max(1, min(warmup, num_steps))])
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(min(floor, 1) <= factor <= 1 for factor in factors[warmup:])
    if warmup < num_steps:
        assert factors[warmup] == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_ends_at_the_floor(schedule: str) -> None:
    optimizer = OptimizerOptions(schedule=schedule, min_learning_rate=2e-5)  # a tenth of the peak
    assert learning_rate_of(optimizer, 100)(100) == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_until_the_last_steps() -> None:
    optimizer = OptimizerOptions(schedule="wsd", warmup_fraction=None, warmup_steps=4, decay_fraction=0.2)
    factors = [learning_rate_of(optimizer, 20)(k) for k in range(20)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1] * 13, 0.75, 0.5, 0.25])


def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them() -> None:
    share = OptimizerOptions(schedule="constant", warmup_fraction=0.1)
    number = OptimizerOptions(schedule="constant", warmup_fraction=None, warmup_steps=10)
    for optimizer, longer in ((share, 20), (number, 10)):
        assert learning_rate_of(optimizer, 100)(9) == pytest.approx(10 / 11)
        assert learning_rate_of(optimizer, 200)(9) == pytest.approx(10 / (longer + 1))
    none = OptimizerOptions(schedule="constant", warmup_fraction=None, warmup_steps=0)
    assert learning_rate_of(none, 100)(0) == 1
