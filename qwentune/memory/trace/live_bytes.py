"""Live bytes of a real training step by region and term, traced at two and three blocks and exact at any depth.

The caller builds the step, on meta tensors or real ones. A block is what repeats: a layer, or a period of different
ones. A region is the forward or the backward pass of a block, the embedding, the head, or the optimizer step. In each
region the peak is linear in the number of blocks, so that two shallow copies give every deeper model; blocks that are
recomputed and blocks that are not count separately.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The unit in which CUDA's allocator hands out memory and torch counts it.
BLOCK_BYTES = 512
# Blocks of a kind that are traced as they are: a first one and a last one. What those between hold grows or falls
# evenly from one to the next, so the worst moment is at an end.
FEWEST_BLOCKS = 2

Bytes: TypeAlias = Mapping[str, int]
Key: TypeAlias = weakref.ref[Any]  # to a storage


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, or the evaluation of a batch, whose loss has no gradient.

    `blocks` are the layers in groups that are all alike. `states` are the optimizer's by parameter, as they are between
    steps; gradients that earlier micro-batches left lie in `.grad`, or have gone into the `sums` of a parameter.
    `is_adapted` says that what is trained are adapters. `towers` are what sees and hears, `media` what a batch has for
    them.
    """

    network: nn.Module
    blocks: Sequence[Sequence[nn.Module]]
    loss: Callable[[], Tensor]
    optimize: Callable[[], None]
    states: Mapping[Tensor, Sequence[Tensor]]
    sums: Mapping[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])
    is_adapted: bool = False
    towers: Sequence[nn.Module] = ()
    media: Sequence[Tensor] = ()


def trace(
    build: Callable[[int, int], Step], num_recomputed: int, num_kept: int, fewest: int = FEWEST_BLOCKS
) -> dict[str, dict[str, int]]:
    """Bytes by term at the worst moment of each region of a step.

    Args:
        build: Makes the step of a model whose first blocks are recomputed and whose other blocks are kept.
        num_recomputed, num_kept: How many blocks the true model has of each.
        fewest: Blocks of a kind that are traced as they are.
    """
    counts = (min(num_recomputed, fewest), min(num_kept, fewest))
    shallow = live_bytes(build(*counts), counts[0])
    found = {region: Counter(terms) for region, terms in shallow.items()}
    for more, count, whole in (((1, 0), counts[0], num_recomputed), ((0, 1), counts[1], num_kept)):
        if whole == count:
            continue
        deeper = live_bytes(build(counts[0] + more[0], counts[1] + more[1]), counts[0] + more[0])
        for region, terms in shallow.items():
            for term in {*terms, *deeper[region]}:
                found[region][term] += (whole - count) * (deeper[region].get(term, 0) - terms.get(term, 0))
    return {region: dict(terms) for region, terms in found.items()}


def peak(moments: Mapping[str, Bytes]) -> tuple[str, Bytes]:
    """The region with the most bytes, and what they are for."""
    region = max(moments, key=lambda name: sum(moments[name].values()))
    return region, moments[region]


def live_bytes(step: Step, num_recomputed: int) -> dict[str, dict[str, int]]:
    """Bytes by term at the worst moment of each region of the step, which is run once."""
    live = LiveStorage()
    watch(step, num_recomputed, live)
    return live.moments


def watch(step: Step, num_recomputed: int, live: LiveStorage) -> None:
    """Runs the step once under a mode that sees every storage come and go."""
    trained = [parameter for parameter in step.network.parameters() if parameter.requires_grad]
    if step.is_adapted:
        live.hold("adapters", trained)
    live.hold("towers", (x for tower in step.towers for x in (*tower.parameters(), *tower.buffers())))
    live.hold("media", step.media)
    live.hold("weights", (*step.network.parameters(), *step.network.buffers()))
    live.hold("optimizer", (state for states in step.states.values() for state in states))
    live.hold("gradients", step.sums.values())
    live.hold("gradients", (parameter.grad for parameter in trained if parameter.grad is not None))
    hooks = [parameter.register_post_accumulate_grad_hook(live.holds_gradient) for parameter in trained]
    names = _block_names(num_recomputed, len(step.blocks))
    for name, block in zip(names, step.blocks, strict=True):
        hooks += _mark(live, block, name)
    for tower in step.towers:
        hooks += _mark_tower(live, tower)
    hooks.append(step.blocks[-1][-1].register_forward_hook(lambda *_: live.enter("head")))
    with live:
        live.enter("embedding")
        loss = step.loss()
        if loss.requires_grad:
            loss.backward()
        del loss
        live.enter("optimizer")
        step.optimize()
    for hook in hooks:
        hook.remove()


def _block_names(num_recomputed: int, num_blocks: int) -> list[str]:
    """Names that copies of different depth share: all blocks between a first and a last one have the same."""
    names: list[str] = []
    for kind, count in (("recomputed", num_recomputed), ("kept", num_blocks - num_recomputed)):
        places = ["first", *["middle"] * (count - 2), "last"] if count > 1 else ["first"] * count
        names += [f"{place} {kind}" for place in places]
    return names


def _mark(live: LiveStorage, block: Sequence[nn.Module], name: str) -> list[Any]:
    """Hooks that tell when the forward and the backward pass of a block begin."""

    def begin_forward(*_: Any) -> None:
        if not live.is_backward:  # else the block is being recomputed
            live.enter(f"forward {name}")

    def end_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not live.is_backward and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: live.enter(f"backward {name}"))

    return [block[0].register_forward_pre_hook(begin_forward), block[-1].register_forward_hook(end_forward)]


def _mark_tower(live: LiveStorage, tower: nn.Module) -> list[Any]:
    """Hooks that tell when a tower's forward and backward pass begin; its forward pass is part of the embedding's."""

    def end_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
        live.enter("embedding")
        embeds = output if isinstance(output, Tensor) else output[0]
        if embeds.requires_grad:
            embeds.register_hook(lambda _gradient: live.enter("backward tower"))

    return [
        tower.register_forward_pre_hook(lambda *_: live.enter("tower")),
        tower.register_forward_hook(end_forward),
    ]


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and nobody has released, by region and term."""

    def __init__(self) -> None:
        super().__init__()
        self.region = ""
        self.moments: dict[str, dict[str, int]] = {}
        self._now: Counter[str] = Counter()
        self._total = 0
        self._peak = 0
        self._terms: dict[Key, tuple[str, int]] = {}

    @property
    def is_backward(self) -> bool:
        return self.region.startswith(("backward", "optimizer"))

    def enter(self, region: str) -> None:
        self.region = region
        self._peak = sum(self.moments.get(region, {}).values())
        self._look()

    def hold(self, term: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._add(tensor, term)

    def holds_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = weakref.ref(parameter.grad.untyped_storage())
        if key in self._terms:
            term, size = self._terms[key]
            self._now[term] -= size
            self._now["gradients"] += size
            self._terms[key] = "gradients", size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, self._term())
        if not self.adds_in_place(func):
            self._look()
        return out

    def adds_in_place(self, func: Any) -> bool:
        """Whether the engine, which adds up gradients of one tensor, would do it in place if no mode watched."""
        return func is torch.ops.aten.add.Tensor and self.is_backward and not torch.is_grad_enabled()

    def _term(self) -> str:
        if self.region.startswith("backward"):
            # Only what is recomputed runs with gradients in the backward pass.
            return "recomputed" if torch.is_grad_enabled() else "temporaries"
        return {"head": "logits", "optimizer": "temporaries", "tower": "media"}.get(self.region, "activations")

    def _add(self, tensor: Tensor, term: str) -> None:
        storage = tensor.untyped_storage()
        if weakref.ref(storage) in self._terms:
            return
        key = weakref.ref(storage, self.released)
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._terms[key] = term, size
        self._now[term] += size
        self._total += size
        self.made(key, size)

    def made(self, key: Key, size: int) -> None:
        """Called for every storage that comes."""

    def released(self, key: Key) -> None:
        """Called for every storage that goes."""
        term, size = self._terms.pop(key)
        self._now[term] -= size
        self._total -= size

    def _look(self) -> None:
        if self._total > self._peak or self.region not in self.moments:
            self._peak = self._total
            self.moments[self.region] = dict(self._now)
