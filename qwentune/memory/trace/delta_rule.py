"""The gated delta rule of hybrids as a trace runs it: transformers' own code in torch, or what fused kernels hold.

Transformers' rule walks over the chunks of a sequence one by one, which takes a trace of a long sequence minutes.
Folded into a batch of shorter sequences it holds the same tensors for its backward pass; only what lives within one
step is wider, less than a hundredth of the whole.

Where flash-linear-attention and causal-conv1d are installed, transformers takes their kernels, which do not run on
meta: functions that make and save the same tensors stand for them. Source: fla-core 0.6.0's `chunk_gated_delta_rule`
in Triton (its other backends, such as FlashQLA, were not read) and causal-conv1d 1.5's `CausalConv1dFn`; both by
reading, without a GPU to measure on.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qwentune.memory.settings import Settings

CHUNK_TOKENS = 64  # of transformers' rule and of fla's
MOST_STEPS = 12  # of a sequence that stays as it is
FOLDED_STEPS = (8, 7, 6, 5)


@contextmanager
def traceable_delta_rule(model_type: str, settings: Settings) -> Iterator[None]:
    """Lets the hybrids of that type run on meta: probes for the kernels of the settings, else the rule folded."""
    name = model_type.removesuffix("_text")
    module: Any = import_module(f"transformers.models.{name}.modeling_{name}")
    before = {name: getattr(module, name) for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")}
    rule, convolution = (inspect.unwrap(function) for function in before.values())
    module.torch_chunk_gated_delta_rule = _fused_rule if settings.fuses_delta_rule else _folded(rule)
    module.causal_conv1d_fn = _fused_convolution if settings.fuses_convolution else convolution
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


def _fused_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, Tensor | None]:
    return _FusedRule.apply(query, key, value, g, beta), None


class _FusedRule(torch.autograd.Function):
    """Saves normed queries and keys with their scales, values, summed gates, betas and a solved matrix per chunk."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        query, key, value, g, beta = (x.contiguous() for x in (query, key, value, g, beta))
        normed = [(torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)) for x in (query, key)]
        sums = torch.empty_like(g, dtype=torch.float32)
        solved = key.new_empty(*value.shape[:3], CHUNK_TOKENS)
        ctx.save_for_backward(*normed[0], *normed[1], value, sums, beta, solved)
        running = _running(key, value)  # noqa: F841 - alive beside the output
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, _, key, _, value, sums, beta, _ = ctx.saved_tensors
        by_query, by_key, *others = _gradients(query, key, value, sums, beta, gradients[0].contiguous())
        by_query = torch.empty_like(by_query)  # through the norm
        return by_query, torch.empty_like(by_key), *others


def _running(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """What the passes hold at once: keys and values of the triangular system, corrected values, states of chunks."""
    batch, num_tokens, heads, value_dim = value.shape
    states = key.new_empty(batch, -(-num_tokens // CHUNK_TOKENS), heads, key.shape[-1], value_dim)
    return _per_value_head(key, value), torch.empty_like(value), torch.empty_like(value), states


def _per_value_head(key: Tensor, value: Tensor) -> Tensor:
    return key.new_empty(*value.shape[:3], key.shape[-1])


def _gradients(query: Tensor, key: Tensor, value: Tensor, sums: Tensor, beta: Tensor, output: Tensor) -> list[Tensor]:
    """The gradients by normed queries and keys, values, gates and betas; all that they need is alive until the end."""
    running = _running(key, value)
    by_value = torch.empty_like(output)
    by_states = torch.empty_like(running[3])  # noqa: F841 - alive as the kernels' are
    by_value = torch.empty_like(by_value)
    by_query, by_key = _per_value_head(query, value), _per_value_head(key, value)
    by_gate, by_system = torch.empty_like(sums), torch.empty_like(by_key)  # noqa: F841
    groups = value.shape[2] // key.shape[2]
    if groups > 1:  # each key serves as many value heads, whose gradients are summed
        by_query, by_key = torch.empty_like(query), torch.empty_like(key)
    by_key_again = _per_value_head(key, value)
    by_value = torch.empty_like(by_value)
    if groups > 1:
        by_key_again = torch.empty_like(key)  # noqa: F841
    return [by_query, by_key, by_value, torch.empty_like(by_gate), torch.empty_like(beta)]


def _fused_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    assert bias is None, "Qwen's have none"
    return _FusedConvolution.apply(x, weight)


class _FusedConvolution(torch.autograd.Function):
    """Saves its input, whose layout it keeps, and computes the activation again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
