"""The last stage: packed rows become the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwentune.data.rows import Rows
from qwentune.data.schedule import Schedule
from qwentune.data.trie import Packed

Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[Packed], weight_scale: float) -> Batch:
    """Rows end to end as one sequence of T tokens in M trees with N supervised positions.

    `input_ids`, `position_ids`, `visible_until`: (1, T) int64; `predict_from`, `target`: (N,) int64; `weight`: (N,)
    float32, multiplied by `weight_scale`; `trees`: (M, 2) int64, the size of each and whether it branches. No row is
    padded.
    """
    starts = np.cumsum([0] + [len(row.input_ids) for row in rows[:-1]])

    def joined(name: str, shift: bool = False) -> torch.Tensor:
        parts = [getattr(row, name) + (start if shift else 0) for row, start in zip(rows, starts, strict=True)]
        return torch.as_tensor(np.concatenate(parts).astype(np.int64))

    weights = np.concatenate([row.weight for row in rows]).astype(np.float64) * weight_scale
    return {
        "input_ids": joined("input_ids")[None],
        "position_ids": joined("position_ids")[None],
        "visible_until": joined("visible_until", shift=True)[None],
        "predict_from": joined("predict_from", shift=True),
        "target": joined("target"),
        "weight": torch.as_tensor(weights.astype(np.float32)),
        "trees": torch.tensor([tree for row in rows for tree in row.trees]),
    }


@dataclass(frozen=True)
class TrainBatches(torch.utils.data.Dataset[Batch]):
    """The micro-batches of one rank, in order: item k belongs to optimizer step `k // accumulation`.

    Weights are divided by the trained weight of the whole optimizer batch over all ranks, so a micro-batch's loss is
    its share of the step's mean and neither accumulation nor the number of ranks changes the mathematics.
    """

    rows: Rows
    schedule: Schedule
    micro_batch: int
    accumulation: int
    rank: int
    num_ranks: int

    def __len__(self) -> int:
        return self.schedule.num_steps * self.accumulation

    def __getitem__(self, k: int) -> Batch:
        step, turn = divmod(k, self.accumulation)
        rows = self.schedule.rows(step)
        scale = 1.0 / sum(self.rows.trained_weight(row) for row in rows)
        start = (turn * self.num_ranks + self.rank) * self.micro_batch
        mine = rows[start : start + self.micro_batch]
        if not mine:  # a short last step leaves this rank nothing: it takes part with a row that weighs nothing
            return collate([self.rows[rows[0]]], 0.0)
        return collate([self.rows[row] for row in mine], scale)

    def sources(self, step: int) -> list[str]:
        """Where the samples of an optimizer step stand: `file:line`, each once."""
        members = [i for row in self.schedule.rows(step) for i in self.rows.examples_of(row)]
        return list(dict.fromkeys(str(self.rows.examples.source(i)) for i in members))


@dataclass(frozen=True)
class EvalBatches(torch.utils.data.Dataset[Batch]):
    """The evaluation rows of one rank, one at a time, with their own weights."""

    rows: Rows
    rank: int
    num_ranks: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.num_ranks)

    def __getitem__(self, k: int) -> Batch:
        row = self.rank + k * self.num_ranks
        if row >= len(self.rows):  # every rank runs as many forwards as the others
            return collate([self.rows[0]], 0.0)
        return collate([self.rows[row]], 1.0)
