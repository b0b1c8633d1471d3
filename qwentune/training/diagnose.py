"""Where a step stopped being finite: one forward and backward of the same batch again, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """What is first not finite: a weight, a module's output, the loss, or a weight's gradient; None where all is.

    `loss` runs the model forward. Gradients are left empty.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weight {name}"
    found: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, found)) for name, module in model.named_modules() if name]
    try:
        value = loss()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the output of {found[0]}"
    if not torch.isfinite(value):
        return "the loss"
    value.backward()
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    model.zero_grad(set_to_none=True)
    return f"the gradient of {bad[-1]}" if bad else None  # the last in the model is the first in the backward pass


def _watch(name: str, found: list[str]) -> Callable[..., None]:
    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point() and not torch.isfinite(first).all():
            found.append(name)

    return check
