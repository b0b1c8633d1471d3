"""Trains, and writes down for each rank how many bytes its tensors hold before the second optimizer step.

    accelerate launch … tests/held.py FOLDER RECIPE

FOLDER/RANK.json has the bytes of parameters, gradients (with what carries them between ranks) and optimizer states,
and of what is in host memory in place of a GPU's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qwentune import console, train
from qwentune.training.trainer import SftTrainer

FOLDER = Path(sys.argv.pop(1))
buckets: list[int] = []


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of some tensors, each once; counters of steps are left out."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(size for size in storages.values() if size > 4)


def write(parameters: Iterable[Any], gradients: int, states: Iterable[Any], host: Iterable[Any] = ()) -> None:
    """Notes what this rank holds; what is noted later counts."""
    held = {"weights": bytes_of(parameters), "gradients": gradients, "optimizer": bytes_of(states)}
    held["host"] = bytes_of(host)
    FOLDER.joinpath(f"{torch.distributed.get_rank()}.json").write_text(json.dumps(held))


def tensors_of(optimizer: Any) -> list[Any]:
    """The states of a torch optimizer."""
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


def look_at_ddp(trainer: Any, model: Any) -> None:
    """DDP: torch's own gradients, and the reducer's buckets."""
    parameters = list(model.parameters())
    reduced = bytes_of(bucket.buffer() for bucket in model.reducer._get_zeros_like_grad_buckets())
    write(
        parameters,
        bytes_of(parameter.grad for parameter in parameters) + reduced,
        tensors_of(trainer.optimizer.optimizer),
    )


def look_at_zero(engine: Any, gradients: Iterable[Any], bucket: int) -> None:
    """ZeRO: gradients, whole or a share, with their bucket; a share of fp32 weights and moments, here or there."""
    zero = engine.optimizer
    masters = zero.single_partition_of_fp32_groups
    states = [*masters, *tensors_of(zero.optimizer)]
    if not zero.cpu_offload:
        write(engine.module.parameters(), bytes_of(gradients) + bucket, states)
        return
    sums, staging = zero.accumulated_grads_in_cpu.values(), zero.param_buffer_of_bit16_for_cpu_offload_groups
    host = [*states, *(master.grad for master in masters), *sums, *staging, zero.temp_grad_buffer_for_cpu_offload]
    write(engine.module.parameters(), bucket, [], host)


def watch_ddp() -> None:
    """Looks when the gradient's norm is asked for."""
    norm = SftTrainer._get_grad_norm

    def looked_at(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(model, "reducer"):
            look_at_ddp(self, model)
        return norm(self, model, *args, **kwargs)

    SftTrainer._get_grad_norm = looked_at  # type: ignore[method-assign]


def watch_zero() -> None:
    """Looks before stage 1 reduces, before the engine steps in stage 2, and when it releases its buckets."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    step, reduce = DeepSpeedEngine.step, DeepSpeedEngine.allreduce_gradients
    release = DeepSpeedZeroOptimizer._release_ipg_buffers

    def is_time(engine: Any, stage: int) -> bool:
        return engine.zero_optimization_stage() == stage and engine.is_gradient_accumulation_boundary()

    def looked_at(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_time(self, stage=2):
            averaged = self.optimizer.averaged_gradients
            look_at_zero(self, [x for group in averaged.values() for x in group or ()], buckets[-1])
        return step(self, *args, **kwargs)

    def reduced(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_time(self, stage=1):
            look_at_zero(self, [x.grad for x in self.module.parameters()], filled(self.optimizer))
        reduce(self, *args, **kwargs)

    def filled(zero: Any) -> int:
        return sum(buffer.nbytes for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer)

    def released(self: Any) -> None:
        buckets.extend([filled(self)] if filled(self) else [])
        release(self)

    DeepSpeedEngine.step = looked_at  # type: ignore[method-assign]
    DeepSpeedZeroOptimizer._release_ipg_buffers = released  # type: ignore[method-assign]
    DeepSpeedEngine.allreduce_gradients = reduced  # type: ignore[method-assign]


if __name__ == "__main__":
    (watch_zero if "ACCELERATE_USE_DEEPSPEED" in os.environ else watch_ddp)()
    console.main(train.train)
