"""What has changed since the checkpoint is refused with a table, or truly applied where it is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import KILL_AT, KILLED, loss_history, write_recipe
from tests.warm import TRAIN, Warm

pytestmark = pytest.mark.slow


def stopped_run(warm: Warm, folder: Path, **sections: object) -> Path:
    """The recipe of a run that was killed after step 8, its last checkpoint at step 5."""
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    recipe = write_recipe(folder, model, optimizer={"max_steps": 12}, output={"save_every_steps": 5}, **sections)
    assert warm.train(recipe, code=KILL_AT, given=["8"]).code == KILLED
    return recipe


@pytest.mark.fault("F38 K78", "a table of key, then, now and what it means; exit 5; nothing is touched")
def test_every_change_is_named_with_what_was_what_is_and_what_it_means(tmp_path: Path, warm: Warm) -> None:
    recipe = stopped_run(warm, tmp_path)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[10:]) + "\n")
    (tmp_path / "model" / "chat_template.jinja").open("a").write("{# new #}")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    refused = warm.train(recipe, "optimizer.learning_rate=1e-5", "seed=3")
    assert refused.code == 5, refused.said
    lines = [line.split() for line in refused.said.splitlines()]
    table = {line[0]: line for line in lines if "then" in line and "now" in line}
    assert {"optimizer.learning_rate", "seed", "data", "template"} <= table.keys()
    assert table["seed"][:5] == ["seed", "then", "17", "now", "3"]
    assert table["optimizer.learning_rate"][1:5] == ["then", "0.001", "now", "1e-05"]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path for path in before if before[path] != after[path]} <= {tmp_path / "run" / ".lock"}


@pytest.mark.fault("F38", "a change allowed with --allow-change counts from the next step on")
def test_an_allowed_learning_rate_is_used_from_the_next_step_on(tmp_path: Path, warm: Warm) -> None:
    recipe = stopped_run(warm, tmp_path)
    changed = ("optimizer.learning_rate=2e-3", "optimizer.weight_decay=0.1")
    allowed = ("--allow-change", "optimizer.learning_rate", "--allow-change", "optimizer.weight_decay")
    resumed = warm.train(recipe, *changed, *allowed)
    assert resumed.code == 0, resumed.said
    rates = [row[2] for row in loss_history(tmp_path / "run")]
    recipe_anew = write_recipe(tmp_path, tmp_path / "model", optimizer={"max_steps": 12}, output={"dir": "anew"})
    anew = warm.train(recipe_anew, "optimizer.learning_rate=2e-3", f"output.dir={tmp_path / 'anew'}")
    assert anew.code == 0, anew.said
    doubled = [row[2] for row in loss_history(tmp_path / "anew")]
    assert [2 * rate for rate in rates[:5]] == pytest.approx(doubled[:5])
    assert rates[5:] == doubled[5:]


@pytest.mark.fault("F38", "alpha and dropout can be changed and count; a rank, targets, a variant cannot: exit 5")
def test_of_an_adapter_what_can_be_changed_is_and_the_rest_is_refused(tmp_path: Path, warm: Warm) -> None:
    recipe = stopped_run(warm, tmp_path, tuning={"kind": "lora", "rank": 4, "alpha": 8})
    fixed = {"tuning.rank": "8", "tuning.targets": "[q_proj]", "tuning.variant": "dora", "tuning.kind": "qlora",
             "precision.optimizer_state": "8bit"}  # fmt: skip
    overrides = [f"{key}={value}" for key, value in fixed.items()]
    allowed = [argument for key in fixed for argument in ("--allow-change", key)]
    refused = warm.train(recipe, *overrides, *allowed)
    assert refused.code == 5, refused.said
    final = {line.split()[0] for line in refused.said.splitlines() if line.endswith("in a run that has begun")}
    assert final == {"tuning.rank", "tuning.targets", "tuning.variant", "plan.optimizer_state"}
    assert "accept it" not in refused.said

    changed = ("tuning.alpha=80", "tuning.dropout=0.5")
    resumed = warm.train(recipe, *changed, "--allow-change", "tuning")
    assert resumed.code == 0, resumed.said
    assert "changed tuning.alpha: then 8, now 80" in resumed.said
    assert loss_history(tmp_path / "run")[5:] != loss_history_without_a_change(warm, tmp_path)[5:]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 80, 0.5)


def loss_history_without_a_change(warm: Warm, folder: Path) -> list[tuple[float, ...]]:
    assert warm.train(folder / "recipe.yaml", f"output.dir={folder / 'same'}").code == 0
    return loss_history(folder / "same")


@pytest.mark.fault("F38", "more steps for a finished run are a change that can be allowed")
def test_a_finished_run_goes_on_where_its_steps_are_raised(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen2"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 6, "schedule": "constant", "warmup_fraction": 0.0})
    assert warm.train(recipe).code == 0
    first = loss_history(tmp_path / "run")
    assert warm.train(recipe, "optimizer.max_steps=10").code == 5
    longer = warm.train(recipe, "optimizer.max_steps=10", "--allow-change", "optimizer.max_steps")
    assert longer.code == 0, longer.said
    rows = loss_history(tmp_path / "run")
    assert rows[:6] == first
    assert [row[0] for row in rows] == list(range(1, 11))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 10


HUGE = """
import torch
from qwentune.training.trainer import ExactResume
step = ExactResume.training_step
def with_huge_weights(self, model, *args, **kwargs):
    if self.state.global_step == 2:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "up_proj" in name or "down_proj" in name:
                    weight.fill_(1e25)
    return step(self, model, *args, **kwargs)
ExactResume.training_step = with_huge_weights
"""


@pytest.mark.fault("G43", "the step, its rows and the first layer that is not finite, exit 6; weights are those before")
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_weights(
    tmp_path: Path, warm: Warm, log_every: int
) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, output={"save_every_steps": 1, "log_every_steps": log_every})
    ended = warm.train(recipe, code=HUGE + TRAIN)
    assert ended.code == 6, ended.said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit"]) == ("failed", 6)
    problem = ended.said[ended.said.rindex("step ") :]
    assert "not finite: the " in problem
    assert "rows.jsonl:" in problem
    bad = int(problem.split()[1])
    saved = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert bad == 3
    assert saved[-1] < bad, "a step that was left out is no progress to save"
    if (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(row[1] == row[1] for row in loss_history(tmp_path / "run")), "no NaN is ever written as a loss"
