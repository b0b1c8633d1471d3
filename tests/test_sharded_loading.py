"""FSDP2 reads each rank's own rows, ZeRO-3 one tensor after another: no rank ever holds the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.runs import final_weights, loss_history, write_recipe
from tests.test_hybrid_walk import write_hybrid
from tests.warm import Warm

PROVE = """
import sys; from pathlib import Path; from tests.sharded import prove
prove(int(sys.argv[1]), Path(sys.argv[2]))
"""
ZERO3 = PROVE.replace("Path(sys.argv[2])", "Path(sys.argv[2]), zero3=True")


@pytest.mark.parametrize(
    ("model_type", "tied", "num_ranks"),
    [
        ("qwen3", False, 2),
        ("qwen2", True, 2),
        ("qwen3_moe", False, 2),
        ("qwen3_moe", False, 6),  # of which two have no expert
    ],
)
def test_shards_are_the_rows_of_the_whole_weights(
    tmp_path: Path, warm: Warm, model_type: ModelType, tied: bool, num_ranks: int
) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", model_type, tied=tied))
    run = warm.train(model, code=PROVE, given=[str(num_ranks)])
    assert run.code == 0, run.said


def test_shards_of_a_hybrid_with_a_vision_tower_are_the_rows_of_its_decoder(tmp_path: Path, warm: Warm) -> None:
    run = warm.train(write_hybrid(tmp_path / "model"), code=PROVE, given=["2"])
    assert run.code == 0, run.said


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        pytest.param("qwen3", False, marks=pytest.mark.soak),
        pytest.param("qwen2", True, marks=pytest.mark.soak),
        pytest.param("qwen3_moe", False, marks=pytest.mark.slow),
    ],
)
def test_zero3_shares_the_weights_out_while_it_loads(
    tmp_path: Path, warm: Warm, model_type: ModelType, tied: bool
) -> None:
    run = warm.train(add_weights(write_checkpoint(tmp_path / "model", model_type, tied=tied)), code=ZERO3, given=["2"])
    assert run.code == 0, run.said


@pytest.mark.parametrize(
    ("model_type", "tied", "eos", "tuning"),
    [
        pytest.param("qwen2", True, "<|im_end|>", {"kind": "full"}, marks=pytest.mark.soak),
        pytest.param(  # the second rank has no row of A
            *("qwen3_moe", False, "<|im_end|>", {"kind": "lora", "rank": 1, "alpha": 8}), marks=pytest.mark.soak
        ),
        # Here the rows of chat tokens are trained too, and the norms of whole matrices.
        pytest.param(
            *("qwen2", True, "<|endoftext|>", {"kind": "lora", "rank": 4, "alpha": 8, "variant": "dora"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_sharded_ranks_train_like_one_process(
    tmp_path: Path, warm: Warm, model_type: ModelType, tied: bool, eos: str, tuning: dict[str, Any]
) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", model_type, tied=tied, eos=eos))
    recipe = write_recipe(tmp_path, model, tuning=tuning, optimizer={"max_steps": 4}, batch={"micro_batch": 1})
    alone = warm.train(recipe, f"output.dir={tmp_path / 'alone'}")
    assert alone.code == 0, alone.said
    together = warm.train(recipe, launch="fsdp2")
    assert together.code == 0, together.said
    losses = [row[1] for row in loss_history(tmp_path / "run")]
    assert losses == pytest.approx([row[1] for row in loss_history(tmp_path / "alone")], rel=1e-5)
    assert final_weights(tmp_path / "run").keys() == final_weights(tmp_path / "alone").keys()
