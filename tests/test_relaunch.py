"""A run whose processes are fixed is refused with commands for the shell that launch what fits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qwentune.errors import DoesNotFitError
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.launch import sharding_of
from qwentune.facts.models import model_spec
from qwentune.memory import judge as judging
from qwentune.memory.trace import cross_check
from qwentune.recipe import load_recipe
from qwentune.train import Request, run
from qwentune.training import reports
from qwentune.training.ranks import ALLOCATOR
from tests.runs import write_recipe


def refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, card: str, model: str, num_ranks: int, **sections: Any
) -> tuple[Path, str]:
    """The recipe, and what such a run is told that `num_ranks` processes began on such cards."""
    monkeypatch.setattr(judging, "device_of", lambda hardware, here: (gpu_spec(card), 1, "auto"))
    monkeypatch.setattr(cross_check, "cross_checked", lambda spec, device, request, plan, tell: plan)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    recipe = write_recipe(folder, model, **sections)
    with pytest.raises(DoesNotFitError) as caught:
        run(Request(str(recipe), ("batch.sequences_per_step=8",)))
    return recipe, str(caught.value)


def commands(said: str) -> list[list[str]]:
    return [shlex.split(found) for found in re.findall(r"accelerate launch .*", said)]


@pytest.mark.parametrize(
    ("card", "model", "num_ranks"),
    [("rtx-4090", "Qwen/Qwen3-4B", 1), ("rtx-3060", "Qwen/Qwen3-1.7B", 2)],
)
def test_another_launch_is_a_command_whose_run_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: str, model: str, num_ranks: int
) -> None:
    recipe, said = refused(monkeypatch, tmp_path, card, model, num_ranks, data={"max_tokens": 2048})
    assert "hardware.launch" not in said
    found = commands(said)
    assert found
    for command in found:
        launcher, module = command[: command.index("-m")], command[command.index("-m") :]
        assert module[:4] == ["-m", "qwentune.train", str(recipe), "batch.sequences_per_step=8"]
        path, count = launcher[launcher.index("--config_file") + 1], int(launcher[-1])
        asked = load_recipe(recipe, module[3:]).recipe
        plan = judging.judge_recipe(
            model_spec(model),
            asked,
            device=gpu_spec(card),
            num_ranks=count,
            sharding=sharding_of(Path(path).stem),
        )
        assert plan.fits, command


def test_what_a_running_world_can_change_stays_an_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, said = refused(monkeypatch, tmp_path, "rtx-3060", "Qwen/Qwen3-1.7B", 2, data={"max_tokens": 2048})
    assert re.search(r": tuning\.kind=lora$|: precision\.optimizer_state=8bit$", said, re.MULTILINE), said


def test_under_the_supervisor_every_mend_is_an_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(reports.FOLDER, str(tmp_path))
    _, said = refused(monkeypatch, tmp_path, "rtx-4090", "Qwen/Qwen3-4B", 1, data={"max_tokens": 2048})
    assert not commands(said)
    assert ": hardware.launch=zero2-offload" in said
