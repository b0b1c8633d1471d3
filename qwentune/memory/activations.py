"""Bytes that a decoder layer holds for its backward pass, per token.

Source: a trace on meta tensors of transformers 5.24's eager Qwen2, Qwen3 and Qwen3-MoE layers with peft 0.21, attention
replaced by a stub with FlashAttention's saved tensors, fitted over six to eight shapes: what a layer saves is met
within 0.2 %; the backward transient was taken at real Qwen shapes and errs by up to 5 % of it, upwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwentune.facts.architecture import ModelSpec
from qwentune.memory.adapters import adapts_experts, target_names
from qwentune.memory.settings import Settings

_FP32 = 4


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes of one layer: saved by its forward pass, and held on top while its backward pass runs.

    `boundary_bytes` is the layer's input, all that remains of a checkpointed layer.
    """

    boundary_bytes: int
    saved_bytes: int
    backward_bytes: int


def layer_activations(spec: ModelSpec, settings: Settings) -> LayerActivations:
    """The activations of one layer for one micro-batch."""
    width = settings.weight_bytes
    tokens = settings.forward_tokens
    saved = _norms_and_inputs(spec, settings) + _attention(spec, settings) + _feed_forward(spec, settings)
    boundary = width * spec.hidden_size
    experts = width * spec.expert_parameters_per_layer if adapts_experts(spec, settings) else 0
    return LayerActivations(
        boundary_bytes=tokens * boundary,
        # PEFT adds B·A of all experts to a copy of their weights, and autograd keeps the copy.
        saved_bytes=tokens * saved + experts,
        backward_bytes=tokens * _backward(spec, settings),
    )


def forward_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the widest point of one layer's forward pass without gradients, its input and output included."""
    width, hidden, inner = settings.weight_bytes, spec.hidden_size, spec.dense_intermediate
    is_adapted = not target_names(settings).isdisjoint(("gate_proj", "up_proj"))
    sums = settings.trained_bytes if is_adapted else width
    # The gate's output, the product with the base weight and, of an adapter, its part and the sum of both.
    feed_forward = (2 * width + 2 * sums if is_adapted else 3 * width) * inner
    experts = 0
    if spec.moe is not None:
        feed_forward += width * spec.moe.top_k * (3 * spec.moe.expert_intermediate + hidden)
        if adapts_experts(spec, settings):  # PEFT adds the adapters' product to the experts' fused weights
            experts = 2 * width * spec.moe.num_experts * 2 * spec.moe.expert_intermediate * hidden
    attention = width * (3 * spec.query_size + 2 * spec.kv_size) + 2 * _FP32 * hidden
    # The residual, the normed input and its casts for two adapters.
    casts = 2 * settings.trained_bytes if is_adapted and settings.trained_bytes != width else 0
    per_token = (2 * width + casts) * hidden + max(feed_forward, attention) + _scores(spec, settings)
    return settings.forward_tokens * per_token + experts


def mask_bytes(settings: Settings) -> int:
    """Bytes of the boolean attention mask and of the additive copy that SDPA makes of it."""
    if settings.attention not in ("sdpa", "eager"):
        return 0
    return settings.micro_batch * settings.max_tokens**2 * (1 + settings.weight_bytes)


def _norms_and_inputs(spec: ModelSpec, settings: Settings) -> int:
    """Both norms (fp32 inside) and the inputs of the linear modules that follow them."""
    width, hidden = settings.weight_bytes, spec.hidden_size
    if settings.kind == "full":
        return 2 * (_FP32 + 2 * width) * hidden
    names = target_names(settings)
    adapter_width = settings.trained_bytes
    total = 2 * _FP32 * hidden
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        num_adapted = sum(name in names for name in group)
        # Each adapter casts its input for itself; without a cast they share one.
        copies = num_adapted if adapter_width != width else min(num_adapted, 1)
        total += copies * adapter_width * hidden
    # The low-rank products in between.
    return total + len(names) * adapter_width * settings.rank


def _attention(spec: ModelSpec, settings: Settings) -> int:
    width, query, kv = settings.weight_bytes, spec.query_size, spec.kv_size
    trains_norms = settings.kind == "full"
    total = 2 * width * query + 2 * width * kv + _FP32 * spec.num_heads
    if spec.qk_norm:
        total += (_FP32 + (width if trains_norms else 0)) * (query + kv)
    if settings.kind != "full" and "o_proj" in target_names(settings) and settings.trained_bytes != width:
        total += settings.trained_bytes * query
    elif settings.attention == "sdpa" and (settings.kind == "full" or "o_proj" in target_names(settings)):
        # What it reads is put together from the trees' outputs, which are kept too.
        total += width * query
    if settings.attention in ("sdpa", "eager"):
        # With a mask these take keys and values repeated for every query head.
        total += 2 * width * (query - kv)
    return total + _scores(spec, settings)


def _scores(spec: ModelSpec, settings: Settings) -> int:
    """Eager attention keeps the probabilities of every head in fp32 and in the compute type."""
    if settings.attention != "eager":
        return 0
    return spec.num_heads * settings.max_tokens * (_FP32 + settings.weight_bytes)


def _feed_forward(spec: ModelSpec, settings: Settings) -> int:
    width = settings.weight_bytes
    total = 3 * width * spec.dense_intermediate
    if settings.kind == "full":
        total += width * spec.dense_intermediate
    elif "down_proj" in target_names(settings):
        total += settings.trained_bytes * spec.dense_intermediate
    if (moe := spec.moe) is not None:
        trains_experts = settings.kind == "full" or adapts_experts(spec, settings)
        copies = (2, 4) if trains_experts else (1, 3)
        total += width * moe.top_k * (copies[0] * spec.hidden_size + copies[1] * moe.expert_intermediate)
        total += 5 * moe.num_experts + 40 * moe.top_k
    return total


def _backward(spec: ModelSpec, settings: Settings) -> int:
    """Per token, at the feed-forward block, where the backward pass of a layer is widest."""
    width, hidden = settings.weight_bytes, spec.hidden_size
    names = target_names(settings)
    trains_down = settings.kind == "full" or "down_proj" in names
    total = (2 if trains_down else 3) * width * spec.dense_intermediate
    casts = settings.kind != "full" and settings.trained_bytes != width
    if casts and not names.isdisjoint(("gate_proj", "up_proj")):
        total += (2 * _FP32 + width) * hidden
    if spec.moe is not None:
        total += (4 if settings.kind == "full" else 3) * width * spec.moe.top_k * hidden + 3 * hidden
    return total + _scores(spec, settings)
