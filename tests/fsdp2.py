"""Trains with FSDP2 on a CPU, where accelerate would run DDP in its place without a word.

    accelerate launch --config_file launch/fsdp2.yaml tests/fsdp2.py RECIPE …

accelerate is told that the processes are those of another accelerator, whose device is the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from qwentune import console, train


def pretend() -> None:
    """Makes accelerate shard on a CPU."""
    begin = PartialState.__init__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.device = DistributedType.MULTI_XPU, torch.device("cpu")

    PartialState.__init__ = begun  # type: ignore[method-assign]


if __name__ == "__main__":
    pretend()
    console.main(train.train)
