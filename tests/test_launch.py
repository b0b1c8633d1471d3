"""Launch files: what each shares among its processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwentune.errors import UsageError
from qwentune.facts.launch import sharding_of
from qwentune.shipped import shipped_files


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("single", "none"),
        ("ddp", "ddp"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
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
