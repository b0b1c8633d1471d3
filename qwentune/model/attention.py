"""What each token of a row may see, for the attention kernels: one rule over the trees of a batch.

Token q sees token k iff `k <= q < visible_until[k]` (`qwentune/data/trie.py`). The kernels are registered with
transformers under names of our own, and the rule reaches them as a keyword of the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
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
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",  # finds separate examples by position ids that begin again at 0
}
BLOCK_TOKENS = 128  # of FlexAttention
CHUNK_TOKENS = 384  # queries under one mask


def attention_arguments(implementation: str | None, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The keywords of a model's forward that make its attention keep to the trees of the batch."""
    if implementation in ("qwentune_sdpa", "qwentune_flex"):
        return {"visibility": Visibility.of(batch)}
    if implementation == "eager":  # adds its mask to the scores
        at = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        hidden = ~Visibility.of(batch).allowed(at, at)
        return {"attention_mask": torch.where(hidden, -torch.inf, 0.0)[None, None]}
    return {}


@dataclass(frozen=True)
class Visibility:
    """What the T tokens of a batch may see; made once for all layers.

    `visible_until`, `depths`: (T,) on the model's device. `trees`: size of each tree, and whether it branches.
    """

    visible_until: Tensor
    depths: Tensor
    trees: tuple[tuple[int, bool], ...]
    _chunks: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Visibility:
        """The visibility of a batch, whose `trees` lie on the CPU."""
        trees = tuple((int(size), bool(branches)) for size, branches in batch["trees"].tolist())
        return cls(batch["visible_until"][0], batch["position_ids"][0], trees)

    def allowed(self, q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
        """Which tokens `q` see which tokens `k`, both given by their places: (len(q), len(k)) bool.

        With a sliding `window` a token sees that many of its ancestors, itself counted.
        """
        q, k = q[:, None], k[None, :]
        allowed = (k <= q) & (q < self.visible_until[k])
        return allowed if window is None else allowed & (self.depths[q] - self.depths[k] < window)

    def chunk(self, tree: int, start: int, stop: int, window: int | None) -> tuple[Tensor, Tensor]:
        """The keys that tokens `start` to `stop` of the tree that begins at `tree` may need, and their mask."""
        found = self._chunks.get((start, window))
        if found is None:
            at = torch.arange(stop, device=self.visible_until.device)
            keys = at[tree:]
            if not at.is_cuda:  # counting them would wait for a GPU
                keys = keys[self.visible_until[tree:stop] > start]
            found = self._chunks[start, window] = keys, self.allowed(at[start:], keys, window)
        return found

    @cached_property
    def blocks(self) -> BlockMask:
        """The rule for FlexAttention: which blocks of keys each block of queries sees whole, in part, or not at all."""
        num_tokens = len(self.visible_until)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        padded = functional.pad(self.visible_until, (0, num_blocks * BLOCK_TOKENS - num_tokens)).to(torch.int32)
        ends = padded.view(num_blocks, BLOCK_TOKENS)
        number = torch.arange(num_blocks, device=padded.device)
        first = number * BLOCK_TOKENS
        last = torch.clamp(first + BLOCK_TOKENS, max=num_tokens) - 1
        before = number[None, :] < number[:, None]
        whole = before & (ends.amin(dim=1)[None, :] > last[:, None])
        some = (number[None, :] <= number[:, None]) & (ends.amax(dim=1)[None, :] > first[:, None]) & ~whole

        def rule(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < padded[k])

        return BlockMask.from_kv_blocks(
            *_listed(some),
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


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    visibility: Visibility,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention tree by tree, so that no mask spans two dialogues: (1, heads, T, D) in, (1, T, heads, D) out."""
    # The kernels that take grouped heads together with a mask, or in fp32, hold all scores.
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    outputs: list[Tensor] = []
    sizes = [size for size, _ in visibility.trees]
    spans = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    tree = 0
    for (size, branches), (q, k, v) in zip(visibility.trees, spans, strict=True):
        if not branches and (sliding_window is None or size <= sliding_window):
            outputs.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        else:
            for start, chunk in zip(range(0, size, CHUNK_TOKENS), q.split(CHUNK_TOKENS, 2), strict=True):
                keys, mask = visibility.chunk(tree, tree + start, tree + start + chunk.shape[2], sliding_window)
                seen = (x[:, :, : len(keys)] if x.is_cuda else x.index_select(2, keys - tree) for x in (k, v))
                outputs.append(functional.scaled_dot_product_attention(chunk, *seen, attn_mask=mask, **options))
        tree += size
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _flex(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    visibility: Visibility,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """FlexAttention over the whole batch: (1, heads, T, D) in, (1, T, heads, D) out."""
    assert sliding_window is None or query.shape[2] <= sliding_window, "use memory.attention: sdpa"
    kernel = _compiled_flex() if query.is_cuda else flex_attention
    output: Any = kernel(query, key, value, block_mask=visibility.blocks, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register("qwentune_sdpa", _sdpa)
AttentionInterface.register("qwentune_flex", _flex)
