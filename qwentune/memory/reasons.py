"""Why a plan costs what surprises in it, in words."""

from __future__ import annotations

from collections.abc import Iterator

from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.adapter_sizes import adapts_experts, adapts_head
from qwentune.memory.closed_form.model_states import base_weight_bytes
from qwentune.memory.closed_form.terms import Terms
from qwentune.memory.settings import GIB, Settings

LARGE_SHARE = 0.25  # of the peak, or of the weights: what is less surprises nobody


def cost_reasons(spec: ModelSpec, settings: Settings, peak: Terms) -> tuple[str, ...]:
    """A sentence for each large cost that the settings alone do not explain; `peak` has a rank's terms at its worst."""
    return tuple(_reasons(spec, settings, peak))


def _reasons(spec: ModelSpec, settings: Settings, peak: Terms) -> Iterator[str]:
    weights = base_weight_bytes(spec, settings)
    experts = settings.weight_bytes * spec.num_layers * spec.expert_parameters_per_layer
    embedding = settings.weight_bytes * spec.embedding_parameters
    bits = 8 * settings.weight_bytes
    if settings.kind == "qlora" and experts:
        yield (
            f"Experts stay in {bits} bits, {_gib(experts)} of the {_gib(weights)} of weights: bitsandbytes quantises "
            "linear modules only, and transformers holds the experts of a layer as one tensor."
        )
    if settings.kind == "qlora" and embedding >= LARGE_SHARE * weights:
        yield (
            f"Embedding and head stay in {bits} bits, {_gib(embedding)} of the {_gib(weights)} of weights: "
            "bitsandbytes quantises the layers' linear modules only."
        )
    if adapts_experts(spec, settings):
        yield (
            f"Adapters on experts hold a copy of a layer's experts, {_gib(experts // spec.num_layers)} for each layer "
            "that is not recomputed: PEFT adds the adapter to the weights. Adapters on attention alone do without: "
            "tuning.targets=[q_proj,k_proj,v_proj,o_proj]"
        )
    if settings.num_ranks > 1 and settings.sharding == "ddp" and peak.weights >= LARGE_SHARE * peak.total:
        why = "bitsandbytes' 4-bit weights are not shared" if settings.kind == "qlora" else "fsdp2 would share them"
        yield f"Each of the {settings.num_ranks} processes holds all weights under ddp; {why}."
    if settings.towers is not None and settings.towers.is_bound and peak.media >= LARGE_SHARE * peak.total:
        yield (
            f"Pictures and sounds take {_gib(peak.media)} at most: a row is taken to hold nothing else, and of sounds "
            "the shortest, until `qwentune preview` has counted them."
        )
    if peak.cache >= LARGE_SHARE * peak.total:
        why = "output.samples, or an output.best that is no loss, asks for them"
        yield f"Answers of held-out prompts hold {_gib(peak.cache)} of keys and values: {why}."
    if settings.loss == "full" and peak.logits >= LARGE_SHARE * peak.total:
        why = "an adapter on lm_head makes them at once" if adapts_head(settings) else "memory.loss is full"
        yield f"The logits of all positions are held, {_gib(peak.logits)}: {why}."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
