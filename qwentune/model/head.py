"""The loss head: cross-entropy of the supervised positions, without ever holding all their logits."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional

from qwentune.model.attention import KERNELS, attention_arguments
from qwentune.model.senses import media_arguments
from qwentune.model.trained_rows import rows_of

LOSS_CHUNK_TOKENS = 1024  # the plan counts the logits of as many


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies; gradients are made chunk by chunk in the forward pass.

    Logits live for one chunk only, in fp32: LOSS_CHUNK_TOKENS x V. Source of the idea: fused linear cross-entropy,
    https://arxiv.org/abs/2410.10989
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
    ) -> Tensor:
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        rows_grad = torch.zeros_like(rows_nH) if rows_nH is not None and ctx.needs_input_grad[5] else None
        for start in range(0, hidden_NH.shape[0], LOSS_CHUNK_TOKENS):
            span = slice(start, start + LOSS_CHUNK_TOKENS)
            hidden, target, weight = hidden_NH[span], target_N[span], weight_N[span]
            logits = functional.linear(hidden, head_VH).float()
            if numbers_n is not None and rows_nH is not None:
                logits.index_copy_(1, numbers_n, functional.linear(hidden.to(rows_nH.dtype), rows_nH).float())
            losses = functional.cross_entropy(logits, target, reduction="none")
            loss += (losses * weight).sum()
            if hidden_grad is None and head_grad is None:
                del logits
                continue
            slope = torch.softmax(logits, dim=-1)
            del logits
            slope[torch.arange(len(target), device=target.device), target] -= 1
            slope = slope.mul_(weight[:, None])
            if numbers_n is not None and rows_nH is not None:
                of_rows = slope[:, numbers_n].to(rows_nH.dtype)
                slope.index_fill_(1, numbers_n, 0)
                if rows_grad is not None:
                    rows_grad += of_rows.T @ hidden.to(rows_nH.dtype)
                if hidden_grad is not None:
                    hidden_grad[span] = of_rows @ rows_nH
            slope = slope.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[span] += slope @ head_VH
            if head_grad is not None:
                head_grad += slope.T @ hidden
        ctx.save_for_backward(hidden_grad, head_grad, rows_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, rows = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, head, None, None, None, rows


class LossHead:
    """Turns a model's `lm_head` into its loss while targets are set; without them it gives logits as ever.

    The loss is computed inside the model's own forward, so that DDP, DeepSpeed and FSDP see the head where they gather
    its weight. `kind` is `full` (all logits of the supervised positions at once) or `supervised` (in chunks).
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        network: Any = model
        self.head: nn.Module = network.get_output_embeddings()
        self.chunked = kind == "supervised" and type(self.head) in (nn.Linear, TrainableTokensWrapper)
        text = network.config.get_text_config()
        self.attention: str | None = text._attn_implementation
        if self.attention not in KERNELS and "linear_attention" in (getattr(text, "layer_types", None) or ()):
            self.attention = None  # a row is one example, and linear attention refuses to be told where it begins
        self.targets: tuple[Tensor, Tensor] | None = None
        self.gives_each = False
        self.places: Tensor | None = None
        whole: Any = network.get_base_model() if hasattr(network, "get_base_model") else network
        self.is_given_all = "logits_to_keep" not in signature(whole.forward).parameters  # as in models that hear
        self.logits = self.head.forward
        self.head.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.targets is None:
            return self.logits(hidden, *args, **kwargs)
        target_N, weight_N = self.targets
        if self.places is not None:
            hidden = hidden[:, self.places]
        if self.gives_each:
            chunks = zip(hidden[0].split(LOSS_CHUNK_TOKENS), target_N.split(LOSS_CHUNK_TOKENS), strict=True)
            return torch.cat([functional.cross_entropy(self.logits(h).float(), t, reduction="none") for h, t in chunks])
        if self.chunked:
            weight, *rows = rows_of(self.head) or (cast(Tensor, self.head.weight), None, None)
            if not torch.is_grad_enabled():
                weight, rows = weight.detach(), [row if row is None else row.detach() for row in rows]
            return _ChunkedCrossEntropy.apply(hidden[0], weight, target_N, weight_N, *rows)
        losses = functional.cross_entropy(self.logits(hidden[0]).float(), target_N, reduction="none")
        return (losses * weight_N).sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the batch's cross-entropies, a scalar in fp32; the model runs once."""
        self.targets = (batch["target"], batch["weight"])
        self.places = batch["predict_from"] if self.is_given_all else None
        try:
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                logits_to_keep=batch["predict_from"],
                **attention_arguments(self.attention, batch),
                **media_arguments(batch),
            )
        finally:
            self.targets = self.places = None
        return outputs.logits

    def each(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy of each supervised position, unweighted: (N,) fp32, without gradients."""
        self.gives_each = True
        try:
            with torch.no_grad():
                return self.loss(model, batch)
        finally:
            self.gives_each = False
