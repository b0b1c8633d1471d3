"""The loss head: the same loss and gradients as the textbook formula, whatever the chunk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch._inductor import metrics
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

import qwentune.model.chunked_loss as chunks
from qwentune.memory.closed_form import phases as closed_form
from qwentune.model.adapters import add_adapters
from qwentune.model.chunked_loss import LOSS_CHUNK_TOKENS, ChunkedCrossEntropy, losses
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from tests.checkpoints import add_weights, write_checkpoint


class Tiny(torch.nn.Module):
    """A model with an output layer, which picks positions as transformers' models do."""

    config = PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.lm_head = torch.nn.Linear(16, 50, bias=False)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.lm_head

    def forward(self, input_ids, position_ids=None, use_cache=False, logits_to_keep=None):
        class Output:
            logits = self.lm_head(self.embedding(input_ids)[:, logits_to_keep, :])

        return Output()


@pytest.mark.parametrize("kind", ["full", "supervised"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_weighted_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, kind: str, frozen: bool, chunk: int
) -> None:
    monkeypatch.setattr(chunks, "LOSS_CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    model = Tiny()
    model.lm_head.weight.requires_grad_(not frozen)
    batch = {
        "input_ids": torch.randint(0, 50, (1, 40)),
        "position_ids": torch.arange(40)[None],
        "predict_from": torch.arange(0, 40, 2),
        "target": torch.randint(0, 50, (20,)),
        "weight": torch.rand(20),
    }
    logits = model(batch["input_ids"], logits_to_keep=batch["predict_from"]).logits[0]
    expected = (functional.cross_entropy(logits, batch["target"], reduction="none") * batch["weight"]).sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected_grads = torch.autograd.grad(expected, trained)

    loss = LossHead(model, kind).loss(model, batch)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(loss, trained), expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_some_of_whose_rows_are_trained_is_chunked_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tied: bool
) -> None:
    monkeypatch.setattr(chunks, "LOSS_CHUNK_TOKENS", 3)
    base = add_weights(write_checkpoint(tmp_path, "qwen3", tied=tied))
    batch = {
        "input_ids": torch.arange(10)[None],
        "position_ids": torch.arange(10)[None],
        "predict_from": torch.arange(9),
        "target": torch.arange(1, 10),
        "weight": torch.full((9,), 1 / 9),
        "trees": torch.tensor([[10, 0]]),
    }
    results = []
    for kind in ("full", "supervised"):
        torch.manual_seed(0)
        model = add_adapters(load_model(base, dtype="fp32"), Tuning(kind="lora"), "fp32", [3, 7])
        loss_head = LossHead(model, kind)
        assert loss_head.chunked is (kind == "supervised")
        loss = loss_head.loss(model, batch)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (chunked_loss, chunked_grads) = results
    torch.testing.assert_close(chunked_loss, loss)
    assert any("trainable_tokens_delta" in name for name in grads)
    assert chunked_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(chunked_grads[name], grad, rtol=1e-4, atol=1e-6)


def test_the_plan_counts_the_logits_of_one_chunk_and_a_slice_of_them() -> None:
    assert chunks.LOSS_CHUNK_TOKENS == closed_form.LOSS_CHUNK_TOKENS
    assert chunks.LOSS_SLICES == closed_form.LOSS_SLICES


def test_without_targets_the_head_gives_logits() -> None:
    model = Tiny()
    LossHead(model, "supervised")
    assert model(torch.zeros(1, 3, dtype=torch.long), logits_to_keep=slice(None)).logits.shape == (1, 3, 50)


class Watched(TorchDispatchMode):
    """Counts what is dispatched but views and allocations, its bytes read and written, and the largest results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.traffic = 0
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if not func.is_view and not any(name in str(func) for name in ("empty", "detach")):
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.kernels += 1
            self.traffic += sum(value.numel() * value.element_size() for value in (*read, *made))
        for value in made:
            self.largest[value.dtype] = max(self.largest.get(value.dtype, 0), value.numel())
        return result


VOCABULARY = 5000


def positions(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, 64), torch.randn(VOCABULARY, 64) * 0.3
    target, share = torch.randint(0, VOCABULARY, (count,)), torch.rand(count) / count
    return hidden.to(dtype), weight.to(dtype), target, share


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("has_rows", [True, False])
def test_16_bit_logits_have_no_fp32_beside_them_and_no_more_than_a_chunk(learns: bool, has_rows: bool) -> None:
    hidden, weight, target, share = positions(1500, torch.bfloat16)
    rows = (torch.tensor([3, 7]), torch.randn(2, 64, requires_grad=learns)) if has_rows else (None, None)
    with Watched() as watched:
        ChunkedCrossEntropy.apply(hidden.requires_grad_(learns), weight, target, share, *rows, False)
    chunk = LOSS_CHUNK_TOKENS * VOCABULARY
    assert watched.largest[torch.bfloat16] == chunk
    assert watched.largest[torch.float32] <= chunk / 8
    assert watched.largest.get(torch.bool, 0) <= LOSS_CHUNK_TOKENS * 2


def test_each_loss_of_16_bit_logits_is_that_of_fp32_without_as_many_in_fp32() -> None:
    hidden, weight, target, _ = positions(300, torch.bfloat16)
    logits = hidden @ weight.T
    with Watched() as watched:
        found = losses(logits, target)
    assert watched.largest[torch.float32] <= logits.numel() / 8
    torch.testing.assert_close(found, functional.cross_entropy(logits.float(), target, reduction="none"))


def test_a_chunk_moves_no_more_than_it_did() -> None:
    hidden, weight, target, share = positions(LOSS_CHUNK_TOKENS, torch.bfloat16)
    with Watched() as watched:
        ChunkedCrossEntropy.apply(hidden.requires_grad_(), weight, target, share, None, None, False)
    assert watched.kernels <= 48
    assert watched.traffic / LOSS_CHUNK_TOKENS / VOCABULARY < 41  # 60 when all was in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_nearly_certain_still_has_its_slope(dtype: torch.dtype) -> None:
    """In 16 bits the probability is one."""
    hidden, weight = torch.zeros(1, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    hidden[0, 0], weight[1, 0] = 1, 8
    target, share = torch.tensor([1]), torch.ones(1)
    loss = ChunkedCrossEntropy.apply(hidden.requires_grad_(), weight, target, share, None, None, False)
    (grad,) = torch.autograd.grad(loss, hidden)
    expected = -8 * 3 * math.exp(-8)
    assert grad[0, 0].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_rows", [True, False])
def test_a_compiled_chunk_is_six_kernels_and_the_same_loss(dtype: torch.dtype, has_rows: bool) -> None:
    """At most two graphs whatever the number of positions, so that no batch changes what another computes."""
    hidden, weight, target, share = positions(1500, dtype)
    of_rows = torch.randn(2, 64, requires_grad=True)
    target[:4] = torch.tensor([3, 7, 3, 9])
    rows = (torch.tensor([3, 7]), of_rows) if has_rows else (None, None)
    trained = [hidden.requires_grad_(), weight.requires_grad_(), *([of_rows] if has_rows else [])]
    results = []
    for is_compiled in (False, True):
        metrics.reset()
        loss = ChunkedCrossEntropy.apply(hidden, weight, target, share, *rows, is_compiled)
        results.append((loss, torch.autograd.grad(loss, trained)))
    assert 0 < metrics.generated_kernel_count <= (2 * 6 if not has_rows else 2 * 12)
    (loss, grads), (compiled_loss, compiled_grads) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    near = 1e-5 if dtype == torch.float32 else 8e-3
    for found, wanted in zip(compiled_grads, grads, strict=True):
        assert (found - wanted).norm() <= near * wanted.norm()
    before = metrics.generated_kernel_count
    for count in (1, 100, 256, 257, 1023, 1400):
        ChunkedCrossEntropy.apply(hidden[:count], weight, target[:count], share[:count], *rows, True)
    assert metrics.generated_kernel_count == before
