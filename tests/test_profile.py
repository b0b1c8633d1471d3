"""The device profile: what steps took on a card is kept, and scales the time of later plans, nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.memory import HostMemory, PlanRequest, RunPlan, make_plan, render_plan
from qwentune.memory.closed_form.roofline import step_seconds
from qwentune.memory.judge import judge, settings_of
from qwentune.memory.profile import Profile, find_profile, keep_profile, measured
from qwentune.memory.run_plan import calibrated
from qwentune.recipe import BatchOptions, MemoryOptions, OutputOptions, Precision, Tuning
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import write_recipe
from tests.warm import Warm

SPEC, CARD = model_spec("Qwen/Qwen3-8B"), gpu_spec("h200")
REQUEST = PlanRequest("lora", 2048, 16, optimizer_steps=1000)
PLAN = make_plan(SPEC, CARD, REQUEST)
SETTINGS = settings_of(
    PLAN, SPEC, tuning=Tuning(kind="lora"), max_tokens=2048, batch=BatchOptions(sequences_per_step=16), device=CARD
)
VERSIONS = {"torch": "2.13"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(factors: list[float], every: int = 1, tokens_per_row: int = 1000, first: int = 0) -> list[Any]:
    """What a run logs whose steps take so many times the roofline's seconds, one factor per logged time."""
    roofline = step_seconds(SPEC, replace(SETTINGS, max_tokens=tokens_per_row), CARD)
    return [
        {"step": first + every * k, "tokens": every * 16 * tokens_per_row, "seconds": every * factor * roofline}
        for k, factor in enumerate(factors, start=1)
    ]


def profile(**changes: Any) -> Profile:
    return replace(Profile(1, "h200", "lora", SPEC.id, 2.0, 40, "2026-01-01", VERSIONS), **changes)


@given(
    st.floats(0.1, 50), st.integers(1, 10), st.integers(16, 2048), st.integers(0, 1000), st.integers(9, 40), st.data()
)
def test_the_factor_of_a_run_is_found_whatever_it_logs_and_a_few_slow_steps_do_not_count(
    factor: float, every: int, tokens_per_row: int, first: int, count: int, data: st.DataObject
) -> None:
    factors = [100 * factor] * 4 + [factor] * count  # kernels are compiled in the first
    for slow in data.draw(st.sets(st.integers(4, count + 3), max_size=count // 2 - 1)):
        factors[slow] *= data.draw(st.sampled_from([0.2, 3, 1000]))  # an evaluation, a save
    found = measured(rows_of(factors, every, tokens_per_row, first), SPEC, SETTINGS, CARD)
    assert found is not None
    assert found[0] == pytest.approx(factor)
    assert 0 < found[1] < every * len(factors)


@given(st.floats(0.01, 100), st.sampled_from(["full", "lora", "qlora"]), st.integers(1, 10**6))
def test_a_calibrated_time_is_the_factor_times_the_roofline_and_no_choice_changes(
    factor: float, kind: Any, num_steps: int
) -> None:
    plan = make_plan(SPEC, CARD, replace(REQUEST, kind=kind))
    scaled = calibrated(plan, profile(kind=kind, factor=factor, num_steps=num_steps))
    assert plan.gpu_hours is not None
    assert scaled.gpu_hours == pytest.approx(factor * plan.gpu_hours)
    assert replace(scaled, gpu_hours=plan.gpu_hours, profile=None) == plan
    assert RunPlan.from_json(json.loads(json.dumps(scaled.to_json()))) == scaled


def judged(device: Any = CARD, kind: str = "lora") -> RunPlan:
    return judge(
        SPEC,
        tuning=Tuning.model_validate({"kind": kind}),
        max_tokens=2048,
        batch=BatchOptions(sequences_per_step=16),
        precision=Precision(),
        memory=MemoryOptions(),
        output=OutputOptions(dir="run"),
        device=device,
        num_ranks=1,
        optimizer_steps=1000,
    )


def test_a_later_plan_for_the_card_is_calibrated_by_what_a_run_on_it_took_and_says_so() -> None:
    bare = judged()
    assert "GPU-hours by the bare roofline" in " ".join(render_plan(bare, 36).split())
    keep_profile(rows_of([3.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)
    plan = judged()
    assert plan.gpu_hours == pytest.approx(3 * (bare.gpu_hours or 0))
    text = " ".join(render_plan(plan, 36).split())
    assert "GPU-hours calibrated by 40 measured steps of Qwen/Qwen3-8B on this card" in text
    assert plan.profile is not None
    assert (plan.profile.kind, plan.profile.versions) == ("lora", VERSIONS)
    for other in (judged(gpu_spec("rtx-4090")), judged(kind="qlora"), judged(HostMemory(2**38))):
        assert other.profile is None


def test_the_same_model_counts_before_a_newer_profile_of_another(cache: Path) -> None:
    small = model_spec("Qwen/Qwen3-0.6B")
    keep_profile(rows_of([3.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)
    keep_profile(rows_of([5.0] * 44), small, SETTINGS, CARD, VERSIONS)
    found = [find_profile(spec, "lora", CARD) for spec in (SPEC, small, model_spec("Qwen/Qwen3-4B"))]
    assert [each and each.model for each in found[:2]] == [SPEC.id, small.id]
    assert found[2] is not None
    keep_profile(rows_of([4.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)  # in the place of the first
    again = find_profile(SPEC, "lora", CARD)
    assert again is not None
    assert again.factor == pytest.approx(4)
    assert len(list(cache.rglob("*.json"))) == 2


@pytest.mark.parametrize(
    ("rows", "device"),
    [(rows_of([2.0] * 44), HostMemory(2**38)), (rows_of([2.0] * 7), CARD), ([], CARD), (rows_of([0.0] * 44), CARD)],
    ids=["no GPU", "too few steps", "none", "no time"],
)
def test_nothing_is_written_without_a_gpu_or_enough_steps(cache: Path, rows: list[Any], device: Any) -> None:
    keep_profile(rows, SPEC, SETTINGS, device, VERSIONS)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Invalid JSON"),
        ("[]", "Input should be"),
        ({"factor": -1}, "greater than 0"),
        ({"factor": "NaN"}, "finite number"),
        ({"factor": None}, "valid number"),
        ({"kind": "prefix"}, "'full', 'lora' or 'qlora'"),
        ({"roofline": 2}, "Input should be 1"),
        ({"device": "rtx-4090"}, "it is of the card rtx-4090"),
    ],
    ids=str,
)
def test_a_profile_that_is_damaged_or_of_another_card_is_ignored_in_words(
    cache: Path, capsys: pytest.CaptureFixture[str], content: str | dict[str, Any], why: str
) -> None:
    keep_profile(rows_of([3.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)
    path = next(cache.rglob("*.json"))
    whole = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps({**whole, **content}))
    assert find_profile(SPEC, "lora", CARD) is None
    said = capsys.readouterr().err
    assert f"{path} holds no times of h200 and is ignored" in said
    assert why in said
    keep_profile(rows_of([3.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)
    assert find_profile(SPEC, "lora", CARD) is not None


def test_a_cache_that_cannot_be_written_does_not_end_a_run(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    (cache / "profiles").write_text("a file in the way")
    keep_profile(rows_of([3.0] * 44), SPEC, SETTINGS, CARD, VERSIONS)
    assert "could not be kept for later plans" in capsys.readouterr().err
    assert find_profile(SPEC, "lora", CARD) is None


# Trains on the CPU, but takes it for a card.
ON_A_CARD = """
from dataclasses import replace
from qwentune import console, train
from qwentune.facts.gpus import gpu_spec
from qwentune.memory import judge
card = replace(gpu_spec("t4"), name="a CPU in disguise")
judge.device_of = lambda hardware, here: (card, 1, "auto")
console.main(train.train)
"""


@pytest.mark.slow
def test_a_run_on_a_card_leaves_a_profile_and_one_on_a_cpu_none(tmp_path: Path, warm: Warm, cache: Path) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 12}, hardware={"gpu": "cpu"})
    assert warm.train(recipe, QWENTUNE_CACHE=str(cache)).code == 0
    assert not list(cache.rglob("profiles"))
    run = warm.train(recipe, "--fresh", code=ON_A_CARD, QWENTUNE_CACHE=str(cache))
    assert run.code == 0, run.said
    kept = json.loads(next(cache.glob("profiles/a-cpu-in-disguise/full-*.json")).read_bytes())
    assert (kept["model"], kept["num_steps"]) == (str(model), 8)
    assert kept["factor"] > 0
