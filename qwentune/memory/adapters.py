"""Which modules carry adapters, and how many parameters they add."""

from __future__ import annotations

from qwentune.errors import Problem, UsageError, nearest
from qwentune.facts.architecture import ModelSpec
from qwentune.memory.settings import Settings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_EMBEDDINGS = ("embed_tokens", "lm_head")
KNOWN = (*ATTENTION, *_FEED_FORWARD, *_EMBEDDINGS)


def target_names(settings: Settings) -> frozenset[str]:
    """The module names that carry adapters; none in full tuning.

    Raises:
        UsageError: names that no Qwen model has (all of them, each with the nearest).
    """
    if settings.kind == "full":
        return frozenset()
    if settings.targets == "all-linear":
        return frozenset((*ATTENTION, *_FEED_FORWARD))
    names = [name.rpartition(".")[2] for name in settings.targets]
    problems = [
        Problem(
            "tuning.targets",
            f"'{name}' is not a module of Qwen's decoders.{nearest(name, KNOWN)}",
            f"Use all-linear, or some of {', '.join(KNOWN)}.",
        )
        for name in names
        if name not in KNOWN
    ]
    if problems:
        raise UsageError(problems)
    return frozenset(names)


def adapts_experts(spec: ModelSpec, settings: Settings) -> bool:
    """Whether routed experts carry adapters: PEFT maps the names onto Qwen3's fused experts, not onto Qwen2's."""
    return spec.model_type == "qwen3_moe" and not target_names(settings).isdisjoint(_FEED_FORWARD)


def adapter_parameters(spec: ModelSpec, settings: Settings) -> int:
    """Parameters of all adapters; 0 in full tuning."""
    names = target_names(settings)
    hidden, query, kv = spec.hidden_size, spec.query_size, spec.kv_size
    wide = spec.dense_intermediate
    fans = {
        "q_proj": hidden + query,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": query + hidden,
        "gate_proj": hidden + wide if wide else 0,
        "up_proj": hidden + wide if wide else 0,
        "down_proj": wide + hidden if wide else 0,
    }
    per_layer = settings.rank * sum(fan for name, fan in fans.items() if name in names)
    if spec.moe is not None and settings.kind != "full":
        if settings.targets == "all-linear":
            per_layer += settings.rank * _router_fans(spec)
        if adapts_experts(spec, settings):
            per_layer += settings.rank * spec.moe.num_experts * _expert_fans(spec, names)
    embeddings = settings.rank * (spec.vocab_rows + hidden) * sum(name in names for name in _EMBEDDINGS)
    return spec.num_layers * per_layer + embeddings


def _router_fans(spec: ModelSpec) -> int:
    """PEFT 0.21 adapts Qwen3's router, and of Qwen2's only the gate of the shared expert."""
    outputs = spec.moe.num_experts if spec.moe and spec.model_type == "qwen3_moe" else 1
    return spec.hidden_size + outputs


def _expert_fans(spec: ModelSpec, names: frozenset[str]) -> int:
    """Of one expert; gate and up are one fused matrix whose adapter has twice the rank."""
    inner = spec.moe.expert_intermediate if spec.moe else 0
    gate_up = 2 * (spec.hidden_size + 2 * inner) if names & {"gate_proj", "up_proj"} else 0
    down = inner + spec.hidden_size if "down_proj" in names else 0
    return gate_up + down
