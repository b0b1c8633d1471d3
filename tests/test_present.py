"""What a machine has by the driver's word: free memory beats the table, and odd answers are no bugs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from qwentune.errors import UsageError
from qwentune.facts import present
from qwentune.facts.gpus import GpuSpec, gpu_spec
from qwentune.facts.models import model_spec
from qwentune.facts.present import present_gpus
from qwentune.memory import HostMemory
from qwentune.memory.device_remarks import ecc_remark, rates_remark, spill_remark
from qwentune.memory.judge import device_of, judge
from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Tuning

RTX_4090 = "0, GPU-a, NVIDIA GeForce RTX 4090, 24564, 9000, 8.9, Disabled, [N/A]"


def driver(monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: str) -> None:
    """Puts an nvidia-smi on the path that answers with these rows, or with a file of the folder for -L and -q -x."""
    program = folder / "nvidia-smi"
    rows_asked = "\n".join(rows)
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"-L) cat {folder}/listed;; -q) cat {folder}/details.xml;;\n*) cat <<'END'\n{rows_asked}\nEND\n;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_free_memory_of_a_gpu_that_is_here_beats_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, RTX_4090, "1, GPU-b, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9, [N/A], [N/A]")
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes, found.count) == ("rtx-4090", 9000 * 2**20, 2)
    for name in ("rtx-4090", "RTX 4090"):
        device, count, _ = device_of(Hardware(gpu=name, count=1), here=False)
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
    driver(monkeypatch, tmp_path, f"0, GPU-a, NVIDIA GB10, {said}, {said}, 12.1, [N/A], [N/A]")
    monkeypatch.setattr(present, "free_host_bytes", lambda: 100 * 2**30)
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes) == ("NVIDIA GB10", 100 * 2**30)
    assert "those of rtx-4090 are assumed" in rates_remark(found.spec)


LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)
  MIG 3g.20gb     Device  0: (UUID: MIG-1-a)
  MIG 1g.5gb      Device  1: (UUID: MIG-2-b)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b)
"""
DETAILS = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><gpu id="00000000:07:00.0"><uuid>GPU-a</uuid>
<fb_memory_usage><total>40960 MiB</total><free>N/A</free></fb_memory_usage><mig_devices>
<mig_device>
<index>0</index><fb_memory_usage><total>20096 MiB</total><free>19000 MiB</free></fb_memory_usage></mig_device>
<mig_device>
<index>1</index><fb_memory_usage><total>4864 MiB</total><free>4800 MiB</free></fb_memory_usage></mig_device>
</mig_devices></gpu></nvidia_smi_log>
"""
SLICED = (
    "0, GPU-a, NVIDIA A100-SXM4-40GB, 40960, [N/A], 8.0, Enabled, Enabled",
    "1, GPU-b, NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, Enabled, Disabled",
)


@pytest.mark.parametrize(
    ("visible", "name", "free_mib", "count"),
    [
        (None, "a100-40gb MIG 3g.20gb", 19000, 1),
        ("MIG-2", "a100-40gb MIG 1g.5gb", 4800, 1),
        ("0", "a100-40gb MIG 3g.20gb", 19000, 1),
        ("1", "a100-40gb", 40000, 1),
    ],
)
def test_of_a_gpu_that_is_cut_into_slices_a_process_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, name: str, free_mib: int, count: int
) -> None:
    driver(monkeypatch, tmp_path, *SLICED)
    (tmp_path / "listed").write_text(LISTED)
    (tmp_path / "details.xml").write_text(DETAILS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes, found.count) == (name, free_mib * 2**20, count)
    whole, part = gpu_spec("a100-40gb"), {"3g.20gb": 3 / 7, "1g.5gb": 1 / 7}.get(name.split()[-1], 1)
    assert found.spec.fp32_tflops == pytest.approx(whole.fp32_tflops * part)


@pytest.mark.parametrize("details", ["", DETAILS.replace("MiB", "units")])
def test_a_slice_whose_memory_nobody_tells_has_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, details: str
) -> None:
    driver(monkeypatch, tmp_path, *SLICED)
    (tmp_path / "listed").write_text(LISTED)
    (tmp_path / "details.xml").write_text(details)
    found = present_gpus()
    assert found is not None
    assert found.spec.total_bytes == 20 * 10**9 < 20096 * 2**20


def test_a_gpu_that_is_cut_into_no_slice_yet_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, SLICED[0])
    (tmp_path / "listed").write_text(LISTED.splitlines()[0] + "\n")
    assert present_gpus() is None


def test_ecc_is_said_where_it_takes_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, "0, GPU-a, NVIDIA RTX A6000, 46068, 45000, 8.6, Enabled, [N/A]")
    found = present_gpus()
    assert found is not None
    assert "ECC is on" in ecc_remark(found.spec)
    assert "44.43 GiB" in ecc_remark(gpu_spec("rtx-6000-ada")), "the table's row is one with ECC on"
    assert not ecc_remark(gpu_spec("rtx-4090"))
    driver(monkeypatch, tmp_path, SLICED[1])
    stacked = present_gpus()
    assert stacked is not None
    assert not ecc_remark(stacked.spec), "ECC takes nothing of stacked memory"


def test_a_full_gpu_under_windows_is_said_to_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not spill_remark(gpu_spec("rtx-4090"))
    monkeypatch.setattr("platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert "spills" in spill_remark(gpu_spec("rtx-4090"))


@pytest.mark.parametrize(
    ("attention", "weights", "device", "words"),
    [
        ("flash_attention_2", "auto", gpu_spec("t4"), "fp32"),
        ("flash_attention_2", "fp32", gpu_spec("h200"), "fp32"),
        ("flash_attention_2", "bf16", gpu_spec("t4"), "t4 has 7.5"),
        ("flash_attention_2", "bf16", HostMemory(2**36), "trains on a GPU only"),
        ("flex_attention", "auto", gpu_spec("t4"), "needs compute capability 8.0 (Ampere), and t4 has 7.5"),
        ("flex_attention", "auto", HostMemory(2**36), "trains on a GPU only"),
    ],
)
def test_an_attention_kernel_that_does_not_run_is_refused_before_weights_are_read(
    tmp_path: Path, attention: Any, weights: Any, device: GpuSpec | HostMemory, words: str
) -> None:
    step: dict[str, Any] = {"tuning": Tuning(kind="lora"), "max_tokens": 1024, "batch": BatchOptions(), "num_ranks": 1}
    step |= {"output": OutputOptions(dir=str(tmp_path)), "precision": Precision(weights=weights), "device": device}
    with pytest.raises(UsageError, match=r"memory\.attention.*" + re.escape(words)):
        judge(model_spec("Qwen/Qwen3-0.6B"), memory=MemoryOptions(attention=attention), **step)
    assert judge(model_spec("Qwen/Qwen3-0.6B"), memory=MemoryOptions(), **step).choices.attention in (
        ("sdpa",) if isinstance(device, HostMemory) or device.name == "t4" else ("flex_attention",)
    )


def test_torch_still_refuses_flex_attention_on_a_cpu() -> None:
    query = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(query, query, query)
