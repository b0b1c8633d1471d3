"""The longest batches of a run, tried once before its first step: what they really take of the GPU's memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwentune.data.layout.batch import Batch, collated
from qwentune.data.layout.rows import Rows

if TYPE_CHECKING:
    from qwentune.training.trainer import ExactResume

Peaks: TypeAlias = dict[str, int]  # bytes by name, torch's `max_memory_allocated`

NUM_STEPS = 2  # the optimizer's state is there from the first on, and beside gradients and activations in the second


class Probe(TrainerCallback):
    """Runs the longest training and evaluation batch before step 1 and leaves no trace of it; on a GPU it measures.

    `measured` is called with the peaks of both, and again when two steps have been taken (`steps`). Under DeepSpeed,
    whose engine steps when it goes backward, batches are run forward only.
    """

    def __init__(self, trainer: ExactResume, measured: Callable[[Peaks], None]) -> None:
        self.trainer = trainer
        self.measured = measured
        self.peaks: Peaks = {}
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs the batches; raises torch's OutOfMemoryError where they do not fit."""
        trainer = self.trainer
        self.first_step = state.global_step
        on_gpu = args.device.type == "cuda"
        with torch.random.fork_rng([args.device] if on_gpu else []):
            for batch in largest(trainer.batches.rows, trainer.batches.micro_batch):
                self._try("train", batch, trains=True)
            if trainer.eval_batches is not None:
                for batch in largest(trainer.eval_batches.rows, 1):
                    self._try("evaluate", batch, trains=False)
        if on_gpu:
            self.measured(self.peaks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reads the peak of the first steps."""
        if state.global_step - self.first_step == NUM_STEPS and args.device.type == "cuda":
            self.peaks = {**self.peaks, "steps": torch.cuda.max_memory_allocated()}
            self.measured(self.peaks)

    def _try(self, name: str, batch: Batch, *, trains: bool) -> None:
        trainer = self.trainer
        model: Any = trainer.model_wrapped
        on_gpu = trainer.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        goes_back = trains and not trainer.is_deepspeed_enabled
        model.train(trains)
        with torch.set_grad_enabled(goes_back):
            loss = trainer.loss_head.loss(model, trainer._prepare_inputs(batch))
        if goes_back:
            trainer.accelerator.backward(loss)
            model.zero_grad(set_to_none=True)
        model.train()
        if on_gpu:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def largest(rows: Rows, count: int) -> Iterator[Batch]:
    """The batch of the rows with the most tokens and, where others have the most patches or sounds, of those."""
    sizes: list[Callable[[int], int]] = [rows.num_tokens.__getitem__]
    if rows.media is not None:
        sizes += [lambda row: rows.shown[row].patches, lambda row: rows.shown[row].frames]
    tried: list[list[int]] = []
    for size in sizes:
        chosen = sorted(heapq.nlargest(count, range(len(rows)), key=size))
        if chosen not in tried and any(map(size, chosen)):
            tried.append(chosen)
            yield collated(rows, chosen, 1.0 / sum(rows.trained_weight(row) for row in chosen))
