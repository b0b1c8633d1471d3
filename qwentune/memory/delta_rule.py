"""The gated delta rule of hybrids as a trace runs it: transformers' own code in torch, over fewer steps.

The rule walks over the chunks of a sequence one by one, which takes a trace of a long sequence minutes. Folded into a
batch of shorter sequences it holds the same tensors for its backward pass; only what lives within one step is wider,
less than a hundredth of the whole.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

CHUNK_TOKENS = 64  # of transformers' rule
MOST_STEPS = 12  # of a sequence that stays as it is
FOLDED_STEPS = (8, 7, 6, 5)


@contextmanager
def folded_delta_rule(model_type: str) -> Iterator[None]:
    """Lets the hybrids of that type run the rule folded, and no kernel that other packages bring."""
    name = model_type.removesuffix("_text")
    module: Any = import_module(f"transformers.models.{name}.modeling_{name}")
    before = {name: getattr(module, name) for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")}
    rule, convolution = (inspect.unwrap(function) for function in before.values())
    module.torch_chunk_gated_delta_rule, module.causal_conv1d_fn = _folded(rule), convolution
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def fold(num_tokens: int) -> tuple[int, int]:
    """How many sequences of how many tokens stand for one: with as few chunks more as can be."""
    chunks = -(-num_tokens // CHUNK_TOKENS)
    if chunks <= MOST_STEPS:
        return 1, num_tokens
    steps = min(FOLDED_STEPS, key=lambda steps: -chunks % steps)
    sequences = -(-chunks // steps)
    return sequences, -(-num_tokens // sequences)


def _folded(rule: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(*args: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        num_tokens = args[0].shape[1]
        sequences, tokens_each = fold(num_tokens)
        if sequences == 1:
            return rule(*args, g=g, beta=beta, **options)

        def folded(x: Tensor) -> Tensor:  # a view: a copy would be held while the rule runs
            return x[:, :1].expand(sequences, tokens_each, *x.shape[2:])

        output, state = rule(*map(folded, args), g=folded(g), beta=folded(beta), **options)
        return output.reshape(1, -1, *output.shape[2:])[:, :num_tokens], state

    return run
