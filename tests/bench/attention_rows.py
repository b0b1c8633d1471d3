"""Milliseconds of one attention layer, forward and backward, on a GPU: the kernels beside each other.

    python tests/bench/attention_rows.py

Rows of bf16 with the heads of Qwen3-8B, of chains of one length each and of trees that branch; the last column is
FlexAttention ÷ SDPA. The first call of each kernel, which compiles, is not counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from qwentune.data.layout.batch import collate
from qwentune.data.layout.trie import lay_out
from qwentune.model.attention import KERNELS, Visibility

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def row(tokens: int, length: int, branches: bool) -> Visibility:
    """A row of chains of `length` tokens, or of trees of it: two thirds in common, then two branches."""
    rng = np.random.default_rng(0)
    shared = length * 2 // 3
    trees = []
    for _ in range(tokens // length):
        ids = rng.integers(0, 1000, length).astype(np.int32)
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0.0  # the first token of an example is never predicted
        if branches:
            end = length * 5 // 6
            other = np.concatenate([ids[:shared], ids[end:]])
            trees.append([(ids[:end], weights[:end]), (other, weights[: len(other)])])
        else:
            trees.append([(ids, weights)])
    batch = collate([lay_out(trees)], 1.0)
    return Visibility.of({name: tensor if name == "trees" else tensor.cuda() for name, tensor in batch.items()})


def milliseconds(attend: Attend, tokens: int) -> float:
    """The best of ten repetitions."""
    shapes = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (
        torch.randn(1, heads, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in shapes
    )
    found: list[float] = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        attend(q, k, v).sum().backward()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return min(found[2:])


def with_kernel(name: str, visibility: Visibility) -> Attend:
    """One of our kernels."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return KERNELS[name](q, k, v, visibility, None, scale=HEAD_DIM**-0.5, dropout_p=0.0)

    return attend


def with_varlen(visibility: Visibility) -> Attend:
    """torch's own kernel for rows of chains."""
    causal = inspect.signature(varlen_attn).parameters
    how = {"is_causal": True} if "is_causal" in causal else {"window_size": (-1, 0)}  # torch 2.10, and since
    sizes = [size for size, _ in visibility.trees]
    starts = torch.tensor([0, *np.cumsum(sizes)], device="cuda", dtype=torch.int32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        k, v = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1) for x in (k, v))
        return varlen_attn(q, k, v, starts, starts, max(sizes), max(sizes), **how)

    return attend


def main() -> None:
    """Prints the table."""
    print("| row | sdpa ms | flex ms | varlen ms | flex ÷ sdpa |\n|---|---|---|---|---|")
    for tokens in (4096, 16384):
        for length, branches in [*((n, False) for n in (tokens, 1024, 256, 64)), (tokens, True), (1024, True)]:
            visibility = row(tokens, length, branches)
            held = len(visibility.visible_until)
            sdpa, flex = (
                milliseconds(with_kernel(name, visibility), held) for name in ("qwentune_sdpa", "qwentune_flex")
            )
            torch_own = "-" if branches else f"{milliseconds(with_varlen(visibility), held):.2f}"
            kind = "trees" if branches else "chains"
            cells = f"{sdpa:.2f} | {flex:.2f} | {torch_own} | {flex / sdpa:.2f}"
            print(f"| {tokens // length} {kind} of {length} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
