"""What each token of a row may see, for the attention kernels: one rule over the trees of a batch.

Token q sees token k iff `k <= q < visible_until[k]` (`qwentune/data/layout/trie.py`). The kernels are registered with
transformers under names of our own, and the rule reaches them as a keyword of the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

# What a model is told to use for each value of `memory.attention`.
IMPLEMENTATIONS = {
    "sdpa": "qwentune_sdpa",
    "flex_attention": "qwentune_flex",
    "eager": "qwentune_eager",
    "flash_attention_2": "flash_attention_2",  # transformers' own, which is told where examples begin
}
BLOCK_TOKENS = 128  # of FlexAttention
CHUNK_TOKENS = 384  # queries under one mask


def attention_arguments(implementation: str | None, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The keywords of a model's forward that make its attention keep to the trees of the batch."""
    if implementation in KERNELS:
        return {"visibility": Visibility.of(batch)}
    return _varlen_arguments(batch) if implementation == "flash_attention_2" else {}


@contextmanager
def prompts_for_trees(network: Any) -> Iterator[None]:
    """Makes a network whose attention keeps to trees take padded prompts, as `generate` gives them, for a while."""
    text = network.config.get_text_config()
    kept: str = text._attn_implementation
    text._attn_implementation = "sdpa" if kept in KERNELS else kept
    try:
        yield
    finally:
        text._attn_implementation = kept


def _varlen_arguments(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Where examples begin and how long the longest is, as transformers' `FlashAttentionKwargs`.

    Without them every layer looks for it in the position ids, and waits for the GPU.
    """
    sizes = batch["trees"][:, 0]  # each an example, for FlashAttention shares no prefixes
    starts = functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    starts = starts.to(batch["input_ids"].device, non_blocking=True)
    longest = int(sizes.max())  # on the CPU
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class Visibility:
    """What the T tokens of a batch may see; made once for all layers.

    `visible_until`, `depths`: (T,) on the model's device. `trees`: size of each tree, and whether it branches.
    """

    visible_until: Tensor
    depths: Tensor
    trees: tuple[tuple[int, bool], ...]
    _chunks: dict[tuple[int, int | None, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _blocks: dict[int | None, BlockMask] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Visibility:
        """The visibility of a batch, whose `trees` lie on the CPU."""
        trees = tuple((int(size), bool(branches)) for size, branches in batch["trees"].tolist())
        depths = batch.get("depths", batch["position_ids"])  # beside positions with three axes
        return cls(batch["visible_until"][0], depths[0], trees)

    def allowed(self, q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
        """Which tokens `q` see which tokens `k`, both given by their places: (len(q), len(k)) bool.

        With a sliding `window` a token sees that many of its ancestors, itself counted.
        """
        q, k = q[:, None], k[None, :]
        allowed = (k <= q) & (q < self.visible_until[k])
        return allowed if window is None else allowed & (self.depths[q] - self.depths[k] < window)

    def chunk(self, tree: int, start: int, stop: int, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys that tokens `start` to `stop` of the tree that begins at `tree` may need, and their mask.

        The mask is what is added to the scores, 0 or -inf: of booleans SDPA would make such a mask in every layer, and
        autograd would keep each.
        """
        found = self._chunks.get((start, window, dtype))
        if found is None:
            at = keys = torch.arange(tree, stop, device=self.visible_until.device)
            if at.device.type == "cpu":  # counting them would wait for a GPU
                keys = at[self.visible_until[tree:stop] > start]
            hidden = ~self.allowed(at[start - tree :], keys, window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)
            found = self._chunks[start, window, dtype] = keys, mask
        return found

    def blocks(self, window: int | None) -> BlockMask:
        """The rule for FlexAttention: which blocks of keys each block of queries sees whole, in part, or not at all."""
        if window not in self._blocks:
            self._blocks[window] = self._block_mask(window)
        return self._blocks[window]

    def _block_mask(self, window: int | None) -> BlockMask:
        num_tokens = len(self.visible_until)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        rest = num_blocks * BLOCK_TOKENS - num_tokens
        visible_until = functional.pad(self.visible_until, (0, rest)).to(torch.int32)
        depths = functional.pad(self.depths, (0, rest)).to(torch.int32)
        ends = visible_until.view(num_blocks, BLOCK_TOKENS)
        number = torch.arange(num_blocks, device=ends.device)
        first = number * BLOCK_TOKENS
        last = torch.clamp(first + BLOCK_TOKENS, max=num_tokens) - 1
        some = (number[None, :] <= number[:, None]) & (ends.amax(dim=1)[None, :] > first[:, None])
        whole = (number[None, :] < number[:, None]) & (ends.amin(dim=1)[None, :] > last[:, None])
        if window is not None:  # whether a block is seen whole depends on depths too: the rule is asked for every pair
            whole = torch.zeros_like(whole)

        def rule(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = (k <= q) & (q < visible_until[k])
            return allowed if window is None else allowed & (depths[q] - depths[k] < window)

        return BlockMask.from_kv_blocks(
            *_listed(some & ~whole),
            *_listed(whole),
            BLOCK_SIZE=BLOCK_TOKENS,
            mask_mod=rule,
            seq_lengths=(num_tokens, num_tokens),
        )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a boolean matrix the number of chosen columns, and the columns, the chosen ones first."""
    counts = chosen.sum(dim=1, dtype=torch.int32)
    columns = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), columns[None, None].contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, window: int | None, **options: Any) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)

    return tree_by_tree(attend, q, k, v, visibility, window, copies=q.device.type == "cpu")


def tree_by_tree(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    window: int | None,
    *,
    copies: bool,
) -> Tensor:
    """Attention in which no mask spans two dialogues; `attend` takes queries, keys, values and a mask, None if causal.

    With `copies` a chunk of queries gets a copy of the keys that it needs, else a view of all before it.
    """
    # The kernels that take grouped heads together with a mask, or in fp32, hold all scores.
    k, v = _for_every_query_head(q, k), _for_every_query_head(q, v)
    outputs: list[Tensor] = []
    sizes = [size for size, _ in visibility.trees]
    spans = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    tree = 0
    for (size, branches), (q, k, v) in zip(visibility.trees, spans, strict=True):
        if not branches and (window is None or size <= window):
            outputs.append(attend(q, k, v, None))
        else:
            for start, chunk in zip(range(0, size, CHUNK_TOKENS), q.split(CHUNK_TOKENS, 2), strict=True):
                keys, mask = visibility.chunk(tree, tree + start, tree + start + chunk.shape[2], window, q.dtype)
                seen_k, seen_v = (x.index_select(2, keys - tree) if copies else x[:, :, : len(keys)] for x in (k, v))
                outputs.append(attend(chunk, seen_k, seen_v, mask))
        tree += size
    return torch.cat(outputs, dim=2)


def _flex(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, window: int | None, **options: Any) -> Tensor:
    """FlexAttention over the whole batch; it knows no dropout, and Qwen has none."""
    kernel = _compiled_flex() if q.is_cuda else flex_attention
    blocks = visibility.blocks(window)
    return kernel(q, k, v, block_mask=blocks, scale=options["scale"], enable_gqa=True)  # type: ignore[return-value]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _eager(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, window: int | None, **options: Any) -> Tensor:
    """The textbook formula over the whole batch, softmax in fp32."""
    at = torch.arange(q.shape[2], device=q.device)
    scores = q @ _for_every_query_head(q, k).transpose(2, 3) * options["scale"]
    scores = scores.masked_fill(~visibility.allowed(at, at, window), -torch.inf)
    shares = functional.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), options["dropout_p"])
    return shares @ _for_every_query_head(q, v)


def _for_every_query_head(q: Tensor, x: Tensor) -> Tensor:
    return repeat_kv(x, q.shape[1] // x.shape[1])


KERNELS = {"qwentune_sdpa": _sdpa, "qwentune_flex": _flex, "qwentune_eager": _eager}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    visibility: Visibility,
    scaling: float,
    kernel: Callable[..., Tensor],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (1, heads, T, D) in, (1, T, heads, D) out."""
    output = kernel(query, key, value, visibility, sliding_window, scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous(), None


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(_name, partial(_attention, kernel=_kernel))
