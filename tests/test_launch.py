"""Launch files: what each shares among its processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwentune.errors import UsageError
from qwentune.facts.launch import sharding_of
from qwentune.shipped import shipped_files
from qwentune.training.ranks import ALLOCATOR, expand_segments


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("single", "none"),
        ("ddp", "ddp"),
        ("zero1", "zero1"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
        ("fsdp2", "fsdp2"),
        ("cpu-2", "ddp"),
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
