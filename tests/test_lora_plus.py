"""LoRA+: the B matrices learn that many times as fast; a killed run ends like an undisturbed one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from qwentune.model.adapters import add_adapters
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from qwentune.training.step import ExactStep
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import KILL_AT, KILLED, final_weights, last_states, loss_history, write_recipe
from tests.warm import Warm


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_step_moves_the_b_matrices_by_the_ratio(tmp_path: Path, ratio: float) -> None:
    model = load_model(add_weights(write_checkpoint(tmp_path, "qwen3")), dtype="fp32")
    adapted = add_adapters(model, Tuning(kind="lora", rank=2), "fp32")
    arguments = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999)
    trainer = SimpleNamespace(
        model=adapted, args=arguments, eight_bit=False, shards=None, lora_plus_ratio=ratio, part_rates={},
        get_decay_parameter_names=lambda model: Trainer.get_decay_parameter_names(None, model),
    )  # fmt: skip
    optimizer = ExactStep.create_optimizer(trainer)  # type: ignore[arg-type]
    before = {name: each.detach().clone() for name, each in adapted.named_parameters() if each.requires_grad}
    for each in adapted.parameters():
        each.grad = torch.ones_like(each) if each.requires_grad else None
    optimizer.step()
    moved = {name: (before[name] - each.detach()).max() for name, each in adapted.named_parameters() if name in before}
    assert len(moved) > 2
    for name, distance in moved.items():
        assert float(distance) == pytest.approx(1e-3 * (ratio if "lora_B" in name else 1), rel=1e-3), name
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the first group's is the one that is logged"


@pytest.mark.fault(
    "A01", "the B matrices' own learning rate is there again after a kill; it changes only where allowed"
)
@pytest.mark.slow
def test_a_killed_run_goes_on_with_both_learning_rates(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path, model, tuning={"kind": "lora", "rank": 4}, output={"save_every_steps": 4},
        optimizer={"max_steps": 8, "lora_plus_ratio": 16, "schedule": "wsd", "decay_fraction": 0.5, "warmup_steps": 2},
    )  # fmt: skip
    run = tmp_path / "run"
    assert warm.train(recipe).code == 0
    whole = loss_history(run), final_weights(run), last_states(run)
    assert [row[2] for row in whole[0]] == pytest.approx([1e-3 * k for k in (1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5, 0.25)])
    run.rename(tmp_path / "whole")
    assert warm.train(recipe, code=KILL_AT, given=["5"]).code == KILLED
    without = warm.train(recipe, "optimizer.lora_plus_ratio=null", "--allow-change", "optimizer")
    assert (without.code, "in a run that has begun" in without.said) == (5, True), without.said
    resumed = warm.train(recipe)
    assert resumed.code == 0, resumed.said
    assert "from step 4" in resumed.said
    assert (loss_history(run), final_weights(run), last_states(run)) == whole

    run.rename(tmp_path / "resumed")
    assert warm.train(recipe, code=KILL_AT, given=["5"]).code == KILLED
    slower = warm.train(recipe, "optimizer.lora_plus_ratio=2", "--allow-change", "optimizer.lora_plus_ratio")
    assert slower.code == 0, slower.said
    assert loss_history(run)[:4] == whole[0][:4]
    assert all(now[4] < then[4] for now, then in zip(loss_history(run)[4:], whole[0][4:], strict=True))
