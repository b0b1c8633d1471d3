"""Machines as they are met: without nvidia-smi, without a compiler, with other cards than torch has code for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwentune import supervise
from qwentune.errors import UsageError
from qwentune.facts import flex, present
from qwentune.facts.gpus import GpuSpec, gpu_spec
from qwentune.facts.models import model_spec
from qwentune.facts.present import ORDER, count_cards_by_bus, present_gpus
from qwentune.memory import HostMemory
from qwentune.memory.device_remarks import attention_remark, dtype_remark, remarks
from qwentune.memory.judge import device_of, judge
from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Tuning
from qwentune.training.command_line import Request
from qwentune.training.device import refuse_other_device, runs
from qwentune.training.ranks import Ranks
from tests.runs import write_recipe
from tests.test_present import RTX_4090, driver
from tests.warm import Warm

A100 = "0, GPU-a, NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, Enabled, Disabled"
T4 = "1, GPU-b, Tesla T4, 15360, 14900, 7.5, Enabled, [N/A]"
QWEN = model_spec("Qwen/Qwen3-0.6B")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One that has nothing of its own, and asks torch anew."""
    present._seen_by_torch.cache_clear()
    for name in ("CUDA_VISIBLE_DEVICES", ORDER, "CC", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    yield
    present._seen_by_torch.cache_clear()


def answers(folder: Path, script: str) -> None:
    """Puts an nvidia-smi on the path that runs this script of a shell."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def torch_sees(monkeypatch: pytest.MonkeyPatch, folder: Path, *cards: tuple[str, int, int, tuple[int, int]]) -> Path:
    """Another torch for child processes, which sees these cards; the file that it leaves once it was imported."""
    home, mark = folder / "torch-home", folder / "imported"
    home.mkdir()
    (home / "torch.py").write_text(f"""
from pathlib import Path
from types import SimpleNamespace
Path({str(mark)!r}).write_text(__import__("os").environ["{ORDER}"])
cards = {cards!r}
def properties(number):
    name, total, _, (major, minor) = cards[number]
    return SimpleNamespace(name=name, total_memory=total, major=major, minor=minor)
cuda = SimpleNamespace(
    device_count=lambda: len(cards), get_device_properties=properties, mem_get_info=lambda i: (cards[i][2], 0)
)
""")
    monkeypatch.setenv("PYTHONPATH", f"{home}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(present, "may_have_gpu", lambda: True)
    return mark


GIB = 2**30
SEEN_4090 = ("NVIDIA GeForce RTX 4090", 24 * GIB, 20 * GIB, (8, 9))
UNKNOWN = 'case "$1" in *compute_cap*) echo Field is not valid; exit 2;; esac\n'


@pytest.mark.parametrize(
    "script",
    [None, "sleep 20", "echo Driver/library version mismatch; exit 18", "echo No devices were found", "exit 0"],
    ids=["missing", "slow", "failing", "sees none", "silent"],
)
def test_where_nvidia_smi_does_not_tell_torch_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None
) -> None:
    if script is not None:
        answers(tmp_path, script)
    monkeypatch.setattr(present, "DRIVER_SECONDS", 0.5)
    torch_sees(monkeypatch, tmp_path, SEEN_4090)
    device, count, _ = device_of(Hardware(), here=True)
    assert isinstance(device, GpuSpec)
    assert (device.name, device.total_bytes, device.compute_capability, count) == ("rtx-4090", 20 * GIB, (8, 9), 1)
    assert device.is_here


def test_a_machine_without_a_gpu_never_starts_torch_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = torch_sees(monkeypatch, tmp_path, SEEN_4090)
    monkeypatch.setattr(present, "may_have_gpu", lambda: False)
    assert present_gpus() is None
    monkeypatch.setattr(present, "may_have_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert present_gpus() is None
    assert not mark.exists()


def test_a_torch_that_fails_sees_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch_sees(monkeypatch, tmp_path)
    (tmp_path / "torch-home" / "torch.py").write_text("raise ImportError('libcudart.so.12')")
    assert present_gpus() is None


def test_a_driver_that_does_not_know_every_field_is_asked_for_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = torch_sees(monkeypatch, tmp_path, SEEN_4090)
    answers(tmp_path, f"{UNKNOWN}echo {', '.join(T4.split(', ')[:5])!r}")
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.total_bytes) == ("t4", 14900 * 2**20)
    assert found.spec.compute_capability == (7, 5)
    assert not mark.exists(), "the table knows the rest"
    answers(tmp_path, f"{UNKNOWN}echo '0, GPU-a, NVIDIA RTX 9090, 40960, 40000'")
    assert present_gpus() is not None
    assert mark.exists(), "of a card that the table does not know torch knows more"


@pytest.mark.parametrize("capability", ["[N/A]", ""])
def test_a_card_of_unknown_kind_is_taken_for_an_old_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str
) -> None:
    driver(monkeypatch, tmp_path, f"0, GPU-a, NVIDIA RTX 9090, 40960, 40000, {capability}, [N/A], [N/A]")
    found = present_gpus()
    assert found is not None
    assert (found.spec.name, found.spec.has_bf16, found.spec.total_bytes) == ("NVIDIA RTX 9090", False, 40000 * 2**20)


def test_ranks_on_different_cards_are_planned_for_what_the_weakest_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver(monkeypatch, tmp_path, A100, T4)
    device, count, _ = device_of(Hardware(), here=True)
    t4 = gpu_spec("t4")
    assert isinstance(device, GpuSpec)
    assert (device.name, device.total_bytes, count) == ("a100-40gb + t4", 14900 * 2**20, 2)
    assert (device.has_bf16, device.compute_capability) == (False, (7, 5))
    assert (device.fp32_tflops, device.bandwidth_gb_per_second) == (t4.fp32_tflops, t4.bandwidth_gb_per_second)
    plan = judge(QWEN, **step(tmp_path, device, num_ranks=2))
    assert (plan.gpu, plan.choices.weights, plan.choices.attention) == (device.name, "fp32", "sdpa")
    assert "Not each of a100-40gb + t4 has bf16" in dtype_remark(device)
    for hardware in (Hardware(count=1), Hardware(launch="single")):  # rank 0 alone, which has the first card
        alone, count, _ = device_of(hardware, here=True)
        assert isinstance(alone, GpuSpec)
        assert (alone.name, alone.has_bf16, count) == ("a100-40gb", True, 1)


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1,0", ["t4", "a100-40gb"]), ("GPU-b", ["t4"]), ("0,7,1", ["a100-40gb"]), ("-1", [])],
)
def test_cards_are_counted_as_cuda_is_told_to_see_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, names: list[str]
) -> None:
    driver(monkeypatch, tmp_path, A100, T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = present_gpus()
    assert [card.name for card in found.cards] == names if found else not names


def test_a_users_own_order_of_cards_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, T4.replace("1,", "0,", 1), A100.replace("0,", "1,", 1))
    mark = torch_sees(
        monkeypatch,
        tmp_path,
        ("NVIDIA A100-SXM4-40GB", 40 * GIB, 39 * GIB, (8, 0)),
        ("Tesla T4", 15 * GIB, GIB, (7, 5)),
    )
    monkeypatch.setenv(ORDER, "FASTEST_FIRST")
    count_cards_by_bus()
    found = present_gpus()
    assert found is not None
    assert [card.name for card in found.cards] == ["a100-40gb", "t4"]
    assert mark.read_text() == os.environ[ORDER] == "FASTEST_FIRST"


def test_ranks_and_their_supervisor_count_cards_by_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    monkeypatch.setattr(supervise, "supervise", lambda *_: started.append(os.environ[ORDER]) or 0)
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3", hardware={"gpu": "cpu"})
    assert supervise.run(Request(str(recipe))) == 0
    assert started == ["PCI_BUS_ID"]
    os.environ.pop(ORDER)


def step(folder: Path, device: GpuSpec | HostMemory, **options: Any) -> dict[str, Any]:
    """What `judge` takes for adapters on that device."""
    sections = {"precision": Precision(), "memory": MemoryOptions(), "output": OutputOptions(dir=str(folder / "run"))}
    given = {"tuning": Tuning(kind="lora"), "max_tokens": 1024, "batch": BatchOptions(), "num_ranks": 1}
    return {**given, **sections, "device": device, **options}


def here(name: str) -> GpuSpec:
    return replace(gpu_spec(name), is_here=True)


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("PATH", str(folder))
    return "neither gcc nor clang"


def no_program_in_cc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CC", "icc")
    return "CC names 'icc'"


def no_headers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(flex.sysconfig, "get_path", lambda *_: str(folder))
    return "holds no Python.h"


@pytest.mark.parametrize("lacking", [no_compiler, no_program_in_cc, no_headers])
def test_without_what_triton_compiles_with_the_plan_takes_sdpa_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: Callable[[pytest.MonkeyPatch, Path], str]
) -> None:
    card, elsewhere = here("rtx-4090"), gpu_spec("rtx-4090")
    assert judge(QWEN, **step(tmp_path, card)).choices.attention == "flex_attention"
    assert not attention_remark(QWEN, card)
    words = lacking(monkeypatch, tmp_path)
    assert judge(QWEN, **step(tmp_path, card)).choices.attention == "sdpa"
    said = remarks(QWEN, card, 1024, "default")
    assert any("planned as sdpa" in remark and words in remark for remark in said), said
    assert not any("sdpa" in remark for remark in remarks(QWEN, card, 1024, "default", attention="sdpa"))
    pinned = MemoryOptions(attention="flex_attention")
    with pytest.raises(UsageError, match=f"(?s){words}.*apt-get install gcc python3-dev"):
        judge(QWEN, **step(tmp_path, card, memory=pinned))
    assert judge(QWEN, **step(tmp_path, elsewhere)).choices.attention == "flex_attention", "of another machine"
    assert not attention_remark(QWEN, elsewhere)


@pytest.mark.parametrize(
    ("version", "card", "kernel"),
    [
        ("2.8.0+cu128", "rtx-5090", "sdpa"),
        ("2.9.0", "rtx-5090", "flex_attention"),
        ("2.13.0+cu130", "rtx-5080", "flex_attention"),
        ("2.8.0", "rtx-4090", "flex_attention"),
        ("2.8.0", "b200", "flex_attention"),
    ],
)
def test_a_kernel_that_asks_for_more_shared_memory_than_the_card_has_is_not_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, card: str, kernel: str
) -> None:
    monkeypatch.setattr(flex, "version", lambda _: version)
    device = gpu_spec(card)
    assert judge(QWEN, **step(tmp_path, device)).choices.attention == kernel
    assert ("Install torch 2.9 or later" in attention_remark(QWEN, device)) is (kernel == "sdpa")
    if kernel == "sdpa":
        with pytest.raises(UsageError, match=r"101,376(?s:.*)torch 2\.9"):
            judge(QWEN, **step(tmp_path, device, memory=MemoryOptions(attention="flex_attention")))


@pytest.mark.parametrize(("card", "rates"), [("t4", (8.1, 65)), ("v100-32gb", (15.7, 125))])
def test_a_card_without_bf16_is_said_to_train_in_fp32(tmp_path: Path, card: str, rates: tuple[float, float]) -> None:
    device = gpu_spec(card)
    assert judge(QWEN, **step(tmp_path, device)).choices.weights == "fp32"
    (said,) = (remark for remark in remarks(QWEN, device, 1024, "default") if "fp32" in remark)
    assert "twice the bytes" in said
    assert f"{rates[0]:g} TFLOP/s, where fp16 would have {rates[1]}" in said
    assert not dtype_remark(gpu_spec("l4"))
    assert not dtype_remark(HostMemory(2**36))


def test_a_v100_is_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, "0, GPU-a, Tesla V100-SXM2-32GB, 32768, 32000, 7.0, Enabled, [N/A]")
    found = present_gpus()
    assert found is not None
    assert found.spec.name == "v100-32gb"
    assert "has no bf16" in dtype_remark(found.spec)


RANK = Ranks(0, 1, "none")


def cuda(
    monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, tuple[int, int]], codes: str = "", gib: float = 400.0
) -> None:
    """Makes torch see these cards of that memory, with code for these architectures."""

    def properties(number: int) -> SimpleNamespace:
        name, (major, minor) = cards[number]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=int(gib * 2**30))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: cards[number][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: cards[number][1])
    monkeypatch.setattr(torch.cuda, "get_arch_list", codes.split)


def test_a_plan_for_the_cpu_is_refused_where_torch_would_take_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, ("NVIDIA A10G", (8, 6)))
    with pytest.raises(UsageError, match=r"this machine's CPU.* on NVIDIA A10G(?s:.*)hardware\.gpu=cpu"):
        refuse_other_device(HostMemory(2**36), RANK)
    refuse_other_device(HostMemory(2**36), Ranks(0, 1, "none", on_cpu=True))
    cuda(monkeypatch)
    refuse_other_device(HostMemory(2**36), RANK)


def test_a_plan_for_a_gpu_is_refused_where_torch_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match=r"plan is for t4, but torch .* built without CUDA(?s:.*)whl/cu126"):
        refuse_other_device(gpu_spec("t4"), RANK)

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(UsageError, match=r"plan is for t4(?s:.*)too old \(found version 11040\)"):
        refuse_other_device(gpu_spec("t4"), RANK)


def test_more_ranks_than_torch_sees_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, ("NVIDIA A10G", (8, 6)), codes="sm_80")
    with pytest.raises(UsageError, match="2 processes take a GPU each, and torch sees 1"):
        refuse_other_device(gpu_spec("a10g"), Ranks(0, 2, "ddp"))


@pytest.mark.parametrize(("card", "capability", "gib"), [("Tesla T4", (7, 5), 24.0), ("NVIDIA A10G", (8, 6), 11.0)])
def test_a_plan_for_another_card_than_torch_takes_is_refused(
    monkeypatch: pytest.MonkeyPatch, card: str, capability: tuple[int, int], gib: float
) -> None:
    cuda(monkeypatch, (card, capability), codes=CUDA_13, gib=gib)
    with pytest.raises(UsageError, match=rf"plan is for a10g \(compute capability 8\.6, 22\.0 GiB\).* on {card}"):
        refuse_other_device(gpu_spec("a10g"), RANK)
    cuda(monkeypatch, ("NVIDIA A10G", (8, 6)), codes=CUDA_13, gib=22.0)
    refuse_other_device(gpu_spec("a10g"), RANK)


CUDA_13 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize(
    ("capability", "codes", "is_run"),
    [
        ((7, 0), CUDA_13, False),
        ((6, 0), CUDA_13, False),
        ((7, 5), CUDA_13, True),
        ((8, 9), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((12, 0), "sm_90", False),
        ((12, 0), "sm_90 compute_90", True),
        ((12, 1), CUDA_13, True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "compute_90a", False),
        ((10, 3), "sm_100f", True),
        ((11, 0), "sm_100f", False),
        ((7, 0), "", True),
    ],
)
def test_code_runs_on_its_own_major_version_and_ptx_on_what_is_newer(
    capability: tuple[int, int], codes: str, is_run: bool
) -> None:
    assert runs(capability, codes.split()) is is_run


def test_a_card_that_torch_has_no_code_for_is_refused_with_the_build_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda(monkeypatch, ("NVIDIA A100", (8, 0)), ("Tesla V100", (7, 0)), codes=CUDA_13)
    refuse_other_device(gpu_spec("a100-40gb"), RANK)
    for rank in (0, 1):  # each in the same words
        with pytest.raises(UsageError, match=r"no code for Tesla V100, sm_70(?s:.*)older CUDA(?s:.*)whl/cu126"):
            refuse_other_device(gpu_spec("v100-16gb"), Ranks(rank, 2, "ddp"))
    cuda(monkeypatch, ("NVIDIA GeForce RTX 5090", (12, 0)), codes="sm_80 sm_90")
    with pytest.raises(UsageError, match=r"sm_120(?s:.*)--upgrade torch"):
        refuse_other_device(gpu_spec("rtx-5090"), RANK)


def test_a_run_that_would_train_elsewhere_than_planned_ends_with_code_2(tmp_path: Path, warm: Warm) -> None:
    """The driver tells of a card; this torch, on this machine, sees none."""
    answers(tmp_path, f"echo {RTX_4090!r}")
    model = "builtin:tiny-qwen3"
    recipe = write_recipe(tmp_path, model, output={"dir": str(tmp_path / "out")}, memory={"attention": "sdpa"})
    ended = warm.train(recipe, PATH=f"{tmp_path}:/bin:/usr/bin", QWENTUNE_CACHE=str(tmp_path / "cache"))
    assert ended.code == 2, ended.said
    assert "the plan is for rtx-4090" in ended.said
    assert "Traceback" not in ended.said
    assert not (tmp_path / "cache" / "data").exists(), "before data is rendered"
