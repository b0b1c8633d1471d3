"""The model of torch's allocator, the replay of a step through it, and the trace's last word about a plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qwentune.facts.gpus import GpuSpec, gpu_spec
from qwentune.facts.launch import Sharding
from qwentune.facts.models import config_of, model_spec
from qwentune.memory.plan_request import PlanRequest
from qwentune.memory.run_plan import make_plan
from qwentune.memory.settings import GIB, MIB
from qwentune.memory.trace.allocator import LARGE_PAGE_BYTES, SMALL_PAGE_BYTES, Allocator, CardIsFullError
from qwentune.memory.trace.cross_check import cross_checked
from qwentune.memory.trace.meta_step import meta_step, recorded_step, traced_peak
from qwentune.memory.trace.replay import depth, record, replay
from qwentune.memory.trace.stand_ins import no_autocast
from tests.test_trace import SETTINGS, tiny

STEP = replace(SETTINGS, weights="bf16", attention="flex_attention", micro_batch=1, max_tokens=1024)


def test_small_tensors_share_pages_of_2_mib_and_large_ones_of_20() -> None:
    allocator = Allocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved == SMALL_PAGE_BYTES
    allocator.allocate(3 * MIB)
    assert allocator.reserved == SMALL_PAGE_BYTES + LARGE_PAGE_BYTES
    allocator.allocate(30 * MIB)  # what is left of the first page counts
    assert allocator.reserved == SMALL_PAGE_BYTES + 2 * LARGE_PAGE_BYTES


def test_a_tensor_takes_the_smallest_hole_that_holds_it() -> None:
    allocator = Allocator()
    large, _, small, _ = (allocator.allocate(size * MIB) for size in (12, 4, 6, 18))
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(5 * MIB).start == 16 * MIB
    assert allocator.allocate(5 * MIB).start == 0
    assert allocator.reserved == 2 * LARGE_PAGE_BYTES


def test_neighbouring_holes_are_one() -> None:
    allocator = Allocator()
    blocks = [allocator.allocate(10 * MIB) for _ in range(4)]
    for k in (0, 2, 1):
        allocator.release(blocks[k])
    assert allocator.allocate(30 * MIB).start == 0


def test_a_full_card_gets_the_whole_pages_of_its_holes_back() -> None:
    allocator = Allocator(capacity=3 * LARGE_PAGE_BYTES)
    hole = allocator.allocate(30 * MIB)
    allocator.allocate(20 * MIB)
    allocator.release(hole)
    allocator.allocate(30 * MIB)  # the hole
    with pytest.raises(CardIsFullError):
        allocator.allocate(11 * MIB)
    assert allocator.allocate(10 * MIB).start == 50 * MIB

    allocator = Allocator(capacity=2 * LARGE_PAGE_BYTES)
    holes = [allocator.allocate(20 * MIB) for _ in range(2)]
    allocator.release(holes[0])
    allocator.allocate(MIB)  # a page of the other pool
    assert allocator.reserved == LARGE_PAGE_BYTES + SMALL_PAGE_BYTES


@given(st.lists(st.one_of(st.integers(1, 60 * MIB), st.integers(1, MIB), st.floats(0, 1)), max_size=120), st.booleans())
@settings(deadline=None)
def test_tensors_never_overlap_and_no_more_is_reserved_than_the_card_has(
    requests: list[int | float], is_bounded: bool
) -> None:
    """A whole number asks for so many bytes, a fraction releases the tensor at that place."""
    capacity = 200 * MIB if is_bounded else None
    allocator, alive = Allocator(capacity), []
    for request in requests:
        if isinstance(request, int):
            try:
                alive.append(allocator.allocate(request))
            except CardIsFullError:
                assert capacity is not None
                pages = SMALL_PAGE_BYTES if request <= MIB else LARGE_PAGE_BYTES
                assert allocator.reserved + request + pages > capacity
        elif alive:
            allocator.release(alive.pop(int(request * (len(alive) - 1))))
        for pool in (True, False):
            blocks = sorted((b.start, b.start + b.size) for b in alive if (b.size <= MIB) == pool)
            assert all(end <= start for (_, end), (start, _) in pairwise(blocks))
        assert allocator.allocated == sum(block.size for block in alive) <= allocator.reserved
        assert capacity is None or allocator.reserved <= capacity


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen/Qwen3-8B", {}),
        ("Qwen/Qwen3-8B", {"gradient_checkpointing": 18}),
        ("Qwen/Qwen3-8B", {"gradient_checkpointing": False, "attention": "sdpa"}),
        ("Qwen/Qwen2.5-7B", {"kind": "qlora", "loss": "full"}),
        ("Qwen/Qwen3-8B", {"adapters": "bf16", "rank": 64}),
        ("Qwen/Qwen3-0.6B", {"kind": "full"}),
        ("Qwen/Qwen3-0.6B", {"kind": "full", "optimizer_state": "8bit", "accumulation": 2}),
        ("Qwen/Qwen3-0.6B", {"kind": "full", "max_tokens": 64}),
        ("Qwen/Qwen3-30B-A3B", {}),
    ],
    ids=str,
)
def test_the_replayed_tensors_are_those_of_the_trace(name: str, changes: dict[str, Any]) -> None:
    step = replace(STEP, **changes)
    allocator = replay(*recorded_step(model_spec(name), step))
    assert allocator.peak_allocated == pytest.approx(traced_peak(model_spec(name), step).allocated, rel=1e-4)
    assert allocator.peak_reserved < 1.25 * allocator.peak_allocated + 100 * MIB


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_four_layers_of_a_kind_stand_for_all(kind: str) -> None:
    spec, step = replace(tiny("Qwen/Qwen3-8B"), num_layers=14), replace(STEP, kind=kind, gradient_checkpointing=8)
    config = AutoConfig.for_model(**config_of(spec))
    with no_autocast():
        whole = record(meta_step(config, step, 8, 6), 8)
    expected, found = replay(whole, range(14)), replay(*recorded_step(spec, step))
    assert found.peak_allocated == expected.peak_allocated
    assert found.peak_reserved == expected.peak_reserved


def test_the_layers_between_the_second_and_the_last_are_like_the_third() -> None:
    assert depth(7, 5) == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 6, 7]
    assert depth(2, 0) == [0, 1]
    assert depth(0, 5) == [0, 1, 2, 2, 3]


SPEC = model_spec("Qwen/Qwen3-0.6B")
REQUEST = PlanRequest(kind="lora", max_tokens=4096, sequences_per_step=1, headroom=0.0)


def card(num_bytes: int) -> GpuSpec:
    return replace(gpu_spec("rtx-4090"), total_bytes=num_bytes)


def test_a_plan_that_only_the_closed_form_refuses_fits() -> None:
    large, pinned, said = card(40 * GIB), replace(REQUEST, gradient_checkpointing=False), list[str]()
    closed = make_plan(SPEC, large, pinned)
    traced = cross_checked(SPEC, large, pinned, closed, said.append)
    assert "by the trace" in said[0]
    between = card((closed.phases["train_step"].total + traced.phases["train_step"].total) // 2)
    closed = make_plan(SPEC, between, pinned)
    traced = cross_checked(SPEC, between, pinned, closed, said.append)
    assert (closed.fits, traced.fits, traced.mends) == (False, True, ())
    assert traced.peak_bytes == traced.phases["train_step"].total <= traced.usable_bytes == between.total_bytes


def test_where_the_trace_refuses_the_next_fastest_plan_is_taken() -> None:
    """As if the closed form had missed a part of what keeping all activations takes."""
    everything_kept = make_plan(SPEC, card(40 * GIB), REQUEST)
    small = card(everything_kept.peak_bytes * 9 // 10)
    too_large = replace(everything_kept, usable_bytes=small.total_bytes)
    assert too_large.choices.gradient_checkpointing is False
    plan = cross_checked(SPEC, small, REQUEST, too_large, lambda _: None)
    assert plan.fits
    assert 0 < plan.choices.gradient_checkpointing < SPEC.num_layers
    assert 0.85 * small.total_bytes < plan.peak_bytes <= plan.usable_bytes == small.total_bytes


def test_where_nothing_fits_the_refusal_has_mends() -> None:
    tiny_card, pinned = card(3 * GIB), replace(REQUEST, gradient_checkpointing=False)
    plan = cross_checked(SPEC, tiny_card, pinned, make_plan(SPEC, tiny_card, pinned), lambda _: None)
    assert not plan.fits
    assert plan.mends


@pytest.mark.parametrize("sharding", ["zero2-offload", "fsdp2"])
def test_the_trace_has_what_sharding_changes_from_the_closed_form(sharding: Sharding) -> None:
    request = replace(REQUEST, kind="full", sequences_per_step=2, num_gpus=2, sharding=sharding)
    said = list[str]()
    closed = make_plan(SPEC, card(40 * GIB), request)
    traced = cross_checked(SPEC, card(40 * GIB), request, closed, said.append)
    assert ["by the trace" in line for line in said] == [True]
    planned, found = (plan.phases["train_step"] for plan in (closed, traced))
    assert found != planned
    assert found.total == pytest.approx(planned.total, rel=0.03)
    assert found.terms["optimizer"] == pytest.approx(planned.terms["optimizer"], abs=MIB)  # counters of steps


def test_a_closed_form_that_is_wrong_is_called_a_bug() -> None:
    device, said = card(40 * GIB), list[str]()
    plan = make_plan(SPEC, device, REQUEST)
    step = plan.phases["train_step"]
    wrong = replace(step, terms=step.terms | {"activations": step.terms["activations"] // 2})
    cross_checked(SPEC, device, REQUEST, replace(plan, phases=plan.phases | {"train_step": wrong}), said.append)
    assert "a bug of qwentune" in said[1]
