"""What stands in for kernels that do not run on meta: functions that save the same tensors for the backward pass."""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, cast

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn
from transformers import AttentionInterface

from qwentune.memory.settings import Settings
from qwentune.model.attention import IMPLEMENTATIONS, Visibility, tree_by_tree

TOWER_ATTENTION = "traced_tower"


def attention_probe(settings: Settings) -> str:
    """The name by which transformers finds what stands in for the text decoder's attention."""
    _register_probes()
    if settings.attention == "eager":
        return IMPLEMENTATIONS["eager"]
    return _PROBES[settings.attention] + ("_on_cpu" if settings.attention == "sdpa" and settings.on_cpu else "")


def hold_in_4_bits(network: nn.Module, dtype: torch.dtype, double_quantised: bool = True) -> None:
    """Replaces the linear modules of all layers by 4-bit ones, as loading with a quantisation configuration does."""
    probe = _four_bit_linear()
    for layer in cast(Any, network).get_decoder().layers:
        for parent in layer.modules():
            for name, module in list(parent.named_children()):
                if type(module) is nn.Linear:
                    setattr(parent, name, probe(module, dtype, double_quantised))
    cast(Any, network).is_loaded_in_4bit = True  # what PEFT asks


@contextmanager
def no_autocast() -> Iterator[None]:
    """PEFT switches autocast off around experts' weights, and the meta device knows none."""
    autocast = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.autocast = autocast  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def unpacked_for_dora() -> Iterator[None]:
    """DoRA reads whole weights, which of 4-bit stand-ins PEFT cannot unpack."""
    module_of_dora: Any = dora
    unpack = module_of_dora.dequantize_module_weight
    module_of_dora.dequantize_module_weight = lambda module: (
        module.unpacked(module.compute_dtype) if hasattr(module, "unpacked") else unpack(module)
    )
    try:
        yield
    finally:
        module_of_dora.dequantize_module_weight = unpack


@contextmanager
def fused_dropout() -> Iterator[None]:
    """Dropout keeps a boolean mask, as on a GPU; elsewhere torch keeps one in the input's dtype."""
    forward = nn.Dropout.forward
    nn.Dropout.forward = lambda self, input: torch.native_dropout(input, self.p, self.training)[0]
    try:
        yield
    finally:
        nn.Dropout.forward = forward


class _FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and a fp32 log-sum per query and head, as flash, cuDNN and FlexAttention do.

    So do the kernels that take a mask, beside the mask.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:3], dtype=torch.float32), mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, logsum, _ = ctx.saved_tensors
        delta = torch.empty_like(logsum)  # noqa: F841 - alive beside the three gradients
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


# No more of a kernel's name, for transformers refuses some to some models, and looks for a kernel where it reads flash.
_PROBES = {"sdpa": "traced_sdpa", "flex_attention": "traced_flex", "flash_attention_2": "traced_varlen"}


@cache
def _register_probes() -> None:
    for name in _PROBES.values():
        AttentionInterface.register(name, _grouped_attention)
    AttentionInterface.register(TOWER_ATTENTION, _grouped_attention)
    AttentionInterface.register(_PROBES["sdpa"], partial(_repeated_attention, copies=False))
    AttentionInterface.register(_PROBES["sdpa"] + "_on_cpu", partial(_repeated_attention, copies=True))


def _grouped_attention(_module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FlashAttention.apply(q, k, v, None).transpose(1, 2).contiguous(), None


def _repeated_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, visibility: Visibility, copies: bool, **__: Any
) -> tuple[Tensor, None]:
    output = tree_by_tree(_FlashAttention.apply, q, k, v, visibility, None, copies=copies)
    return output.transpose(1, 2).contiguous(), None


class _FourBitProduct(torch.autograd.Function):
    """Unpacks the weight forward and again backward; saves nothing of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.module.unpacked(gradients[0].dtype), None


@cache
def _four_bit_linear() -> Any:
    """A stand-in for bitsandbytes' module, which PEFT takes for it; NF4, its scales quantised again or in fp32."""
    from bitsandbytes.nn.modules import Linear4bit

    class FourBitLinear(Linear4bit):
        def __init__(self, module: nn.Linear, dtype: torch.dtype, double_quantised: bool) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = module.in_features, module.out_features
            self.compute_dtype, self.bias = dtype, module.bias
            size = module.weight.numel()
            weight: Any = nn.Parameter(torch.empty((size // 2, 1), dtype=torch.uint8), requires_grad=False)
            weight.compress_statistics, weight.quant_type = double_quantised, "nf4"
            self.weight = weight
            scale_dtype = torch.uint8 if double_quantised else torch.float32
            self.register_buffer("scales", torch.empty(size // 64, dtype=scale_dtype))
            if double_quantised:
                self.register_buffer("scales_of_scales", torch.empty(-(-size // (64 * 256))))

        def unpacked(self, dtype: torch.dtype) -> Tensor:
            return torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.weight.device)

        def forward(self, x: Tensor) -> Tensor:
            product = _FourBitProduct.apply(x.to(self.compute_dtype), self)
            return (product if self.bias is None else product + self.bias).to(x.dtype)

    return FourBitLinear
