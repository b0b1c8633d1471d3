"""The loss head: cross-entropy of the supervised positions, without ever holding all their logits."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional

from qwentune.model.attention import attention_arguments

LOSS_CHUNK_TOKENS = 1024  # the plan counts the logits of as many


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies; gradients are made chunk by chunk in the forward pass.

    Logits live for one chunk only, in fp32: LOSS_CHUNK_TOKENS x V. Source of the idea: fused linear cross-entropy,
    https://arxiv.org/abs/2410.10989
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_NH.shape[0], LOSS_CHUNK_TOKENS):
            span = slice(start, start + LOSS_CHUNK_TOKENS)
            hidden, target, weight = hidden_NH[span], target_N[span], weight_N[span]
            logits = functional.linear(hidden, head_VH).float()
            losses = functional.cross_entropy(logits, target, reduction="none")
            loss += (losses * weight).sum()
            if hidden_grad is None and head_grad is None:
                del logits
                continue
            slope = torch.softmax(logits, dim=-1)
            del logits
            slope[torch.arange(len(target), device=target.device), target] -= 1
            slope = slope.mul_(weight[:, None]).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[span] = slope @ head_VH
            if head_grad is not None:
                head_grad += slope.T @ hidden
        ctx.save_for_backward(hidden_grad, head_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grads[0]
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if head_grad is None else head_grad * scale.to(head_grad.dtype),
            None,
            None,
        )


class LossHead:
    """Turns a model's `lm_head` into its loss while targets are set; without them it gives logits as ever.

    The loss is computed inside the model's own forward, so that DDP, DeepSpeed and FSDP see the head where they gather
    its weight. `kind` is `full` (all logits of the supervised positions at once) or `supervised` (in chunks).
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        network: Any = model
        self.head: nn.Module = network.get_output_embeddings()
        # The wrapper around a head some of whose rows are trained gives the weight with those rows laid in.
        self.chunked = kind == "supervised" and type(self.head) in (nn.Linear, TrainableTokensWrapper)
        self.attention: str | None = network.config._attn_implementation
        self.targets: tuple[Tensor, Tensor] | None = None
        self.logits = self.head.forward
        self.head.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.targets is None:
            return self.logits(hidden, *args, **kwargs)
        target_N, weight_N = self.targets
        if self.chunked:
            weight: Any = self.head.weight
            weight = weight if torch.is_grad_enabled() else weight.detach()
            return _ChunkedCrossEntropy.apply(hidden[0], weight, target_N, weight_N)
        losses = functional.cross_entropy(self.logits(hidden[0]).float(), target_N, reduction="none")
        return (losses * weight_N).sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the batch's cross-entropies, a scalar in fp32; the model runs once."""
        self.targets = (batch["target"], batch["weight"])
        try:
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                logits_to_keep=batch["predict_from"],
                **attention_arguments(self.attention, batch),
            )
        finally:
            self.targets = None
        return outputs.logits
