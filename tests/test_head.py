"""The loss head: the same loss and gradients as the textbook formula, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import qwentune.model.head as head
from qwentune.model.head import LossHead


class Tiny(torch.nn.Module):
    """A model with an output layer, which picks positions as transformers' models do."""

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
    monkeypatch.setattr(head, "POSITIONS_PER_CHUNK", chunk)
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


def test_without_targets_the_head_gives_logits() -> None:
    model = Tiny()
    LossHead(model, "supervised")
    assert model(torch.zeros(1, 3, dtype=torch.long), logits_to_keep=slice(None)).logits.shape == (1, 3, 50)
