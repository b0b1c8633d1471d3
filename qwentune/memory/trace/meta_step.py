"""The training step of a recipe on meta tensors: the real model class, adapters, checkpointing and loss head.

Kernels that do not run on meta are replaced by functions that save the same tensors for the backward pass.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.media import FAMILIES
from qwentune.facts.models import config_of, whole_config_of
from qwentune.memory.closed_form.terms import Terms
from qwentune.memory.settings import Settings
from qwentune.memory.trace.delta_rule import traceable_delta_rule
from qwentune.memory.trace.live_bytes import FEWEST_BLOCKS, Bytes, Step, peak, trace
from qwentune.memory.trace.moving import embedding_weights, fp32_sums, optimizer_of, standing_in
from qwentune.memory.trace.replay import BLOCKS_OF_A_KIND, Recording, depth, record
from qwentune.memory.trace.stand_ins import (
    TOWER_ATTENTION,
    attention_probe,
    fused_dropout,
    hold_in_4_bits,
    no_autocast,
    unpacked_for_dora,
)
from qwentune.memory.trace.tower_step import MediaBatch, freeze_towers, tower_modules
from qwentune.model.adapters import add_adapters
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.head import LossHead
from qwentune.model.loading import DTYPES, recompute_layers
from qwentune.model.senses import attention_of, network_class, take_media
from qwentune.recipe import Tuning

TRAINED_ROWS = (0, 1)  # how many counts for little: each is a row of the embedding


def traced_peak(spec: ModelSpec, settings: Settings) -> Terms:
    """The worst moment of the training step of one unsharded rank, device workspaces left out."""
    build, num_recomputed, num_kept = _steps(spec, settings)
    with traceable(spec, settings):
        _, terms = peak(trace(build, num_recomputed, num_kept, fewest_blocks(spec, settings)))
    return _terms(terms)


def traced_evaluation(spec: ModelSpec, settings: Settings) -> Terms:
    """The worst moment of an evaluation, which takes one row at a time; device workspaces left out."""
    settings = replace(settings, micro_batch=1, accumulation=1, gradient_checkpointing=False)
    build, _, num_blocks = _steps(spec, settings)
    with traceable(spec, settings):
        fewest = fewest_blocks(spec, settings)
        _, terms = peak(trace(lambda _, kept: evaluation_of(build(0, kept)), 0, num_blocks, fewest))
    return _terms(terms)


def fewest_blocks(spec: ModelSpec, settings: Settings) -> int:
    """Blocks that are traced as they are: pictures are added again after the first layers of some models.

    The one after them, and the last, still differ from those between.
    """
    vision = None if spec.tower is None or not settings.forward_patches else spec.tower.vision
    return max(FEWEST_BLOCKS, len(vision.deepstack) + 3 if vision and vision.deepstack else 0)


def evaluation_of(step: Step) -> Step:
    """The evaluation of a step's batch in place of the step."""

    def loss() -> Tensor:
        with torch.no_grad():
            return step.loss()

    step.network.eval()
    return replace(step, loss=loss, optimize=lambda: None)


def _terms(terms: Bytes) -> Terms:
    return Terms(
        weights=terms.get("weights", 0),
        adapters=terms.get("adapters", 0),
        gradients=terms.get("gradients", 0),
        optimizer=terms.get("optimizer", 0),
        activations=terms.get("activations", 0) + terms.get("recomputed", 0),
        logits=terms.get("logits", 0),
        temporaries=terms.get("temporaries", 0),
        towers=terms.get("towers", 0),
        media=terms.get("media", 0),
    )


def recorded_step(spec: ModelSpec, settings: Settings) -> tuple[Recording, list[int]]:
    """The same step as the allocator sees it, and which recorded block each block of the model is like."""
    build, num_recomputed, num_kept = _steps(spec, settings)
    counts = min(num_recomputed, BLOCKS_OF_A_KIND), min(num_kept, BLOCKS_OF_A_KIND)
    with traceable(spec, settings):
        return record(build(*counts), counts[0]), depth(num_recomputed, num_kept)


def _steps(spec: ModelSpec, settings: Settings) -> tuple[Callable[[int, int], Step], int, int]:
    """What makes the step of so many recomputed and kept blocks, and how many the model has of each."""
    num_recomputed, rest = divmod(settings.num_checkpointed(spec.num_layers), spec.period)
    assert not rest, "the plan recomputes whole periods"
    described = config_of(spec) if settings.towers is None else whole_config_of(spec)
    config = AutoConfig.for_model(**described)  # pyright: ignore[reportArgumentType]

    def build(recomputed: int, kept: int) -> Step:
        return meta_step(config, settings, recomputed * spec.period, kept * spec.period, spec.num_layers)

    return build, num_recomputed, spec.num_layers // spec.period - num_recomputed


def meta_step(
    config: PreTrainedConfig, settings: Settings, num_recomputed: int, num_kept: int, num_layers: int | None = None
) -> Step:
    """One step of a model with as many layers, the first `num_recomputed` of them recomputed.

    Its optimizer moves what a model of `num_layers` has, for what that takes does not grow evenly with the depth.
    """
    network = meta_network(config, settings, num_recomputed + num_kept)
    return step_of(network, settings, num_recomputed, meta_batch(settings, config), num_layers)


def step_of(
    network: Any, settings: Settings, num_recomputed: int, batch: dict[str, Tensor], num_layers: int | None = None
) -> Step:
    """One step of a network whose base weights are there, on meta or not; the optimizer's states are there too."""
    layers = list(network.get_decoder().layers)
    recomputed = num_recomputed if num_recomputed < len(layers) else True
    recompute_layers(network, recomputed, towers=settings.recomputes_towers)
    towers = tower_modules(network)
    period = _period(network.config.get_text_config())
    freeze_towers(network, settings)
    if settings.kind != "full":
        with torch.device(layers[0].input_layernorm.weight.device):
            rows = TRAINED_ROWS if settings.trains_rows else ()
            network = add_adapters(network, _tuning(settings), settings.adapters, rows)
    network.train()
    head = LossHead(network, settings.loss)
    head.attention = IMPLEMENTATIONS["eager"]  # so that probes hear of the batch's trees too
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    blocks = [layers[at : at + period] for at in range(0, len(layers), period)]
    optimizer, states = optimizer_of(trained, embedding_weights(network), settings)
    moving = optimizer if num_layers is None else standing_in(network, blocks, settings, num_layers // period)
    if settings.adds_in_fp32:
        optimizer.sums = fp32_sums(trained)
    elif settings.accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)

    def optimize() -> None:
        if settings.adds_in_fp32:
            optimizer.add_up()
        moving.step()

    media = MediaBatch.of(batch)
    return Step(
        network=network,
        blocks=blocks,
        loss=lambda: head.loss(network, batch),
        optimize=optimize,
        states=states,
        sums={**optimizer.sums},
        is_adapted=settings.kind != "full",
        towers=towers,
        media=media.tensors,
    )


def _tuning(settings: Settings) -> Tuning:
    values: dict[str, Any] = {
        "kind": settings.kind,
        "rank": settings.rank,
        "targets": settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        "dropout": 0.5 if settings.drops else 0.0,
        "variant": "dora" if settings.dora else "plain",
    }
    if settings.towers is not None and settings.towers.is_tuned:
        values |= {"towers": settings.towers.body, "merger": settings.towers.merger}
    return Tuning.model_validate(values)


def _period(config: PreTrainedConfig) -> int:
    types = list(getattr(config, "layer_types", None) or [])
    return types.index("full_attention") + 1 if "linear_attention" in types else 1


def meta_network(config: PreTrainedConfig, settings: Settings, num_layers: int) -> Any:
    """The model class of the configuration with random nothing in it, cut to `num_layers`."""
    config = deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    dtype = DTYPES[settings.weights]
    attention: Any = attention_of(config, attention_probe(settings))
    if isinstance(attention, dict):
        attention = {name: attention[name] if name == "text_config" else TOWER_ATTENTION for name in attention}
    with torch.device("meta"):
        network = network_class(config)._from_config(config, dtype=dtype, attn_implementation=attention)
        if settings.kind == "qlora":
            hold_in_4_bits(network, dtype)
    network.config.use_cache = network.config.get_text_config().use_cache = False
    if config.model_type in FAMILIES:
        take_media(network)
    return network


def meta_batch(settings: Settings, config: PreTrainedConfig | None = None) -> dict[str, Tensor]:
    """A micro-batch of full rows, every token trained, with the media of the settings for a model of `config`."""
    num_tokens, meta = settings.forward_tokens, torch.device("meta")
    row = torch.empty((1, num_tokens), dtype=torch.int64, device=meta)
    flat = row[0]
    batch = {
        "input_ids": row,
        "position_ids": row,
        "visible_until": row,
        "predict_from": flat,
        "target": flat,
        "weight": flat.float(),
        "trees": torch.tensor([[settings.max_tokens, settings.branches]] * settings.micro_batch, dtype=torch.int64),
    }
    if settings.towers is None or config is None:
        return batch
    return {**batch, **MediaBatch.on_meta(settings, config).tensors_by_name}


@contextmanager
def traceable(spec: ModelSpec, settings: Settings) -> Iterator[None]:
    """Lets the model run on meta tensors."""
    with (
        no_autocast(),
        fused_dropout(),
        unpacked_for_dora(),
        traceable_delta_rule(spec.model_type, settings) if spec.linear_attention else nullcontext(),
    ):
        yield
