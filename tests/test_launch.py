"""Launch files: what each shares among its processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qwentune import supervise
from qwentune.errors import UsageError
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.launch import sharding_of
from qwentune.facts.models import model_spec
from qwentune.facts.present import PresentGpus
from qwentune.memory import HostMemory, judge
from qwentune.memory.judge import device_of
from qwentune.recipe import Hardware, load_recipe
from qwentune.shipped import shipped_files
from qwentune.training import prerequisites
from qwentune.training.command_line import Request
from qwentune.training.ranks import ALLOCATOR, Ranks, expand_segments, launch_remarks
from tests.runs import write_recipe


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("single", "none"),
        ("ddp", "ddp"),
        ("zero1", "zero1"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
        ("zero2-offload", "zero2-offload"),
        ("zero3-offload", "zero3-offload"),
        ("fsdp2", "fsdp2"),
        ("cpu-2", "ddp"),
        ("cpu-zero2", "zero2"),
    ],
)
def test_the_plan_knows_what_a_launch_file_does(name: str, sharding: str) -> None:
    assert sharding_of(name) == sharding
    assert f"launch/{name}.yaml" in shipped_files("launch")


def test_an_unknown_launch_file_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"(?s)'zerro2'.*Did you mean 'zero2'"):
        sharding_of("zerro2")


@pytest.mark.parametrize(
    ("hardware", "num_gpus", "count"),
    [
        ({"launch": "cpu-2"}, 0, 2),
        ({"launch": "cpu-2", "count": 3}, 0, 3),  # what the recipe says outweighs the file
        ({"launch": "zero2"}, 0, 2),
        ({"launch": "zero2"}, 8, 8),  # it takes all that are here
        ({"launch": "mine"}, 8, 4),
        ({"launch": "mine", "count": 2}, 8, 2),
        ({"launch": "single"}, 8, 1),
        ({}, 8, 8),
        ({}, 0, 1),
    ],
)
def test_the_number_of_processes_is_the_recipe_s_else_the_launch_file_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: dict[str, Any], num_gpus: int, count: int
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    monkeypatch.chdir(tmp_path)
    cards = PresentGpus((gpu_spec("h200"),) * num_gpus) if num_gpus else None
    monkeypatch.setattr(judge, "present_gpus", lambda: cards)
    assert device_of(Hardware(**hardware), here=True)[1] == count


def test_one_process_and_a_number_of_several_contradict_each_other() -> None:
    with pytest.raises(UsageError, match=r"4, but launch/single\.yaml runs one process"):
        device_of(Hardware(gpu="cpu", launch="single", count=4), here=True)


@pytest.mark.parametrize("number", ["0", "many", "true", "-1", "1000000000"])
def test_a_number_of_processes_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text(f"distributed_type: MULTI_GPU\nnum_processes: {number}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="num_processes is"):
        sharding_of("mine")


def test_a_launcher_that_does_otherwise_than_the_recipe_is_named() -> None:
    one = Ranks(0, 1, "none")
    assert launch_remarks(Hardware(), one) == []
    assert launch_remarks(Hardware(launch="cpu-2"), Ranks(0, 2, "ddp")) == []
    (said,) = launch_remarks(Hardware(launch="cpu-2"), one)
    assert said.startswith("warning: hardware.launch is cpu-2, but this run was launched with none")
    (said,) = launch_remarks(Hardware(count=4), Ranks(0, 2, "ddp"))
    assert said.startswith("warning: hardware.count is 4, but this run was launched with 2")


def test_a_launch_file_of_ones_own_that_says_nothing_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text("distributed_type: TPU\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="TPU"):
        sharding_of("mine")


@pytest.mark.parametrize(
    "options",
    [
        "deepspeed_config_file: own.json",
        "zero_stage: 0",
        "zero_stage: 1\n  offload_optimizer_device: cpu",
        "zero_stage: 3\n  offload_param_device: cpu",
    ],
)
def test_what_the_plan_cannot_reckon_is_refused_in_the_file_and_in_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  {options}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="zero_stage is"):
        sharding_of("mine")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for option in options.split("\n"):
        name, _, value = option.strip().partition(": ")
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", value)
    with pytest.raises(UsageError, match="zero_stage is"):
        Ranks.of_environment()


def test_deepspeed_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "find_spec", lambda _: None)
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3")
    with pytest.raises(UsageError, match=r"zero2\.yaml needs DeepSpeed(?s:.*)pip install 'qwentune\[deepspeed\]'"):
        supervise.run(Request(str(recipe), ("hardware.launch=zero2",)))


def test_one_rank_may_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    for name, value in told.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert Ranks.of_environment() == Ranks(0, 1, "zero2-offload")


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_tells_the_allocator_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in ALLOCATOR:
        monkeypatch.delenv(variable, raising=False)
    expand_segments()
    assert {os.environ.pop(variable) for variable in ALLOCATOR} == {"expandable_segments:True"}
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    expand_segments()
    assert [os.environ.get(variable) for variable in ALLOCATOR if variable != name] == [None]
    assert os.environ[name] == "garbage_collection_threshold:0.8"


def test_a_stored_plan_of_two_processes_is_judged_for_the_one_that_is_started(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "builtin:tiny-qwen3")).recipe
    spec, host = model_spec(recipe.model), HostMemory(2**36)
    two = judge.judge_recipe(spec, recipe, device=host, num_ranks=2, sharding="auto")
    one = judge.judge_recipe(spec, recipe, device=host, num_ranks=1, sharding="auto", stored=two.to_json())
    again = judge.judge_recipe(spec, recipe, device=host, num_ranks=2, sharding="auto", stored=one.to_json())
    assert [plan.choices.sharding for plan in (two, one, again)] == ["ddp", "none", "ddp"]
