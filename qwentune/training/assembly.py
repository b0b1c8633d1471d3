"""The trainer of a run: its batches, model, optimizer's settings, evaluations and checkpoints, put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwentune.data.layout.batch import EvalBatches, TrainBatches
from qwentune.facts.generation_config import as_trained, read_generation_config
from qwentune.facts.launch import uses_deepspeed
from qwentune.model.head import LossHead
from qwentune.redaction import redact
from qwentune.training.arguments import training_arguments
from qwentune.training.held_out import HeldOut
from qwentune.training.learning_rate import learning_rate_of
from qwentune.training.network import network_to_train
from qwentune.training.probe import Probe
from qwentune.training.run import library_versions
from qwentune.training.shards import configure
from qwentune.training.stop import StopOnSignal
from qwentune.training.trackers import continue_record
from qwentune.training.trainer import SftTrainer

if TYPE_CHECKING:
    from qwentune.memory.closed_form.limit import Limit
    from qwentune.training.checkpoints import Checkpoint, Checkpoints
    from qwentune.training.progress import Recorder
    from qwentune.training.run import Run


def assembled(
    run: Run,
    base: Path,
    checkpoint: Checkpoint | None,
    checkpoints: Checkpoints,
    facts: dict[str, Any],
    recorder: Recorder | None,
    limit: Limit | None,
) -> tuple[SftTrainer, StopOnSignal]:
    """The trainer over the model, new or from the checkpoint, and what stops it on a signal."""
    recipe, ranks, choices = run.loaded.recipe, run.ranks, run.plan.choices
    evaluation = run.dataset.evaluation
    batches = TrainBatches(
        run.dataset.train, run.schedule, choices.micro_batch, choices.accumulation, ranks.rank, ranks.num_ranks
    )
    counts = run.dataset.report["stop_tokens"]
    stops = {name: run.tokenizer.control_ids[name] for name in counts}
    every = sum(counts.values()) == run.dataset.report["trained_spans"]
    batches.prove_first(0 if checkpoint is None else checkpoint.step, stops, every)
    generation = as_trained(read_generation_config(base), stops.values(), run.tokenizer.end_of_text_id)
    held_out = HeldOut.of(run.dataset, run.tokenizer, generation, recipe.output)
    if recipe.output.report_to and ranks.leads:
        continue_record(run.folder, recipe.output)
    arguments = training_arguments(
        recipe.optimizer,
        recipe.output,
        name=redact(recipe.output.run_name or run.folder.path.name),  # trackers get it
        periods=run.schedule.periods(recipe.output),
        staging=checkpoints.folder,
        num_steps=run.schedule.num_steps,
        micro_batch=choices.micro_batch,
        accumulation=choices.accumulation,
        evaluates=len(evaluation) > 0,
        deepspeed_bf16=uses_deepspeed(ranks.sharding) and choices.weights == "bf16",
        shards_weights=ranks.shards_weights,
        seed=recipe.seed,
        on_gpu=ranks.device.type == "cuda",
    )
    model, shards = network_to_train(
        base,
        checkpoint and checkpoint.folder,
        spec=run.spec,
        tuning=recipe.tuning,
        choices=choices,
        ranks=ranks,
        seed=recipe.seed,
        untaught_tokens=_untaught_tokens(run),
        has_media=run.has_media,
    )
    adds_in_fp32 = run.settings().adds_in_fp32
    minutes = recipe.output.save_every_minutes
    stop = StopOnSignal(None if minutes is None else minutes * 60)
    stop.install()
    trainer = SftTrainer(
        model=model,
        args=arguments,
        callbacks=[stop],
        batches=batches,
        eval_batches=EvalBatches(evaluation, ranks.rank, ranks.num_ranks) if len(evaluation) else None,
        loss_head=LossHead(model, choices.loss),
        learning_rate_factor=learning_rate_of(recipe.optimizer, run.schedule.num_steps),
        checkpoints=checkpoints,
        checkpoint_facts={"run": facts, "plan": run.plan.to_json(), "versions": library_versions()},
        recorder=recorder,
        limit=limit,
        held_out=held_out,
        followed=recipe.output.followed,
        patience=recipe.output.early_stopping,
        lora_plus_ratio=recipe.optimizer.lora_plus_ratio or 1.0,
        part_rates=recipe.tuning.part_rates,
        eight_bit=choices.optimizer_state == "8bit",
        fp32_sums=adds_in_fp32,
        shards=shards,
    )
    configure(trainer.accelerator, model, adds_in_fp32=adds_in_fp32)
    trainer.add_callback(Probe(trainer, run.measured))
    return trainer, stop


def _untaught_tokens(run: Run) -> list[int]:
    """The control tokens of the data whose rows a base model never learnt; none for one that was taught to chat."""
    eos = run.tokenizer.eos_token
    stops = run.dataset.report["stop_tokens"]
    if run.dataset.report["trained_turns"] == 0 or eos in stops:
        return []
    return list(run.dataset.control_ids_used)
