"""What a measured training step was, as far as bytes depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwentune.memory.settings import Overheads


class CannotDescribeError(Exception):
    """A row does not say, or says what no step here can be built from; the text is the reason."""


@dataclass(frozen=True)
class RowSettings:
    """One training step on one rank.

    `upcast` is what was brought to fp32 before training: "all" that is not in 4 bits (PEFT's k-bit preparation), or
    only "norms" (TRL takes embedding and head back to bf16). `transformers` decides what the loss copies.
    """

    config: Mapping[str, Any]
    dtype: Literal["fp16", "bf16", "fp32"]
    kind: Literal["full", "lora", "qlora"]
    tokens: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    targets: tuple[str, ...] | str = ()
    dropout: float = 0.0
    double_quantised: bool = False
    upcast: Literal["", "all", "norms"] = ""
    autocast: bool = False
    checkpointing: bool = True
    reentrant: bool = False
    attention: Literal["eager", "efficient", "tiled", "repeated", "math"] = "tiled"
    loss: Literal["hf", "unsloth", "liger"] = "hf"
    transformers: tuple[int, int] = (5, 0)
    keeps_outputs: bool = False
    fused_norms: bool = False
    fused_adapters: bool = False
    optimizer: Literal["foreach", "fused", "8bit", "paged-8bit"] = "foreach"
    sharding: Literal["none", "fsdp1", "ddp"] = "none"
    ranks: int = 1
    overheads: Overheads = Overheads(0, 0, 0.0, 0)
    statistic: Literal["allocated", "reserved", "process"] = "allocated"
