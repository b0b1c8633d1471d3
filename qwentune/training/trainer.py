"""Batches, records, evaluation, checkpoints and resume, over transformers' Trainer: what every objective inherits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer import SCHEDULER_NAME

from qwentune.data.layout.batch import Batch, EvalBatches, TrainBatches
from qwentune.data.layout.tower_inputs import stays_on_cpu
from qwentune.durable import remove
from qwentune.errors import NotFiniteError, Problem, UserError
from qwentune.facts.towers import Part
from qwentune.memory.closed_form.limit import Limit
from qwentune.model.head import LossHead
from qwentune.model.sharded import Shards
from qwentune.recipe import ScoreName
from qwentune.training.best import was_best_by
from qwentune.training.checkpoints import Checkpoints
from qwentune.training.diagnose import first_not_finite
from qwentune.training.disk import disk_error
from qwentune.training.evaluation import ExactEvaluation
from qwentune.training.held_out import HeldOut
from qwentune.training.optimizer_states import read_states, write_states
from qwentune.training.progress import Recorder
from qwentune.training.reports import Report
from qwentune.training.times import Times
from qwentune.training.trackers import observe


class ExactResume(ExactEvaluation):
    """Mixin for a transformers Trainer: exact batches, lean step, atomic checkpoints, exact resume.

    Batches come from a pure function of the step. Nothing waits for the device between two log points. A step whose
    gradient is not finite ends the run when it is next logged.
    """

    def __init__(
        self,
        *,
        batches: TrainBatches,
        eval_batches: EvalBatches | None,
        loss_head: LossHead,
        learning_rate_factor: Callable[[int], float],
        checkpoints: Checkpoints,
        checkpoint_facts: Mapping[str, Any],
        recorder: Recorder | None,
        limit: Limit | None = None,
        held_out: HeldOut | None = None,
        followed: ScoreName = "loss",
        patience: int | None = None,
        lora_plus_ratio: float = 1.0,
        part_rates: Mapping[Part, float] | None = None,
        eight_bit: bool = False,
        fp32_sums: bool = False,
        shards: Shards | None = None,
        **options: Any,
    ) -> None:
        super().__init__(eval_dataset=eval_batches, **options)
        self.remove_callback(PrinterCallback)
        observe(self.callback_handler.callbacks)
        self.batches = batches
        self.eval_batches = eval_batches
        self.loss_head = loss_head
        self.learning_rate_factor = learning_rate_factor
        self.checkpoints = checkpoints
        self.checkpoint_facts = dict(checkpoint_facts)
        self.recorder = recorder
        self.limit = limit
        self.held_out = held_out
        self.followed = followed
        self.patience = patience
        self.lora_plus_ratio = lora_plus_ratio
        self.part_rates = part_rates or {}
        self.eight_bit = eight_bit
        self.fp32_sums = fp32_sums
        self.shards = shards
        self.report = Report()
        self.report.listen()
        self.times = Times()
        self._window_start, self._away_before = time.monotonic(), 0.0

    # Batches: already this rank's, already in order; nothing is left for accelerate to shard or shuffle.

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.batches)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Batch]:
        raise AssertionError("qwentune has no test set")

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> None:
        return None  # the batches' weights are normalised already

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # The stock method casts floats to DeepSpeed's dtype, which would round the weights.
        # Sizes are read on the CPU: on a GPU reading them would wait for the device.
        device = self.args.device
        return {n: t if stays_on_cpu(n, inputs) else t.to(device, non_blocking=True) for n, t in inputs.items()}

    # Logging.

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.times.stepped()
        if self.state.global_step == self.state.max_steps and not self._has_ended:  # transformers comes by here twice
            self._has_ended = True
            # The last step is logged and evaluated whatever the period.
            self.control.should_log = True
            self.control.should_evaluate = self.args.eval_strategy != "no"
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
            return
        step = self.state.global_step
        self._refuse_to_go_on_after_a_bad_step()
        now, away = time.monotonic(), self.times.away
        seconds = now - self._window_start - (away - self._away_before)  # the speed is that of training
        self._window_start, self._away_before = now, away
        rows = [row for k in range(self._window_first_step, step) for row in self.batches.schedule.rows(k)]
        tokens = sum(self.batches.rows.num_tokens[row] for row in rows)
        trained = sum(self.batches.rows.num_trained[row] for row in rows)
        documents = sum(len(self.batches.rows.examples_of(row)) for row in rows)
        share = None if self.limit is None else round(self.limit.share(tokens, documents, seconds), 4)
        self._window_first_step = step
        on_gpu = torch.cuda.is_available()
        row = {
            "step": step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "update_ratio": self._update_ratio(),
            "tokens": tokens,
            "trained_tokens": trained,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "limit_share": share,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "seconds": round(seconds, 4),
        }
        shown = {**logs, **{name: value for name, value in row.items() if name != "step" and value is not None}}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, shown)
        if self.recorder is not None:
            self.recorder.logged(row)

    def _refuse_to_go_on_after_a_bad_step(self) -> None:
        if self._first_bad_step is not None and (bad := self._first_bad_step.item()) != float("inf"):
            raise NotFiniteError(self._not_finite(int(bad)))

    def _not_finite(self, step: int) -> Problem:
        """What is known of a step whose gradient is not finite; weights and optimizer are those before it."""
        culprit = None
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:  # there no rank has the whole model
            model: Any = self.accelerator.unwrap_model(cast(Any, self.model))
            accumulation = self.batches.accumulation
            for k in range((step - 1) * accumulation, step * accumulation):
                batch = self._prepare_inputs(self.batches[k])
                culprit = first_not_finite(model, lambda batch=batch: self.loss_head.loss(model, batch))
                if culprit is not None:
                    break
            culprit = self._of_any_rank(culprit)
        what = f"not finite: {culprit or 'the gradient'}; weights and optimizer were left as they were before this step"
        sources = ", ".join(self.batches.sources(step - 1))
        return Problem(f"step {step}", what, f"Lower optimizer.learning_rate, or look at the rows: {sources}")

    def _of_any_rank(self, found: str | None) -> str | None:
        """The first rank's finding that is one; every rank asks, for all have met the same gradient."""
        if self.args.world_size == 1:
            return found
        findings: list[str | None] = [None] * self.args.world_size
        dist.all_gather_object(findings, found)
        return next((each for each in findings if each is not None), None)

    # Checkpoints: transformers writes into a staging folder, rank 0 publishes it.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging(self.state.global_step))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step != self._published_step:
            with self.times.spending("saving"):
                self._save_step(model, trial)

    def _save_step(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        self._refuse_to_go_on_after_a_bad_step()
        self._refuse_to_save_what_is_not_finite(model)
        try:
            if self.is_world_process_zero():
                self.checkpoints.begin(step)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._publish(step)
        except UserError:
            raise
        except Exception as error:  # three libraries write here, each with errors of its own
            explained = disk_error(error, self.checkpoints.run, f"step {step} could not be saved")
            if explained is None:
                raise
            if self.is_world_process_zero():  # which no other rank may take away under it
                with suppress(OSError):
                    remove(self.checkpoints.staging(step))
            raise explained from None
        self._published_step = step
        self.accelerator.wait_for_everyone()

    def _publish(self, step: int) -> None:
        if self.recorder is not None:
            self.recorder.folder.sync_records()
        spared = frozenset({self.state.best_global_step} if self.state.best_global_step else ())
        written = self.checkpoints.staging(step) / f"checkpoint-{step}"
        self.checkpoints.publish(written, step, self.checkpoint_facts, spared)
        if self.recorder is not None:
            self.recorder.saved(step, self.state.best_global_step or None)

    def _refuse_to_save_what_is_not_finite(self, model: nn.Module) -> None:
        bad = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not torch.isfinite(parameter).all()
        ]
        if bad:
            what = f"{len(bad)} weights are not finite and are not saved, the first: {bad[0]}"
            raise NotFiniteError(Problem(f"step {self.state.global_step}", what))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled and hasattr(self.model, "peft_config"):
            # The stock method gathers the frozen base in one rank's host memory too.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            self._save(output_dir, get_model_state_dict(cast(nn.Module, self.model), options=options))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The stock method adds a pickle of the arguments.
        assert output_dir is not None
        if not self.args.should_save:  # every rank comes here, and only the first has the gathered weights
            return
        model: Any = self.model
        unwrapped: Any = self.accelerator.unwrap_model(model)
        save_weights(unwrapped, Path(output_dir), state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        loss: Any = self._tr_loss
        window = {"loss": loss.item(), "last_logged_step": self._globalstep_last_logged}
        Path(output_dir, f"log_window_{self.args.process_index}.json").write_text(json.dumps(window))

    # Resume: the weights were loaded before the trainer was built, with every key proved.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The stock method writes the weights once more, and gathers all states in one rank's host memory.
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # rank 0 may not have come by here yet
        write_states(self.adamw, Path(output_dir), self.args.process_index)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            parameters = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
            self.adamw.load_state_dict(read_states(Path(checkpoint), parameters))
            scheduler_state = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
            cast(Any, self.lr_scheduler).load_state_dict(scheduler_state)
        # The states come from the checkpoint, the settings from the recipe: an allowed change of them must count.
        scheduler, optimizer = cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        factor = self.learning_rate_factor(scheduler.last_epoch)
        scheduler.base_lrs = [settings["initial_lr"] for settings in self._settings]
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update(settings, lr=settings["initial_lr"] * factor)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            # When to log, evaluate and save is what the recipe says now; transformers keeps what it said then.
            state = self.state
            state.compute_steps(self.args, state.max_steps)
            # The best by something else is no bar.
            if not was_best_by(self.followed, state.log_history, state.best_global_step, state.best_metric):
                state.best_global_step = state.best_metric = None
            windows = {path.stem: json.loads(path.read_bytes()) for path in Path(checkpoint).glob("log_window_*.json")}
            own = windows[f"log_window_{self.args.process_index if len(windows) == self.args.world_size else 0}"]
            if len(windows) != self.args.world_size:  # what is logged is the mean of all ranks
                own["loss"] = sum(window["loss"] for window in windows.values()) / len(windows)
            self._tr_loss += own["loss"]
            self._globalstep_last_logged = own["last_logged_step"]
            self._window_first_step = own["last_logged_step"]

    _has_ended: bool = False
    _published_step: int | None = None
    _window_first_step: int = 0


class SftTrainer(ExactResume, Trainer):
    """Supervised fine-tuning on conversations and texts."""


def save_weights(model: nn.Module, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Writes a model's weights, or only its adapters, as safetensors with their configuration."""
    options: dict[str, Any] = {}
    if hasattr(model, "peft_config"):
        options["save_embedding_layers"] = False  # `auto` asks the hub for the base's vocabulary size
    model.save_pretrained(str(folder), state_dict=state_dict, **options)  # type: ignore[operator]
