"""Loads a checkpoint in shards on several ranks of one machine and proves them, and their optimizer's steps; for a
process that may fork.

`prove(NUM_RANKS, FOLDER)`: the shards are the rows of the weights as they are loaded whole, bit for bit, the model says
what the whole one says, and no rank ever held more than its share of the weights and of one more tensor.
"""

from __future__ import annotations

import copy
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwentune.memory.trace.live_bytes import LiveStorage
from qwentune.model.loading import load_model
from qwentune.model.sharded import Shards

STRANGE = 2**16  # bytes of whatever else is there: rotary frequencies, and what a rank without experts reads for one


class RealStorage(LiveStorage):
    """Leaves out tensors without data, and views of a mapped file, whose pages are the system's to keep or drop."""

    def _add(self, tensor: torch.Tensor, term: str) -> None:
        local: Any = getattr(tensor, "_local_tensor", tensor)
        if local.device.type != "meta":
            super()._add(local, term)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.set_.source_Storage:
            return super().__torch_dispatch__(func, types, args, kwargs)
        mapped = func(*args, **(kwargs or {}))
        self._terms[weakref.ref(mapped.untyped_storage(), self.released)] = "mapped", 0
        return mapped


def prove(num_ranks: int, folder: Path, zero3: bool = False) -> None:
    """Forks the ranks; raises where one fails."""
    meeting, run = f"file://{tempfile.mkdtemp()}/ranks", _prove_zero3 if zero3 else _prove
    children = [_fork(lambda rank=rank: run(rank, num_ranks, meeting, folder)) for rank in range(num_ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_ranks, codes


def prove_steps(num_ranks: int) -> None:
    """Forks ranks that share a module by FSDP2; raises where their steps are not those of the whole in fp32."""
    meeting = f"file://{tempfile.mkdtemp()}/ranks"
    children = [_fork(lambda rank=rank: _prove_steps(rank, num_ranks, meeting)) for rank in range(num_ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_ranks, codes


def _prove_steps(rank: int, num_ranks: int, meeting: str) -> None:
    """Two hundred steps on bf16 gradients: masters and moments of the shards to 1e-6 of their norm, 8 bits nearby."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from qwentune.model.adamw import AdamW

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    # The last has fewer rows than there are ranks: one of three holds nothing of it.
    whole = nn.Sequential(nn.Linear(64, 130), nn.Linear(130, 256, bias=False), nn.Linear(256, 2)).bfloat16()
    spread = [copy.deepcopy(whole) for _ in range(2)]
    for module in spread:
        fully_shard(module, mesh=init_device_mesh("cpu", (num_ranks,)))
    reference = [nn.Parameter(parameter.detach().float()) for parameter in whole.parameters()]
    other = torch.optim.AdamW(reference, lr=1e-3, weight_decay=0.01)
    exact, packed = (
        AdamW(module.parameters(), lr=1e-3, weight_decay=0.01, eight_bit=module is spread[1]) for module in spread
    )
    for _ in range(200):
        for number, weight in enumerate(reference):
            gradient = torch.randn(weight.shape).mul(1e-3).bfloat16()
            weight.grad = gradient.float()
            for module in spread:
                shard: Any = [*module.parameters()][number]
                shard.grad = shard.detach().clone()
                shard.grad.to_local().copy_(rows(gradient, rank, num_ranks))
        for optimizer in (other, exact, packed):
            optimizer.step()
    for weight, shard, eight in zip(reference, *(module.parameters() for module in spread), strict=True):
        own = rows(weight, rank, num_ranks)
        if not len(own):
            continue
        assert near(exact.exact(shard), own) < 1e-6
        for name in ("exp_avg", "exp_avg_sq"):
            assert near(exact.state[shard][name], rows(other.state[weight][name], rank, num_ranks)) < 1e-6
        assert near(packed.exact(eight), own) < 0.01


def near(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two tensors as a share of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def _fork(run: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def _prove(rank: int, num_ranks: int, meeting: str, folder: Path) -> None:
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a mode sees one thread
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    whole = load_model(folder, dtype="bf16")
    weights = dict(whole.named_parameters())
    live = RealStorage()
    with live:
        model = load_model(folder, dtype="bf16", sharded=True)
        shards = Shards(model)
        assert not any(parameter.untyped_storage().nbytes() > 4 for parameter in model.parameters())
        shards.lay_in(model)
    peak = sum(live.moments[""].values())

    parameters: dict[str, Any] = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()  # a tied head is none of its own
    for name, parameter in parameters.items():
        assert parameter.requires_grad
        assert torch.equal(parameter.to_local(), rows(weights[name], rank, num_ranks)), name
    buffers = dict(whole.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)

    share = sum(rows(weight, rank, num_ranks).nbytes for weight in weights.values())
    largest = max(weight.nbytes for weight in weights.values())
    assert share < peak <= share + largest // num_ranks + STRANGE


def _prove_zero3(rank: int, num_ranks: int, meeting: str, folder: Path) -> None:
    """DeepSpeed gathers one tensor after another, and rank 0 fills it."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    deepspeed.init_distributed("gloo")
    whole = load_model(folder, dtype="bf16")
    weights = dict(whole.named_parameters())
    asked = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    alive = HfDeepSpeedConfig(asked)
    live = RealStorage()
    with live:
        model = load_model(folder, dtype="bf16")
    assert alive.is_zero3()
    assert dict(model.named_parameters()).keys() == weights.keys()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter.data, weights[name]), name
    buffers = dict(whole.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    share = sum(weight.nbytes for weight in weights.values()) // num_ranks
    largest = max(weight.nbytes for weight in weights.values())
    fused = sum(weight.nbytes for name, weight in weights.items() if ".layers.0.mlp.experts." in name)
    # Rank 0 fuses one layer's experts in host memory, in the fp32 of the files; a tied head is let go of at the end.
    beside = largest + largest // num_ranks + (4 * fused if rank == 0 else fused)
    assert share < sum(live.moments[""].values()) <= share + beside + STRANGE


def rows(weight: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """What a rank holds of a weight."""
    parts = weight.detach().chunk(num_ranks)
    return parts[rank] if rank < len(parts) else weight.detach()[:0]
