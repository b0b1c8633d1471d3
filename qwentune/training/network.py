"""The network that a run trains: new, or as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from qwentune import console
from qwentune.facts.architecture import ModelSpec
from qwentune.memory.run_plan import Choices
from qwentune.model.adapters import add_adapters, load_adapters
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.loading import load_model, recompute_layers
from qwentune.model.senses import freeze
from qwentune.model.sharded import Shards
from qwentune.recipe import Tuning
from qwentune.training.ranks import Ranks


def network_to_train(
    base: Path,
    checkpoint: Path | None,
    *,
    spec: ModelSpec,
    tuning: Tuning,
    choices: Choices,
    ranks: Ranks,
    seed: int,
    untaught_tokens: Sequence[int],
    has_media: bool,
) -> tuple[PreTrainedModel | PeftModel, Shards | None]:
    """A full one is built from the checkpoint, adapters are loaded onto the base.

    Under FSDP2 it is hollow, and this rank's rows of the weights stand beside it.
    """
    is_old = tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 23)
    if is_old and choices.sharding.startswith("zero3") and spec.moe is not None:
        console.say(
            "warning: each rank fuses all experts in host memory; transformers from 5.23 on does it layer by layer"
        )
    full = tuning.kind == "full"
    set_seed(seed)
    model = load_model(
        base if checkpoint is None or not full else checkpoint,
        dtype=choices.weights,
        four_bit=tuning.kind == "qlora",
        attention=IMPLEMENTATIONS[choices.attention],
        device=ranks.device,
        sharded=ranks.shards_weights,
        has_media=has_media,
    )
    shards = Shards(model) if ranks.shards_weights else None
    recompute_layers(model, choices.gradient_checkpointing, towers=tuning.towers != "frozen")
    if full:
        freeze(model, tuning.trained_parts)
        return model, shards
    if checkpoint is not None:
        return load_adapters(model, checkpoint, choices.adapters, tuning), shards
    if tuning.start_from is not None:
        return load_adapters(model, Path(tuning.start_from), choices.adapters, tuning), shards
    return add_adapters(model, tuning, choices.adapters, list(untaught_tokens), shards), shards
