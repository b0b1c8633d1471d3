"""What a card was measured to do: kept, read again, used by the plan, and what share of it a run reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.memory import PlanRequest, make_plan
from qwentune.memory.closed_form.limit import Limit, required_flops
from qwentune.memory.closed_form.roofline import bound, step_seconds
from qwentune.memory.judge import settings_of
from qwentune.memory.profile import find_profile, keep_profile
from qwentune.memory.rates import Rates, find_rates, keep_rates, with_rates
from qwentune.memory.settings import HostMemory, Settings
from qwentune.recipe import BatchOptions, Tuning
from qwentune.training.card import limit_of, measured_rates
from qwentune.training.heading import speed
from qwentune.training.progress import MetricsRow

SPEC, CARD = model_spec("Qwen/Qwen3-8B"), gpu_spec("h200")
BATCH = BatchOptions(sequences_per_step=16)
TUNING = Tuning(kind="lora", rank=16)
PLAN = make_plan(SPEC, CARD, PlanRequest("lora", 2048, 16, optimizer_steps=100))
SETTINGS = settings_of(PLAN, SPEC, tuning=TUNING, max_tokens=2048, batch=BATCH, device=CARD)
RATES = Rates(CARD.name, 700.0, 4000.0, 5.0, "2026-12-01T00:00:00+00:00", {"torch": "2.13"}, {SPEC.id: 600.0})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(kind: str) -> Settings:
    return replace(SETTINGS, kind=kind, rank=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "kind", "billions"),
    [
        ("Qwen/Qwen3-0.6B", "full", 4.3),
        ("Qwen/Qwen3-0.6B", "lora", 3.1),
        ("Qwen/Qwen3-8B", "full", 47.2),
        ("Qwen/Qwen3-8B", "lora", 32.3),
        ("Qwen/Qwen3-8B", "qlora", 32.3),
        ("Qwen/Qwen3-32B", "full", 198),
        ("Qwen/Qwen3-32B", "lora", 135),
    ],
)
def test_operations_of_a_token_at_2048_are_those_that_were_counted_by_hand(
    model: str, kind: str, billions: float
) -> None:
    assert required_flops(model_spec(model), settings(kind), 2048) / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_share_is_needed_operations_over_those_that_the_cards_could_have_done() -> None:
    limit = Limit.of(SPEC, SETTINGS, CARD, 700.0)
    assert limit is not None
    assert limit.is_measured
    at_once = 700e12 / required_flops(SPEC, SETTINGS, 2048)  # tokens in a second at the limit
    assert limit.share(2048 * 8, 8, 2048 * 8 / at_once) == pytest.approx(1)
    assert limit.share(2048 * 8, 16, 2048 * 8 / at_once) < 1, "shorter documents attend less"
    two = replace(limit, settings=replace(SETTINGS, num_ranks=2))
    assert two.share(2048 * 8, 8, 2048 * 8 / at_once) == pytest.approx(0.5)
    reckoned = Limit.of(SPEC, SETTINGS, CARD, None)
    assert reckoned is not None
    assert not reckoned.is_measured


def test_rates_are_read_as_they_were_kept_and_what_is_none_is_said(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_rates(CARD.name) is None
    assert with_rates(CARD, SPEC.id) == CARD
    keep_rates(RATES)
    assert find_rates(CARD.name) == RATES
    (file,) = (cache / "rates").iterdir()
    file.write_text('{"device": 1}')
    assert find_rates(CARD.name) is None
    assert f"{file} holds no rates of {CARD.name}" in capsys.readouterr().err


def test_a_plan_goes_by_measured_rates_and_factors_over_the_data_sheet_no_longer_count() -> None:
    rows: list[MetricsRow] = [
        {"step": step, "tokens": 16 * 2048, "seconds": 3 * step_seconds(SPEC, SETTINGS, CARD)} for step in range(1, 30)
    ]
    keep_profile(rows, SPEC, SETTINGS, CARD, {})
    assert find_profile(SPEC, "lora", CARD) is not None
    keep_rates(replace(RATES, date="2999-01-01T00:00:00+00:00"))
    assert find_profile(SPEC, "lora", CARD) is None
    slower = with_rates(CARD, SPEC.id)
    assert slower == with_rates(slower, SPEC.id)
    assert slower.bf16_tflops == pytest.approx(600 / 0.8), "the products of this model's layers"
    assert with_rates(CARD, "another").bf16_tflops == pytest.approx(700 / 0.8)
    assert step_seconds(SPEC, SETTINGS, slower) > step_seconds(SPEC, SETTINGS, CARD)


def test_what_is_measured_is_there_and_no_random_state_changes() -> None:
    before = torch.get_rng_state()
    tiny = model_spec("Qwen/Qwen3-0.6B")
    rates = measured_rates("a CPU", tiny, {}, torch.device("cpu"), square=64, tokens=8, row_lengths=(16,), copied=4096)
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.layer_tflops.keys() == {tiny.id}
    assert rates.attention_tflops.keys() == {"16"}
    assert min(rates.product_tflops, rates.copy_gb_per_second, rates.launch_microseconds) > 0
    keep_rates(rates)
    assert find_rates("a CPU") == rates


def test_what_bounds_a_step_and_its_share_are_said_on_a_card_alone() -> None:
    rows: list[MetricsRow] = [
        {"tokens_per_second": speed, "limit_share": speed / 20000} for speed in (9000.0, 10000.0, 50.0)
    ]
    limit = Limit.of(SPEC, SETTINGS, CARD, 700.0)
    said = speed(rows, limit, SPEC, SETTINGS, CARD)
    assert said.startswith("speed 9,000 tokens/s · 45% of the card's limit (700 TFLOP/s, measured) · bound by ")
    tiny = replace(SETTINGS, max_tokens=64, micro_batch=1)
    assert bound(model_spec("Qwen/Qwen3-0.6B"), tiny, CARD) == "launches of kernels"
    full = replace(SETTINGS, kind="full", max_tokens=16384, micro_batch=1)
    assert bound(model_spec("Qwen/Qwen3-32B"), full, CARD) == "matrix products"
    host = HostMemory(2**34)
    assert limit_of(SPEC, SETTINGS, host, {}) is None
    bare: list[MetricsRow] = [{"tokens_per_second": 10.0, "limit_share": None}]
    assert speed(bare, None, SPEC, SETTINGS, host) == "speed 10 tokens/s"
    assert speed([], None, SPEC, SETTINGS, host) == ""
