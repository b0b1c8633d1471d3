"""The loss head: cross-entropy of the supervised positions, without ever holding all their logits."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional

from qwentune.model.attention import KERNELS, attention_arguments
from qwentune.model.chunked_loss import LOSS_CHUNK_TOKENS, ChunkedCrossEntropy, losses
from qwentune.model.senses import media_arguments
from qwentune.model.trained_rows import rows_of


class LossHead:
    """Turns a model's `lm_head` into its loss while targets are set; without them it gives logits as ever.

    The loss is computed inside the model's own forward, so that DDP, DeepSpeed and FSDP see the head where they gather
    its weight. `kind` is `full` (all logits of the supervised positions at once) or `supervised` (in chunks),
    whose chunks can be compiled.
    """

    def __init__(self, model: nn.Module, kind: str, *, is_compiled: bool = False) -> None:
        network: Any = model
        self.head: nn.Module = network.get_output_embeddings()
        self.chunked = kind == "supervised" and type(self.head) in (nn.Linear, TrainableTokensWrapper)
        self.is_compiled = is_compiled
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
            return torch.cat([losses(self.logits(hidden), target) for hidden, target in chunks])
        if self.chunked:
            weight, *rows = rows_of(self.head) or (cast(Tensor, self.head.weight), None, None)
            if not torch.is_grad_enabled():
                weight, rows = weight.detach(), [row if row is None else row.detach() for row in rows]
            return ChunkedCrossEntropy.apply(hidden[0], weight, target_N, weight_N, *rows, self.is_compiled)
        each = functional.cross_entropy(self.logits(hidden[0]).float(), target_N, reduction="none")
        return (each * weight_N).sum()

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
