"""What a machine has by the driver's word: free memory beats the table, and odd answers are no bugs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwentune.errors import UsageError
from qwentune.facts import present
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.facts.present import present_gpus
from qwentune.memory.judge import device_of, judge, spill_remark
from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Tuning

RTX_4090 = "0, GPU-a, NVIDIA GeForce RTX 4090, 24564, 9000, 8.9"


def driver(monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: str) -> None:
    """Puts an nvidia-smi on the path that answers with these rows."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_free_memory_of_a_gpu_that_is_here_beats_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, RTX_4090, "1, GPU-b, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9")
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes, found.count) == ("rtx-4090", 9000 * 2**20, 2)
    device, count, _ = device_of(Hardware(gpu="rtx-4090", count=1), here=False)
    assert (device, count) == (found.spec, 1)
    other, _, _ = device_of(Hardware(gpu="h200"), here=False)
    assert other == gpu_spec("h200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    alone = present_gpus()
    assert alone is not None
    assert (alone.spec.total_bytes, alone.count) == (24000 * 2**20, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert present_gpus() is None


@pytest.mark.parametrize("said", ["[N/A]", "[Not Supported]"])
def test_a_gpu_that_shares_the_hosts_memory_is_judged_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    driver(monkeypatch, tmp_path, f"0, GPU-a, NVIDIA GB10, {said}, {said}, 12.1")
    monkeypatch.setattr(present, "free_host_bytes", lambda: 100 * 2**30)
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes) == ("NVIDIA GB10", 100 * 2**30)


def test_a_full_gpu_under_windows_is_said_to_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not spill_remark(gpu_spec("rtx-4090"))
    monkeypatch.setattr("platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert "spills" in spill_remark(gpu_spec("rtx-4090"))


@pytest.mark.parametrize(("gpu", "weights"), [("t4", "auto"), ("h200", "fp32")])
def test_flash_attention_in_fp32_is_refused_before_weights_are_read(tmp_path: Path, gpu: str, weights: Any) -> None:
    with pytest.raises(UsageError, match=r"memory\.attention.*fp32"):
        judge(
            model_spec("Qwen/Qwen3-0.6B"),
            tuning=Tuning(kind="lora"),
            max_tokens=1024,
            batch=BatchOptions(),
            precision=Precision(weights=weights),
            memory=MemoryOptions(attention="flash_attention_2"),
            output=OutputOptions(dir=str(tmp_path)),
            device=gpu_spec(gpu),
            num_ranks=1,
        )
