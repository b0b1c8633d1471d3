"""The loss head: the same loss and gradients as the textbook formula, whatever the chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedConfig

import qwentune.model.head as head
from qwentune.memory.closed_form import phases as closed_form
from qwentune.model.adapters import add_adapters
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
    monkeypatch.setattr(head, "LOSS_CHUNK_TOKENS", chunk)
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
    monkeypatch.setattr(head, "LOSS_CHUNK_TOKENS", 3)
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


def test_the_plan_counts_the_logits_of_one_chunk() -> None:
    assert head.LOSS_CHUNK_TOKENS == closed_form.LOSS_CHUNK_TOKENS


def test_without_targets_the_head_gives_logits() -> None:
    model = Tiny()
    LossHead(model, "supervised")
    assert model(torch.zeros(1, 3, dtype=torch.long), logits_to_keep=slice(None)).logits.shape == (1, 3, 50)
