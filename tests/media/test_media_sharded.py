"""Models that see or hear under FSDP2: frozen towers stay whole on each rank, and the run is that of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.media.checkpoints import MediaType
from tests.media.test_media_resume import write_rows_and_model
from tests.runs import write_recipe
from tests.test_one_mathematics import farthest, metric
from tests.warm import Warm

NUM_STEPS = 8


def started(warm: Warm, folder: Path, place: str, model: Path, *overrides: str, launch: str | None = None) -> Any:
    """A finished run in a folder of its own, one example a row, so that some ranks' rows show nothing."""
    (folder / place).mkdir(exist_ok=True)
    recipe = write_recipe(
        folder / place,
        model,
        data={"train": str(folder / "rows.jsonl"), "max_tokens": 256, "packing": False},
        batch={"micro_batch": 1, "sequences_per_step": 2},
        optimizer={"max_steps": NUM_STEPS, "learning_rate": 1e-4},
        precision={"weights": "fp32"},
        output={"dir": str(folder / place / "run"), "save_every_steps": 2},
    )
    return warm.train(recipe, *overrides, launch=launch)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("qwen3_vl", "qwen3_vl_moe", "qwen2_audio")),
    ],
)
def test_a_run_spread_over_two_ranks_is_that_of_one_process_also_after_a_stop(
    tmp_path: Path, warm: Warm, name: MediaType, kind: str
) -> None:
    model, tuning = write_rows_and_model(tmp_path, name), f"tuning.kind={kind}"
    without_media(tmp_path / "rows.jsonl")
    alone = started(warm, tmp_path, "alone", model, tuning)
    assert alone.code == 0, alone.said
    whole = started(warm, tmp_path, "whole", model, tuning, launch="fsdp2")
    assert whole.code == 0, whole.said
    for key, apart in (("loss", 1e-5), ("grad_norm", 1e-4), ("update_ratio", 1e-3)):
        one, other = (metric(tmp_path / place / "run", key) for place in ("whole", "alone"))
        assert farthest(one, other) < apart, key

    half = started(warm, tmp_path, "half", model, tuning, "optimizer.max_steps=4", launch="fsdp2")
    assert half.code == 0, half.said
    (tmp_path / "half/run/model").rename(tmp_path / "half/of_four_steps")
    rest = started(warm, tmp_path, "half", model, tuning, "--allow-change", "optimizer.max_steps", launch="fsdp2")
    assert rest.code == 0, rest.said
    assert metric(tmp_path / "half/run", "loss")[4:] == metric(tmp_path / "whole/run", "loss")[4:]


def without_media(rows: Path) -> None:
    """Takes the media from every other row."""
    kept: list[str] = []
    for k, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        for message in row["messages"] if k % 2 else ():
            if not isinstance(message["content"], str):
                message["content"] = "".join(part.get("text", "") for part in message["content"])
        kept.append(json.dumps(row) + "\n")
    rows.write_text("".join(kept))


@pytest.mark.slow
def test_towers_that_are_trained_or_spread_by_deepspeed_are_refused(tmp_path: Path, warm: Warm) -> None:
    model = write_rows_and_model(tmp_path, "qwen2_5_vl")
    for launch, overrides, why in (
        ("fsdp2", ["tuning.merger=trained"], "stay whole, so they cannot be trained"),
        ("zero2", [], "not spread by DeepSpeed"),
    ):
        refused = started(warm, tmp_path, launch, model, *overrides, launch=launch)
        assert refused.code == 2, refused.said
        assert why in refused.said
