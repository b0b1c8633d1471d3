"""The times of a run: what was training, and what was not."""

from __future__ import annotations

import re
import time

from qwentune.training.times import Times


def test_what_is_no_training_is_told_apart() -> None:
    times = Times()
    assert times.told() == ""
    with times.spending("evaluating"):
        time.sleep(0.12)
    times.stepped()
    first = times.first_step
    assert first is not None
    assert first >= 0.12
    with times.spending("saving"):
        time.sleep(0.12)
    times.stepped()
    assert times.first_step == first, "the first step alone"
    assert 0.24 <= times.away == sum(times.spent.values())
    told = re.fullmatch(
        r"time  first step after .+ · steps after it (\d+\.\d) s · evaluating 0\.\d s · saving 0\.\d s", times.told()
    )
    assert told is not None
    assert float(told[1]) < 0.12, "saving is no step"


def test_time_that_ends_in_an_error_counts_too() -> None:
    times = Times()
    try:
        with times.spending("saving"):
            time.sleep(0.01)
            raise OSError
    except OSError:
        pass
    assert times.spent["saving"] >= 0.01
