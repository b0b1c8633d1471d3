"""Which rows a step takes depends on seed and step alone, and every row is seen once an epoch."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qwentune.data.layout.schedule import Schedule
from qwentune.recipe import OptimizerOptions, OutputOptions

counts = st.integers(1, 40)


@given(counts, counts, st.integers(1, 4), st.integers(0, 9))
def test_whole_epochs_see_every_row_equally_often(num_rows: int, per_step: int, epochs: int, seed: int) -> None:
    schedule = Schedule((num_rows,), per_step, seed, float(epochs), None)
    seen = Counter(row for step in range(schedule.num_steps) for row in schedule.rows(step))
    assert seen == dict.fromkeys(range(num_rows), epochs)


@given(counts, counts, st.integers(1, 30), st.integers(0, 9))
def test_max_steps_are_all_full_and_epochs_follow_each_other(n: int, per_step: int, steps: int, seed: int) -> None:
    schedule = Schedule((n,), per_step, seed, None, steps)
    stream = [row for step in range(schedule.num_steps) for row in schedule.rows(step)]
    assert len(stream) == steps * per_step
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(counts, counts, st.integers(0, 9))
def test_a_step_is_the_same_whatever_was_asked_before(num_rows: int, per_step: int, seed: int) -> None:
    schedule = Schedule((num_rows,), per_step, seed, None, 5)
    forward = [schedule.rows(step) for step in range(5)]
    assert [schedule.rows(step) for step in reversed(range(5))] == forward[::-1]


@given(st.lists(counts, min_size=1, max_size=4), counts, st.floats(0.01, 9))
def test_a_period_in_epochs_ends_with_the_step_that_completes_it(
    blocks: list[int], per_step: int, epochs: float
) -> None:
    schedule = Schedule(tuple(blocks), per_step, 0, 100.0, None)
    output = OutputOptions(save_every_epochs=epochs, eval_every_steps=7)
    (steps,) = schedule.periods(output).values()
    assert steps == Schedule(tuple(blocks), per_step, 0, epochs, None).num_steps
    assert schedule.remarks(OptimizerOptions(), output) == [f"output.save_every_epochs: every {steps} steps"]


def test_a_warm_up_longer_than_the_run_is_said() -> None:
    schedule = Schedule((100,), 10, 0, 3.0, None)
    assert "not fewer than the 30" in schedule.remarks(OptimizerOptions(warmup_steps=30), OutputOptions())[0]
    assert not schedule.remarks(OptimizerOptions(warmup_steps=29), OutputOptions())


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(Schedule((30,), 30, seed, 1.0, None).rows(0)) for seed in range(5)}
    assert len(orders) == 5


@given(st.lists(counts, min_size=1, max_size=4), counts, st.integers(1, 9), st.integers(0, 9))
def test_epochs_take_the_blocks_in_turn(blocks: list[int], per_step: int, epochs: int, seed: int) -> None:
    schedule = Schedule(tuple(blocks), per_step, seed, float(epochs), None)
    stream = [row for step in range(schedule.num_steps) for row in schedule.rows(step)]
    for epoch in range(epochs):
        block = epoch % len(blocks)
        start = sum(blocks[:block])
        seen, stream = stream[: blocks[block]], stream[blocks[block] :]
        assert sorted(seen) == list(range(start, start + blocks[block]))
    assert not stream
