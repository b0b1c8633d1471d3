"""Launch files: what each shares among its processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwentune import supervise
from qwentune.errors import UsageError
from qwentune.facts.launch import sharding_of
from qwentune.shipped import shipped_files
from qwentune.training.ranks import ALLOCATOR, Ranks, expand_segments
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
    monkeypatch.setattr(supervise, "find_spec", lambda _: None)
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3")
    with pytest.raises(UsageError, match=r"zero2\.yaml needs DeepSpeed(?s:.*)pip install 'qwentune\[deepspeed\]'"):
        supervise.run(str(recipe), ["hardware.launch=zero2"], [], False, False, False)


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
