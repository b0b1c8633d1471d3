"""Some rows of embedding and head that are trained beside adapters, laid over what the frozen rows give.

PEFT copies the whole matrix with these rows in it, and their numbers to the device, in every forward pass: a wait and
twice the embedding's bytes each time, and in the head a gradient of its size. Format and merging stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional


class Rows(NamedTuple):
    """Trained rows `values` (n, H) that stand in place of the rows `numbers` (n,) of a frozen matrix (V, H)."""

    frozen: Tensor
    numbers: Tensor
    values: Tensor


def lay_over(model: PeftModel) -> None:
    """Makes the model's layers with trained rows compute without copies of their matrices."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = _LaidOver


def rows_of(head: nn.Module) -> Rows | None:
    """The trained rows of a model's head; None where none are, or where they are merged or switched off."""
    if not isinstance(head, TrainableTokensWrapper):
        return None
    layer: Any = head.token_adapter
    return layer.rows(layer.active_adapters)


class _LaidOver(TrainableTokensLayer):
    sent: tuple[tuple[str, torch.device], Tensor] | None = None  # of which adapter to which device, once

    def rows(self, active: Sequence[str]) -> Rows | None:
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (name,), frozen = active, cast(Tensor, self.base_layer.weight)
        values = self.trainable_tokens_delta[name]
        if self.sent is None or self.sent[0] != (name, values.device):
            self.sent = (name, values.device), torch.tensor(self.token_indices[name], device=values.device)
        return Rows(frozen, self.sent[1], values)

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows(active_adapters)
        if rows is None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        output = self.base_layer(x, *args, **kwargs)
        if not isinstance(self.base_layer, nn.Embedding):
            trained = functional.linear(x.to(rows.values.dtype), rows.values)
            return output.index_copy_(-1, rows.numbers, trained.to(output.dtype))
        chosen = x[..., None] == rows.numbers
        trained = chosen.to(rows.values.dtype) @ rows.values  # one 1 in a row: exact
        return torch.where(chosen.any(dim=-1, keepdim=True), trained.to(output.dtype), output)
