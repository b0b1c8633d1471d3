"""Stand-ins for what does not run on meta tensors: kernels that save the same tensors, and autocast.

Each says in a line what the true kernel keeps and what it allocates for a moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, eager_mask


class Autocast(TorchFunctionMode):
    """Casts what is multiplied to 16 bits. A table in `kept` keeps the casts of trained leaves, as CUDA's does."""

    PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.kept: dict[int, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = [self._cast(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if self.kept is None or not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(self.dtype)
        return self.kept[id(x)]


class Softmax(torch.autograd.Function):
    """CUDA's softmax in fp32: of fp16 in one kernel, of bf16 through a copy; backward takes grad * output beside."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        copy = scores if scores.dtype == torch.float16 else scores.float()
        output = torch.empty_like(copy, dtype=torch.float32)
        ctx.save_for_backward(output)
        ctx.dtype = scores.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        product = torch.empty_like(output)  # noqa: F841 - alive beside the gradient
        if ctx.dtype == torch.float16:
            return torch.empty_like(output, dtype=ctx.dtype)
        return torch.empty_like(output).to(ctx.dtype)


class EfficientAttention(torch.autograd.Function):
    """Saves q, k, v, the output and a fp32 log-sum per query, queries rounded up to 32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, size = q.shape
        output = q.new_empty((batch, tokens, heads, size)).transpose(1, 2)
        log_sum = q.new_empty((batch, heads, -(-tokens // 32) * 32), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, log_sum = ctx.saved_tensors
        delta = torch.empty_like(log_sum)  # noqa: F841 - alive beside the gradients
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and a fp32 log-sum; backward adds up dq in fp32, and dk and dv per query head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, size = q.shape
        output = q.new_empty((batch, tokens, heads, size)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, output, q.new_empty((batch, heads, tokens), dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, log_sum = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        beside = [torch.empty_like(log_sum), torch.empty_like(q, dtype=torch.float32)]
        if k.shape[1] != q.shape[1]:
            beside += [torch.empty_like(q), torch.empty_like(q)]
        return dq, dk, dv


class FusedNorm(torch.autograd.Function):
    """Unsloth's RMSNorm: saves its input and a fp32 value per token; the gradient overwrites the one it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = ctx.saved_tensors[1]
        return gradients[0], torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class FusedRotation(torch.autograd.Function):
    """Unsloth's rotary embedding: in place both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class FusedCrossEntropy(torch.autograd.Function):
    """Unsloth's loss: saves the logits and overwrites them by their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[0], dtype=torch.float32))
        return logits.new_empty(logits.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


class LinearCrossEntropy(torch.autograd.Function):
    """Liger's head and loss in chunks of rows; all gradients are made in the forward pass.

    Of the chunk before, the logits' gradient and its scaled copy live until they are replaced.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        rows, width = hidden.shape
        num_chunks = -(-weight.shape[0] // width)
        chunk = 1 << (-(-rows // num_chunks) - 1).bit_length()
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        gradient = torch.zeros_like(hidden)
        scaled = None
        for start in range(0, rows, chunk):
            logits = hidden[start : start + chunk] @ weight.t()
            logits = logits.float()
            logits = logits.to(hidden.dtype)
            scaled = logits * 1.0
            gradient[start : start + chunk] = scaled @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(logits.t(), hidden[start : start + chunk])
        ctx.save_for_backward(gradient, weight_gradient)
        return hidden.new_empty(rows, dtype=torch.float32).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        return ctx.saved_tensors


class FusedAdapters(torch.autograd.Function):
    """Unsloth's adapters of modules with one input: saves it and, with dropout, what each adapter saw of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: list[Any], scaling: float, dropout: float, *pairs: Tensor) -> Any:
        outputs, seen = [], []
        for module, a, b in zip(base, pairs[::2], pairs[1::2], strict=True):
            output = x @ module.unpacked(x.dtype).t()
            dropped = x.clone() if dropout else x
            output += (dropped @ a.t().to(x.dtype)) @ (scaling * b.t().to(x.dtype))
            outputs.append(output)
            seen.append(dropped)
        ctx.base, ctx.scaling = base, scaling
        ctx.save_for_backward(x, *seen, *pairs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        count = len(ctx.base)
        x, *saved = ctx.saved_tensors
        seen, pairs = saved[:count], saved[count:]
        dtype, found = x.dtype, []
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        for dropped, dy, a, b in zip(seen, flat, pairs[::2], pairs[1::2], strict=True):
            rows = dropped.reshape(-1, dropped.shape[-1]).t()
            found += [(rows @ (dy @ b.to(dtype))).t(), ((a.to(dtype) @ rows) @ dy).t()]
        # Several modules write over their input; a single one does not.
        dx = x.view(-1, x.shape[-1]) if count > 1 else None
        for module, dropped, dy, a, b in zip(ctx.base, seen, flat, pairs[::2], pairs[1::2], strict=True):
            weight = module.unpacked(dtype)
            part = None if dx is not None and dy is flat[0] else dy @ weight
            del weight
            if dx is None:
                dx = part
            part = None
            dx += (dropped.view(dx.shape) != 0) * (dy @ b.to(dtype) @ (ctx.scaling * a.to(dtype)))
        return dx.view(x.shape), None, None, None, *found


def eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention in single operators, as transformers spells it."""
    k, v = repeat_kv(k, module.num_key_value_groups), repeat_kv(v, module.num_key_value_groups)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores + mask
    weights = Softmax.apply(scores).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights


def efficient(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """SDPA's memory-efficient kernel behind repeated keys and values; autocast hands it 16 bits."""
    if q.dtype == torch.float32 and torch.is_autocast_enabled():
        q, k, v = (x.to(module.config.dtype) for x in (q, k, v))
    k, v = repeat_kv(k, module.num_key_value_groups), repeat_kv(v, module.num_key_value_groups)
    return EfficientAttention.apply(q, k, v).transpose(1, 2).contiguous(), None


def tiled(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Flash attention; transformers casts an fp32 input to the model's 16-bit dtype."""
    if q.dtype == torch.float32:
        q, k, v = (x.to(module.config.dtype) for x in (q, k, v))
    return FlashAttention.apply(q, k, v).transpose(1, 2), None


def repeated(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Flash attention behind repeated keys and values."""
    return tiled(module, q, repeat_kv(k, module.num_key_value_groups), repeat_kv(v, module.num_key_value_groups))


def math(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """SDPA's fallback, torch's own single operators in the dtype that comes in."""
    grouped = q.shape[1] != k.shape[1]
    attended = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, is_causal=True, enable_gqa=grouped)[0]
    return attended.transpose(1, 2).contiguous(), None


for _function in (eager, efficient, tiled, repeated, math):
    AttentionInterface.register(f"row_{_function.__name__}", _function)
AttentionMaskInterface.register("row_eager", eager_mask)
