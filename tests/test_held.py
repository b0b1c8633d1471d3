"""What a rank holds, by the terms of the plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qwentune.training.held import held_bytes

CPU = torch.device("cpu")


def stepped(*trained: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_storages_count_once_under_the_term_that_they_are_for() -> None:
    frozen, adapter = nn.Linear(64, 32, bias=False), nn.Linear(32, 4, bias=False)
    tied = nn.Linear(64, 32, bias=False)
    tied.weight = frozen.weight
    frozen.weight.requires_grad = False
    frozen.register_buffer("table", torch.zeros(10))
    optimizer = stepped(adapter.weight)
    held = held_bytes(nn.ModuleList([frozen, tied, adapter]), optimizer, CPU)
    assert held["weights"] == 4 * (64 * 32 + 10)
    assert held["adapters"] == held["gradients"] == 4 * 128
    assert held["optimizer"] == 2 * 4 * 128 + 4, "two moments and the count of steps"
    full = held_bytes(adapter, optimizer, CPU)
    assert (full["weights"], full["adapters"]) == (4 * 128, 0)


def test_scales_of_four_bits_are_weights_and_fp32_copies_are_states() -> None:
    packed: Any = nn.Linear(64, 32, bias=False)
    scales = SimpleNamespace(absmax=torch.zeros(5, dtype=torch.uint8), state2=None)
    packed.weight.quant_state = SimpleNamespace(absmax=torch.zeros(7, dtype=torch.uint8), state2=scales)
    master = nn.Parameter(torch.zeros(100))
    held = held_bytes(packed, SimpleNamespace(state={}, param_groups=[{"params": [master]}]), CPU)
    assert (held["weights"], held["optimizer"]) == (4 * 64 * 32 + 12, 400)


def test_on_a_gpu_what_torch_handed_out_beside_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 1000, "allocated_bytes.all.peak": 3000, "reserved_bytes.all.current": 4000}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    held = held_bytes(nn.Linear(4, 4), None, torch.device("cuda", 0))
    assert held["weights"] == 0, "which is not on the GPU"
    assert (held["rest"], held["peak"], held["allocator"]) == (1000, 3000, 3000)
