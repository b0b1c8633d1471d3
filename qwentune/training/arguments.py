"""Transformers' arguments for a run whose batches, saves, logs and learning rates are ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from qwentune.recipe import LIKELIHOODS, OptimizerOptions, OutputOptions


def training_arguments(
    optimizer: OptimizerOptions,
    output: OutputOptions,
    *,
    name: str,
    periods: Mapping[str, int],
    staging: Path,
    num_steps: int,
    micro_batch: int,
    accumulation: int,
    evaluates: bool,
    deepspeed_bf16: bool,
    shards_weights: bool,
    seed: int,
    on_gpu: bool,
) -> TrainingArguments:
    """The arguments of a run, one epoch of `num_steps` steps: epochs of the data are the schedule's business.

    `periods` are the steps of those that `output` gives in epochs.
    """
    keeps_best = evaluates and (output.best is not None or output.early_stopping is not None)
    arguments = TrainingArguments(
        output_dir=str(staging),
        max_steps=num_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.max_grad_norm,
        save_strategy="steps",
        save_steps=output.save_every_steps or periods["save_every_epochs"],
        eval_strategy="steps" if evaluates else "no",
        eval_steps=(output.eval_every_steps or periods["eval_every_epochs"]) if evaluates else None,
        metric_for_best_model=output.followed if keeps_best else None,
        greater_is_better=output.followed not in LIKELIHOODS if keeps_best else None,
        logging_steps=output.log_every_steps,
        logging_nan_inf_filter=False,
        report_to=list(output.report_to),
        run_name=name,
        project=output.project or "huggingface",  # for trackio alone; the default is transformers'
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not on_gpu,
        bf16=deepspeed_bf16,  # never for autocast: weights and adapters have the dtype of the plan
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        average_tokens_across_devices=False,
    )
    if shards_weights:  # else FSDP2 holds whole gradients of all micro-batches but the last, in 16 bits, on every rank
        configuration: Any = arguments.accelerator_config
        configuration.gradient_accumulation_kwargs = {"sync_each_batch": True}
    # One process trains on one device: what other GPUs are visible must not make the Trainer use nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
