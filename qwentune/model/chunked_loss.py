"""Cross-entropy over a vocabulary, a chunk of positions at a time, with no logits in fp32 beside 16-bit ones.

Eager, exponentials are summed slice by slice of the vocabulary, so that what is in fp32 is a part of the chunk, and
softmax computes in fp32 registers. Compiled, all of it does. Source of the idea: fused linear cross-entropy,
https://arxiv.org/abs/2410.10989
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOSS_CHUNK_TOKENS = 1024  # the plan counts the logits of as many
LOSS_SLICES = 8  # of which one is in fp32 at a time; the plan counts it
COMPILED_REST = 256  # a compiled chunk is whole or has so many positions: its kernels depend on no other shape


class _Trained(NamedTuple):
    """Rows of the head that are trained beside the rest, for a chunk: numbers (n,), logits (C, n) in fp32."""

    numbers: Tensor
    logits: Tensor


def losses(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """The cross-entropy of each position: (C,) fp32."""
    return _log_of_sum(logits_CV) - _picked(logits_CV, target_C)


def _picked(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    return logits_CV.gather(1, target_C[:, None])[:, 0].float()


def _log_of_sum(logits_CV: Tensor) -> Tensor:
    """The logarithm of the summed exponentials of each position: (C,) fp32, whatever the logits are held in."""
    top_C1 = logits_CV.amax(dim=1, keepdim=True).float()
    width = -(-logits_CV.shape[1] // LOSS_SLICES)
    sums = [(part - top_C1).exp_().sum(dim=1) for part in logits_CV.split(width, dim=1)]
    return top_C1[:, 0] + torch.stack(sums).sum(dim=0).log()


def _chunk(
    logits_CV: Tensor, target_C: Tensor, weight_C: Tensor, trained: _Trained | None, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weighted loss; where it `learns`, its slopes by the logits and, in fp32, by those of trained rows."""
    if trained is not None:
        logits_CV.index_fill_(1, trained.numbers, -torch.inf)
    of_frozen = total = _log_of_sum(logits_CV)
    picked, of_rows = _picked(logits_CV, target_C), None
    if trained is not None:
        total, picked, of_rows = _with_rows(trained, total, picked, target_C, weight_C)
    loss = (total - picked) @ weight_C
    if not learns:
        return loss, None, None
    slope = torch.softmax(logits_CV, dim=1)  # in fp32 registers, and rounded once
    at_target = torch.expm1(picked - total) * weight_C  # the probability less one, also where that is nearly nothing
    slope.mul_((torch.exp(of_frozen - total) * weight_C)[:, None])
    if trained is not None:
        at_target = at_target.masked_fill((target_C[:, None] == trained.numbers).any(dim=1), 0)
    return loss, slope.scatter_(1, target_C[:, None], at_target[:, None].to(slope.dtype)), of_rows


def _fused_chunk(
    logits_CV: Tensor, target_C: Tensor, weight_C: Tensor, trained: _Trained | None, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same for a compiler that fuses what is done to each logit; slopes take the logits' place."""
    columns = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    values = logits_CV.float()
    if trained is not None:
        values = values.masked_fill((columns[:, None] == trained.numbers).any(dim=1), -torch.inf)
    top = values.amax(dim=1)
    total = top + (values - top[:, None]).exp().sum(dim=1).log()
    picked, of_rows = _picked(logits_CV, target_C), None
    if trained is not None:
        total, picked, of_rows = _with_rows(trained, total, picked, target_C, weight_C)
    loss = ((total - picked) * weight_C).sum()
    if not learns:
        return loss, None, None
    away = values - total[:, None]
    is_target = (columns == target_C[:, None]) & (away > -torch.inf)
    logits_CV.copy_(torch.where(is_target, torch.expm1(away), torch.exp(away)) * weight_C[:, None])
    return loss, None, of_rows


def _with_rows(
    trained: _Trained, total_C: Tensor, picked_C: Tensor, target_C: Tensor, weight_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithms of sums and the targets' logits with those of trained rows, and the rows' slopes (C, n), fp32."""
    is_target = target_C[:, None] == trained.numbers
    total_C = torch.logaddexp(total_C, torch.logsumexp(trained.logits, dim=1))
    picked_C = torch.where(is_target.any(dim=1), (trained.logits * is_target).sum(dim=1), picked_C)
    away = trained.logits - total_C[:, None]
    return total_C, picked_C, torch.where(is_target, torch.expm1(away), torch.exp(away)) * weight_C[:, None]


@cache
def _compiled_chunk() -> Any:
    return torch.compile(_fused_chunk, fullgraph=True, dynamic=False)


def _spans(num_positions: int, is_compiled: bool) -> Iterator[slice]:
    start = 0
    while start < num_positions:
        left = num_positions - start
        size = COMPILED_REST if is_compiled and left < LOSS_CHUNK_TOKENS else LOSS_CHUNK_TOKENS
        yield slice(start, start + size)
        start += size


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies, a scalar in fp32; gradients are made chunk by chunk in the forward pass.

    Takes hidden (N, H), the head's weight (V, H), targets and weights (N,), the trained rows' numbers (n,) and values
    (n, H), or None twice, and whether chunks are compiled.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        numbers_n: Tensor | None,
        rows_nH: Tensor | None,
        is_compiled: bool,
    ) -> Tensor:
        needs_hidden, needs_head, needs_rows = (ctx.needs_input_grad[place] for place in (0, 1, 5))
        learns = needs_hidden or needs_head or needs_rows
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden_NH) if needs_hidden else None
        head_grad = torch.zeros_like(head_VH) if needs_head else None
        rows_grad = torch.zeros_like(rows_nH) if rows_nH is not None and needs_rows else None
        chunk = _compiled_chunk() if is_compiled else _chunk
        for span in _spans(hidden_NH.shape[0], is_compiled):
            hidden, target, weight = hidden_NH[span], target_N[span], weight_N[span]
            count, trained = len(target), None
            if is_compiled and (missing := span.stop - span.start - count):  # with positions that weigh nothing
                hidden = functional.pad(hidden, (0, 0, 0, missing))
                target, weight = functional.pad(target, (0, missing)), functional.pad(weight, (0, missing))
            if numbers_n is not None and rows_nH is not None:  # not rounded to what the head is held in
                of_rows = functional.linear(hidden.to(rows_nH.dtype), rows_nH).float()
                trained = _Trained(numbers_n, of_rows)
            logits = functional.linear(hidden, head_VH)
            of_chunk, slope, row_slope = chunk(logits, target, weight, trained, learns)
            loss += of_chunk
            if not learns:
                del logits  # before the next chunk's
                continue
            slope = logits if slope is None else slope
            del logits
            if hidden_grad is not None:
                torch.mm(slope[:count], head_VH, out=hidden_grad[span])
            if head_grad is not None:
                head_grad.addmm_(slope.T, hidden)
            del slope
            if row_slope is not None and rows_nH is not None:
                row_slope = row_slope.to(rows_nH.dtype)
                if hidden_grad is not None:
                    hidden_grad[span] += (row_slope @ rows_nH)[:count]
                if rows_grad is not None:
                    rows_grad.addmm_(row_slope.T, hidden.to(rows_nH.dtype))
        ctx.save_for_backward(hidden_grad, head_grad, rows_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, rows = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, head, None, None, None, rows, None
