"""Which modules carry adapters, and how many parameters they add."""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.facts.architecture import FUSED_ADAPTED_EXPERTS, ModelSpec
from qwentune.facts.modules import ATTENTION, EMBEDDINGS, FEED_FORWARD, LINEAR_ATTENTION, ROUTER, SHARED_GATE
from qwentune.memory.settings import Settings

_ALL_LINEAR = frozenset((*ATTENTION, *FEED_FORWARD, *LINEAR_ATTENTION, ROUTER, SHARED_GATE))


def target_names(settings: Settings) -> frozenset[str]:
    """The module names that carry adapters, without what stands before them; none in full tuning."""
    if settings.kind == "full":
        return frozenset()
    if settings.targets == "all-linear":
        return _ALL_LINEAR
    return frozenset(name.rpartition(".")[2] for name in settings.targets)


def adapts_experts(spec: ModelSpec, settings: Settings) -> bool:
    """Whether routed experts carry adapters: Qwen3's do, and there shared experts do not; Qwen2's do not."""
    return spec.model_type in FUSED_ADAPTED_EXPERTS and not target_names(settings).isdisjoint(FEED_FORWARD)


def adapts_head(settings: Settings) -> bool:
    """Whether an adapter stands around the output head."""
    return "lm_head" in target_names(settings)


def adapter_parameters(spec: ModelSpec, settings: Settings) -> int:
    """Parameters of all adapters; 0 in full tuning."""
    names = target_names(settings)
    hidden, query, kv = spec.hidden_size, spec.query_size, spec.kv_size
    attention = {
        "q_proj": hidden + spec.query_outputs,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": query + hidden,
    }
    total = spec.num_attention_layers * _adapted(attention, names)
    total += (spec.num_layers - spec.num_attention_layers) * _adapted(linear_attention_fans(spec), names)
    if (wide := adapted_intermediate(spec, settings)) > 0:
        total += spec.num_layers * _adapted(dict.fromkeys(FEED_FORWARD, hidden + wide), names)
    if spec.moe is not None:
        total += spec.num_layers * (_adapted(_gate_fans(spec), names) + adapted_expert_fans(spec, settings))
    total += (spec.vocab_rows + hidden) * sum(name in names for name in EMBEDDINGS)
    return settings.rank * total


def adapted_intermediate(spec: ModelSpec, settings: Settings) -> int:
    """Width of the feed-forward block whose linear modules carry adapters; 0 where there is none."""
    return 0 if adapts_experts(spec, settings) else spec.dense_intermediate


def linear_attention_fans(spec: ModelSpec) -> dict[str, int]:
    """Inputs and outputs together of each linear module of a layer of linear attention; empty without one."""
    if (linear := spec.linear_attention) is None:
        return {}
    heads, hidden = linear.num_value_heads, spec.hidden_size
    if spec.model_type == "qwen3_next":
        outputs = {"in_proj_qkvz": linear.conv_size + linear.value_size, "in_proj_ba": 2 * heads}
    else:
        outputs = {"in_proj_qkv": linear.conv_size, "in_proj_z": linear.value_size}
        outputs |= {"in_proj_b": heads, "in_proj_a": heads}
    return {name: hidden + size for name, size in outputs.items()} | {"out_proj": linear.value_size + hidden}


def _adapted(fans: Mapping[str, int], names: frozenset[str]) -> int:
    return sum(fan for name, fan in fans.items() if name in names)


def _gate_fans(spec: ModelSpec) -> dict[str, int]:
    """PEFT 0.21 adapts Qwen3's router and the gate of a shared expert; of Qwen2's the latter alone."""
    assert spec.moe is not None
    router = spec.hidden_size + spec.moe.num_experts if spec.model_type in FUSED_ADAPTED_EXPERTS else 0
    return {ROUTER: router, SHARED_GATE: spec.hidden_size + 1 if spec.moe.shared_intermediate else 0}


def adapted_expert_fans(spec: ModelSpec, settings: Settings) -> int:
    """Inputs and outputs of the adapted matrices of a layer's experts, once per rank.

    Gate and up are one fused matrix whose adapter has twice the rank.
    """
    if spec.moe is None or not adapts_experts(spec, settings):
        return 0
    names, inner = target_names(settings), spec.moe.expert_intermediate
    gate_up = 2 * (spec.hidden_size + 2 * inner) if names & {"gate_proj", "up_proj"} else 0
    down = inner + spec.hidden_size if "down_proj" in names else 0
    return spec.moe.num_experts * (gate_up + down)
