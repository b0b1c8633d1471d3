"""The last stage: packed rows become the tensors of a micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from qwentune.data.cache import cache_folder
from qwentune.data.layout.media_table import RunMedia, UnloadableError
from qwentune.data.layout.row_media import NUM_AHEAD
from qwentune.data.layout.rows import Rows
from qwentune.data.layout.schedule import Schedule
from qwentune.data.layout.trie import Packed
from qwentune.data.media.pads import pad_of
from qwentune.errors import DataError, Problem

Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[Packed], weight_scale: float, media: RunMedia | None = None) -> Batch:
    """Rows end to end as one sequence of T tokens in M trees with N supervised positions.

    `input_ids`, `position_ids`, `visible_until`: (1, T) int64; `predict_from`, `target`: (N,) int64; `weight`: (N,)
    float32, multiplied by `weight_scale`; `trees`: (M, 2) int64, the size of each and whether it branches. No row is
    padded. With `media`, also what `layout/media_batch.py` says, and where positions have a time, a row and a column
    `position_ids` is (3, 1, T) and `depths` (1, T). UnloadableError where a medium cannot be read.
    """
    starts = np.cumsum([0] + [len(row.input_ids) for row in rows[:-1]])

    def joined(name: str, shift: bool = False) -> torch.Tensor:
        parts = [getattr(row, name) + (start if shift else 0) for row, start in zip(rows, starts, strict=True)]
        return torch.as_tensor(np.concatenate(parts).astype(np.int64))

    weights = np.concatenate([row.weight for row in rows]).astype(np.float64) * weight_scale
    batch = {
        "input_ids": joined("input_ids")[None],
        "position_ids": joined("position_ids")[None],
        "visible_until": joined("visible_until", shift=True)[None],
        "predict_from": joined("predict_from", shift=True),
        "target": joined("target"),
        "weight": torch.as_tensor(weights.astype(np.float32)),
        "trees": torch.tensor([tree for row in rows for tree in row.trees]),
    }
    if media is None:
        return batch
    from qwentune.data.layout.media_batch import with_media

    return with_media(batch, rows, media)


def collated(rows: Rows, chosen: Sequence[int], weight_scale: float) -> Batch:
    """The batch of some rows, or the rows that show a medium that cannot be had: ResumeError where it is another than
    was rendered, DataError where it cannot be read.
    """
    try:
        return collate([rows[row] for row in chosen], weight_scale, rows.media)
    except UnloadableError as unloadable:
        assert rows.media is not None
        pad = pad_of(unloadable.number)
        examples = dict.fromkeys(i for row in chosen for i in rows.examples_of(row))
        sources = dict.fromkeys(str(rows.examples.source(i)) for i in examples if pad in rows.examples.ids(i))
        raise rows.media.fault(unloadable, ", ".join(sources)) from None


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
        rows = self.schedule.rows(k // self.accumulation)
        scale = 1.0 / sum(self.rows.trained_weight(row) for row in rows)
        mine = self._mine(k)
        if not mine:  # a short last step leaves this rank nothing: it takes part with a row that weighs nothing
            return collated(self.rows, rows[:1], 0.0)
        return collated(self.rows, mine, scale)

    def _mine(self, k: int) -> list[int]:
        step, turn = divmod(k, self.accumulation)
        start = (turn * self.num_ranks + self.rank) * self.micro_batch
        return self.schedule.rows(step)[start : start + self.micro_batch]

    def sources(self, step: int) -> list[str]:
        """Where the samples of an optimizer step stand: `file:line`, each once."""
        return self._sources(self.schedule.rows(step))

    def _sources(self, rows: Sequence[int]) -> list[str]:
        members = [i for row in rows for i in self.rows.examples_of(row)]
        return list(dict.fromkeys(str(self.rows.examples.source(i)) for i in members))

    def prove_first(self, step: int, stops: Mapping[str, int], every_span_stops: bool) -> None:
        """Raises DataError unless the first batch of every rank in a step carries loss and its stop tokens.

        `stops` are the names and ids of the tokens that end trained spans of this data: every one of them, or those
        that were rendered so. Each rank looks at the batches of all, so that none waits for one that was refused.
        """
        problems: list[Problem] = []
        for rank in range(self.num_ranks):
            if fault := replace(self, rank=rank)._fault(step * self.accumulation, stops, every_span_stops):
                where, what = fault
                fix = (
                    "`qwentune preview` shows what a sample trains. Where it is right there, the rendered data was "
                    f"damaged: remove {cache_folder() / 'data'} and start again."
                )
                problems.append(Problem(where, f"step {step + 1}: the first batch of rank {rank} {what}", fix))
        if problems:
            raise DataError(problems, "No step was taken.")

    def _fault(self, k: int, stops: Mapping[str, int], every_span_stops: bool) -> tuple[str, str] | None:
        """The first sample of micro-batch k and what the batch fails to train; None where all is well."""
        rows = self._mine(k)
        if not rows:
            return None
        where, *others = self._sources(rows)
        these = f"({len(others) + 1} samples)"
        if not sum(self.rows.trained_weight(row) for row in rows):
            return where, f"{these} carries no loss"
        batch = collate([self.rows[row] for row in rows], 1.0)
        trained = Counter(map(int, batch["target"][batch["weight"] > 0]))
        examples = [self.rows.examples.example(i) for row in rows for i in self.rows.examples_of(row)]
        ends = [token for example in examples for token in example.last_tokens]
        num_ends = len(ends) if every_span_stops else sum(token in stops.values() for token in ends)
        num_stops = sum(trained[token] for token in stops.values())
        if num_stops < num_ends:
            names = " or ".join(stops)
            return where, f"{these} trains {names} {num_stops} times, though {num_ends} trained spans end so"
        return None


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
            return collated(self.rows, [0], 0.0)
        return collated(self.rows, [row], 1.0)


class Ahead(torch.utils.data.Dataset[Batch]):
    """Batches that are asked for one after the other; the next ones are made in threads meanwhile, `pinned` or not.

    A batch is a function of its number alone, so what was made and never asked for is no progress. Reading and scaling
    pictures lets go of Python's lock, and threads hand a batch over without a copy.
    """

    def __init__(self, batches: TrainBatches | EvalBatches, *, pinned: bool = False) -> None:
        self.batches = batches
        self.pinned = pinned
        self.num_ahead = 1 if batches.rows.media is None else NUM_AHEAD
        self.threads = ThreadPoolExecutor(self.num_ahead, thread_name_prefix="batches")
        self.begun: dict[int, Future[Batch]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Batch:
        wanted = range(k, min(k + 1 + self.num_ahead, len(self)))
        for place in [place for place in self.begun if place not in wanted]:
            self.begun.pop(place).cancel()
        for place in wanted:
            if place not in self.begun:
                self.begun[place] = self.threads.submit(self._make, place)
        return self.begun.pop(k).result()

    def _make(self, k: int) -> Batch:
        batch = self.batches[k]
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pinned else batch
