"""Models that see or hear under FSDP2: frozen towers stay whole on each rank, and the run is that of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwentune.facts.towers import SPREAD
from tests.media.checkpoints import TYPES, MediaType
from tests.media.test_media_resume import write_rows_and_model
from tests.runs import KILL_AT, final_weights, last_states, loss_history, write_recipe
from tests.test_one_mathematics import farthest, metric
from tests.warm import Warm


def written(folder: Path, name: MediaType, kind: str) -> Path:
    """A recipe of one example a row; every other row shows nothing."""
    model = write_rows_and_model(folder, name)
    without_media(folder / "rows.jsonl")
    return write_recipe(
        folder,
        model,
        tuning={"kind": kind},
        data={"max_tokens": 256, "packing": False},
        batch={"micro_batch": 1, "sequences_per_step": 2},
        optimizer={"max_steps": 8, "learning_rate": 1e-4},
        precision={"weights": "fp32"},
        output={"save_every_steps": 4},
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.soak) for name in TYPES if name in SPREAD[2:] or name == SPREAD[0]),
    ],
)
@pytest.mark.fault("A01 E34", "a model that sees, spread by FSDP2, killed and started again: the same, bit for bit")
def test_a_run_spread_over_two_ranks_is_that_of_one_process_also_when_it_was_killed(
    tmp_path: Path, warm: Warm, name: MediaType, kind: str
) -> None:
    recipe, run = written(tmp_path, name, kind), tmp_path / "run"
    alone = warm.train(recipe, f"output.dir={tmp_path / 'alone'}")
    assert alone.code == 0, alone.said
    whole = warm.train(recipe, launch="fsdp2")
    assert whole.code == 0, whole.said
    for key, apart in (("loss", 1e-5), ("grad_norm", 1e-4), ("update_ratio", 1e-3)):
        assert farthest(metric(run, key), metric(tmp_path / "alone", key)) < apart, key

    undisturbed = loss_history(run), final_weights(run), last_states(run)
    run.rename(tmp_path / "undisturbed")
    assert warm.train(recipe, code=KILL_AT, given=["5"], launch="fsdp2").code != 0
    resumed = warm.train(recipe, launch="fsdp2")
    assert resumed.code == 0, resumed.said
    assert "from step 4" in resumed.said
    assert (loss_history(run), final_weights(run), last_states(run)) == undisturbed


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
