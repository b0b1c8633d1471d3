"""Evaluations of a run: the loss over all held-out rows, answers to some, and which evaluation was the best."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from qwentune.answering.answer import MOST_TOGETHER, Answer
from qwentune.data.layout.batch import Ahead, Batch, EvalBatches, TrainBatches
from qwentune.model.attention import prompts_for_trees
from qwentune.recipe import ScoreName
from qwentune.scores.likelihood import PERPLEXITY
from qwentune.training.best import has_stopped_improving
from qwentune.training.held_out import HeldOut
from qwentune.training.progress import Recorder
from qwentune.training.step import ExactStep
from qwentune.training.times import Times


class ExactEvaluation(ExactStep):
    """Mixin for a transformers Trainer: evaluations that leave no trace in what is trained."""

    eval_batches: EvalBatches | None
    held_out: HeldOut | None
    followed: ScoreName
    patience: int | None
    recorder: Recorder | None
    times: Times

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Batch]:
        assert self.eval_batches is not None
        return self._loader(self.eval_batches)

    def _loader(self, batches: TrainBatches | EvalBatches) -> DataLoader[Batch]:
        made = Ahead(batches, pinned=self.args.device.type == "cuda")
        return DataLoader(made, batch_size=1, shuffle=False, collate_fn=_only)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        step, model = self.state.global_step, self.model_wrapped
        assert model is not None
        with self.times.spending("evaluating"):
            model.eval()
            loss = self._eval_loss(model)
            answers = [] if self.held_out is None else self._answers(self.held_out)
            model.train()
        scores = {} if self.held_out is None else self.held_out.scores(answers)
        if self.followed == PERPLEXITY.name:
            scores[PERPLEXITY.name] = PERPLEXITY.shown(loss)
        if self.recorder is not None:
            self.recorder.evaluated(step, loss, scores)
            self.recorder.sampled([] if self.held_out is None else self.held_out.samples(step, answers))
        metrics = {"eval_loss": loss, **{f"eval_{name}": score for name, score in scores.items()}}
        self.state.log_history.append({"step": step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_loss(self, model: torch.nn.Module) -> float:
        """The mean over all trained tokens, without ever holding logits; the same on every rank."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        loader = self.get_eval_dataloader()
        with torch.no_grad():
            for done, inputs in enumerate(loader, 1):
                if self.recorder is not None:
                    self.recorder.evaluating("evaluating", done, len(loader))
                batch = self._prepare_inputs(inputs)
                totals[0] += self.loss_head.loss(model, batch)
                totals[1] += batch["weight"].sum()
        self.report.pass_mark()
        if self.args.world_size > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1])

    def _answers(self, held_out: HeldOut) -> list[Answer]:
        """The answer to each prompt, on every rank, which answers its share; all together where they share weights."""
        network: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        in_step = self.shards is not None or (self.is_deepspeed_enabled and self._shares_weights)
        rank, num_ranks = (0, 1) if in_step else (self.args.process_index, self.args.world_size)
        prompts = held_out.prompts()
        own = range(rank, len(prompts), num_ranks)
        speaker = held_out.speaker(network, most_together=MOST_TOGETHER, in_step=in_step)
        found: dict[int, Answer] = {}
        cards = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(cards), prompts_for_trees(network):
            for place, answer in speaker.answers([prompts[k] for k in own]):
                found[own[place]] = answer
                self.report.pass_mark()
                if self.recorder is not None:
                    self.recorder.evaluating("answering", len(found), len(own))
        for _ in range(math.ceil(len(prompts) / num_ranks) - len(own)):  # every rank passes as many
            self.report.pass_mark()
        if self.args.world_size > 1:
            parts: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(parts, found)
            # Of ranks that have answered all the first counts: what follows must be the same on each.
            found = {place: answer for part in reversed(parts) for place, answer in part.items()}
        return [found[k] for k in range(len(prompts))]

    @property
    def _shares_weights(self) -> bool:
        """Whether DeepSpeed's stage 3 has spread the weights over the ranks."""
        return any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())  # type: ignore[union-attr]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        evaluated = [int(row["step"]) for row in self.state.log_history]
        if is_best:
            self.control.should_save = True  # so that the best step is there to be published
        elif has_stopped_improving(evaluated, self.state.best_global_step, self.patience):
            self.control.should_save = True
            self.control.should_training_stop = True
        return is_best


def _only(items: list[Batch]) -> Batch:
    return items[0]
