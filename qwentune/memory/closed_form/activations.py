"""Bytes that a decoder layer holds for its backward pass, per token.

Source: a trace on meta tensors of transformers 5.24's eager Qwen2, Qwen3 and Qwen3-MoE layers with peft 0.21, attention
replaced by a stub with FlashAttention's saved tensors, fitted over six to eight shapes: what a layer saves is met
within 0.2 %; the backward transient was taken at real Qwen shapes and errs by up to 5 % of it, upwards. Layers of
linear attention were fitted likewise with transformers' delta rule in torch, at heads 128 wide: within 1 % in bf16,
2 % in fp32. With fused kernels the tensors were counted in their source.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwentune.facts.architecture import LinearAttentionSpec, ModelSpec
from qwentune.facts.modules import ATTENTION, FEED_FORWARD, SHARED_GATE
from qwentune.memory.closed_form.adapter_sizes import (
    adapted_expert_fans,
    adapted_intermediate,
    adapts_experts,
    linear_attention_fans,
    target_names,
)
from qwentune.memory.settings import Settings

_FP32 = 4
CHUNK_TOKENS = 384  # queries under one mask


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes of one layer: saved by its forward pass, and held on top while its backward pass runs.

    `boundary_bytes` is the layer's input, all that remains of a checkpointed layer. `experts_bytes` is held on top
    while the gradients of experts' weights come, less than nothing where much of what was saved is free by then.
    """

    boundary_bytes: int
    saved_bytes: int
    backward_bytes: int
    experts_bytes: int


def first_layer_activations(spec: ModelSpec, settings: Settings) -> LayerActivations:
    """The activations of the first layer; in hybrids linear attention stands before full attention."""
    if spec.linear_attention is None:
        return layer_activations(spec, settings)
    return linear_layer_activations(spec, settings, spec.linear_attention)


def kept_bytes(spec: ModelSpec, settings: Settings, num_layers: int) -> int:
    """What so many layers keep for their backward pass, in hybrids whole periods."""
    num_attention = num_layers // spec.period
    first, last = first_layer_activations(spec, settings), layer_activations(spec, settings)
    return num_attention * last.saved_bytes + (num_layers - num_attention) * first.saved_bytes


def layer_activations(spec: ModelSpec, settings: Settings) -> LayerActivations:
    """The activations of one layer of full attention for one micro-batch."""
    mixer = _attention(spec, settings) + _copies(spec, settings, ATTENTION[:-1])
    widest = 0
    if settings.attention == "eager":
        # Two gradients of the scores in fp32; the probabilities' copy in 16 bits is gone by then.
        per_score = 2 * _FP32 - (2 if settings.weight_bytes == 2 else 0)
        widest = mixer + per_score * settings.forward_tokens * spec.num_heads
        widest += (_FP32 + 2 * settings.weight_bytes) * spec.hidden_size
    return _layer(spec, settings, ATTENTION, mixer, widest)


def linear_layer_activations(spec: ModelSpec, settings: Settings, linear: LinearAttentionSpec) -> LayerActivations:
    """The activations of one layer of linear attention for one micro-batch."""
    modules = tuple(linear_attention_fans(spec))
    inputs = _copies(spec, settings, modules[:-1])
    mixer = _delta_rule(settings, linear) + inputs
    widest = _widest_delta_rule(settings, linear) + inputs + (_FP32 + 2 * settings.weight_bytes) * spec.hidden_size
    return _layer(spec, settings, modules, mixer, widest)


def _layer(spec: ModelSpec, settings: Settings, modules: tuple[str, ...], mixer: int, widest: int) -> LayerActivations:
    """One layer whose token mixer of such modules saves `mixer` bytes a token; its backward pass holds `widest`."""
    tokens, boundary = settings.forward_tokens, settings.weight_bytes * spec.hidden_size
    num_adapted = len(target_names(settings).intersection((*modules, *FEED_FORWARD)))
    products = num_adapted * settings.trained_bytes * settings.rank  # the low-rank ones in between
    saved = _norms(spec, settings) + mixer + _feed_forward(spec, settings) + products + _dora(spec, settings, modules)
    experts = 0
    if adapts_experts(spec, settings):
        # PEFT adds B·A of all experts to a copy of their weights, and autograd keeps it, and A and B once cast.
        experts = settings.weight_bytes * spec.expert_parameters_per_layer
        if settings.trained_bytes != settings.weight_bytes:
            experts += settings.weight_bytes * settings.rank * adapted_expert_fans(spec, settings)
    return LayerActivations(
        boundary_bytes=tokens * boundary,
        saved_bytes=tokens * saved + experts + _kept_dora_weights(spec, settings, modules),
        backward_bytes=tokens * max(_backward(spec, settings), widest - saved) + _dora_weights(spec, settings, modules),
        experts_bytes=tokens * _experts_backward(spec, settings),
    )


def _dora(spec: ModelSpec, settings: Settings, modules: tuple[str, ...]) -> int:
    """Per token: DoRA scales what the base weight and the adapter give, each for itself, and keeps both."""
    if not settings.dora:
        return 0
    outputs = sum(fan_out for _, fan_out in _fans(spec, settings, modules).values())
    base_bytes = settings.trained_bytes if settings.drops else settings.weight_bytes
    return (base_bytes + settings.trained_bytes) * outputs


def _kept_dora_weights(spec: ModelSpec, settings: Settings, modules: tuple[str, ...]) -> int:
    """With dropout DoRA multiplies with the base weight itself, and autograd keeps what it was cast or unpacked to."""
    is_copied = settings.trained_bytes != settings.weight_bytes or settings.kind == "qlora"
    if not (settings.dora and settings.drops and is_copied):
        return 0
    weights = (fan_in * fan_out for fan_in, fan_out in _fans(spec, settings, modules).values())
    return settings.trained_bytes * sum(weights)


def _dora_weights(spec: ModelSpec, settings: Settings, modules: tuple[str, ...]) -> int:
    """What DoRA makes to take the norm of one module's weight: a unit matrix, B·A, the weight cast, sum and square."""
    if not settings.dora:
        return 0
    fans = _fans(spec, settings, modules).values()
    return settings.trained_bytes * max((fan_in * (fan_in + 4 * fan_out) for fan_in, fan_out in fans), default=0)


def _fans(spec: ModelSpec, settings: Settings, modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the adapted ones of a layer's token mixer, of such modules, and feed-forward block."""
    hidden, query, inner = spec.hidden_size, spec.query_size, adapted_intermediate(spec, settings)
    fans = {
        "q_proj": (hidden, spec.query_outputs),
        "k_proj": (hidden, spec.kv_size),
        "v_proj": (hidden, spec.kv_size),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        **{name: (hidden, both - hidden) for name, both in linear_attention_fans(spec).items()},
    }
    if spec.linear_attention is not None:
        fans["out_proj"] = (spec.linear_attention.value_size, hidden)
    names = target_names(settings).intersection((*modules, *FEED_FORWARD))
    return {name: both for name, both in fans.items() if name in names}


def _experts_backward(spec: ModelSpec, settings: Settings) -> int:
    """Per token: gradients of the experts' inputs and outputs, less what of both and of their activation is free."""
    if (moe := spec.moe) is None:
        return 0
    return settings.weight_bytes * moe.top_k * (spec.hidden_size - 4 * moe.expert_intermediate)


def forward_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the widest point of one layer's forward pass without gradients, its input and output included."""
    width, hidden, inner = settings.weight_bytes, spec.hidden_size, spec.dense_intermediate
    is_adapted = not target_names(settings).isdisjoint(("gate_proj", "up_proj"))
    sums = settings.trained_bytes if is_adapted else width
    # The gate's output, the product with the base weight and, of an adapter, its part and the sum of both.
    feed_forward = (2 * width + 2 * sums if is_adapted else 3 * width) * inner
    weights = 0
    if settings.dora and is_adapted:  # both parts, scaled, and what they were
        feed_forward += 2 * sums * inner + 6 * hidden
        weights = settings.trained_bytes * hidden * inner  # B·A of one module
    if spec.moe is not None:
        feed_forward += width * spec.moe.top_k * (3 * spec.moe.expert_intermediate + hidden)
        if adapts_experts(spec, settings):  # PEFT adds the adapters' product to the experts' fused weights
            weights += 2 * width * spec.moe.num_experts * 2 * spec.moe.expert_intermediate * hidden
    attention = width * (3 * spec.query_size + 2 * spec.kv_size) + 2 * _FP32 * hidden
    # What the embedding gave, the layer's input, the residual, the normed input, and its cast for adapters.
    cast = settings.trained_bytes if is_adapted and settings.trained_bytes != width else 0
    rule = _running_delta_rule(settings, spec.linear_attention) + width * hidden if spec.linear_attention else 0
    attention += _running_scores(spec, settings)
    feed_forward += (2 * width + cast) * hidden
    per_token = 2 * width * hidden + max(feed_forward, 2 * cast * hidden + attention, rule)
    return settings.forward_tokens * per_token + weights


def mask_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the masks that attention makes of a batch once for all layers.

    Eager attention makes one of booleans. SDPA takes rows that do not branch without one; of a branching row it sees
    so many queries at a time, with what is added to their scores, and a number for each key.
    """
    if settings.attention == "eager":
        return settings.forward_tokens**2
    if not _sees_chunks(settings):
        return 0
    keys, pairs = _chunks(settings)
    return settings.micro_batch * (settings.weight_bytes * pairs + 8 * keys)


def _sees_chunks(settings: Settings) -> bool:
    return settings.attention == "sdpa" and settings.branches


def _chunks(settings: Settings) -> tuple[int, int]:
    """Over all chunks of a row's queries: keys that they see, at most all before their end, and queries times keys."""
    whole, rest = divmod(settings.max_tokens, CHUNK_TOKENS)
    keys = CHUNK_TOKENS * whole * (whole + 1) // 2
    last = settings.max_tokens if rest else 0
    return keys + last, CHUNK_TOKENS * keys + rest * last


def _copied_keys(spec: ModelSpec, settings: Settings) -> int:
    """Per token: on a CPU each chunk keeps a copy of the keys and values that it sees, in place of those of the row."""
    if not (_sees_chunks(settings) and settings.on_cpu):
        return 0
    keys, _ = _chunks(settings)
    copied = 2 * (settings.weight_bytes * spec.query_size + 8) * keys
    return copied // settings.max_tokens - 2 * settings.weight_bytes * spec.query_size


def _norms(spec: ModelSpec, settings: Settings) -> int:
    """Both norms (fp32 inside; hybrids scale in fp32 too) and in full tuning the inputs of the modules after them."""
    width, hidden = settings.weight_bytes, spec.hidden_size
    if settings.kind == "full":
        return 2 * (_FP32 + _scaled(spec, settings) + width) * hidden
    return 2 * _FP32 * hidden


def _scaled(spec: ModelSpec, settings: Settings) -> int:
    """Bytes per value that a trained norm scales."""
    return settings.weight_bytes if spec.linear_attention is None else _FP32


def _copies(spec: ModelSpec, settings: Settings, group: tuple[str, ...]) -> int:
    """What the adapters of modules with the same input keep of it."""
    if settings.kind == "full":
        return 0
    num_adapted = sum(name in target_names(settings) for name in group)
    # Each adapter casts its input for itself, or drops from it; else they share one.
    copies = num_adapted if _changes_inputs(settings) else min(num_adapted, 1)
    return copies * _input_bytes(settings) * spec.hidden_size


def _changes_inputs(settings: Settings) -> bool:
    """Whether an adapter keeps an input of its own."""
    return settings.kind != "full" and (settings.drops or settings.trained_bytes != settings.weight_bytes)


def _input_bytes(settings: Settings) -> int:
    """Bytes per value of the input that an adapter keeps; dropout keeps a boolean mask too."""
    return settings.trained_bytes + settings.drops


def _attention(spec: ModelSpec, settings: Settings) -> int:
    width, query, kv = settings.weight_bytes, spec.query_size, spec.kv_size
    trains_norms = settings.kind == "full"
    adapts_output = settings.kind != "full" and "o_proj" in target_names(settings)
    total = 2 * width * query + 2 * width * kv + _FP32 * spec.num_heads
    if spec.qk_norm:
        total += (_FP32 + (_scaled(spec, settings) if trains_norms else 0)) * (query + kv)
    if adapts_output and _changes_inputs(settings):
        total += _input_bytes(settings) * query
    elif settings.attention == "sdpa" and spec.linear_attention is None and (trains_norms or adapts_output):
        # What it reads is put together from the trees' outputs, which are kept too.
        total += width * query
    if spec.linear_attention is not None:
        # The output gate, what it multiplies, and the product.
        total += (2 + (trains_norms or (adapts_output and not _changes_inputs(settings)))) * width * query
        if width == _FP32:  # queries that need no cast keep the gates beside them
            total += width * query
    if settings.attention in ("sdpa", "eager"):
        # With a mask these take keys and values repeated for every query head.
        total += 2 * width * (query - kv)
    return total + _scores(spec, settings) + _copied_keys(spec, settings)


def _delta_rule(settings: Settings, linear: LinearAttentionSpec) -> int:
    """What linear attention keeps: the convolution's tensors, the rule's and the gated norm's after it."""
    width, heads = settings.weight_bytes, linear.num_value_heads
    if settings.fuses_delta_rule:
        # The convolution's input and its activation's; queries and keys normed, values, and a matrix of 64 per head.
        total = 2 * width * linear.conv_size + width * linear.conv_size + 2 * _FP32 * linear.num_key_heads
        total += (64 * width + width + 3 * _FP32) * heads + (3 * _FP32 + width) * linear.value_size
        total += _FP32 * heads if settings.kind == "full" else 0
    else:
        # All of it in fp32, and the states between chunks.
        per_key, per_repeated_key, per_value = (8, 32, 30) if width == 2 else (19, 46, 36)
        total = per_key * linear.key_size + per_repeated_key * heads * linear.key_head_dim
        total += per_value * linear.value_size + 1310 * heads + _FP32 * _states(linear)
    if settings.fuses_convolution:  # which computes its activation again
        total -= width * linear.conv_size
    if settings.kind == "full":
        return total + 2 * settings.weight_bytes * linear.value_size
    return total + (_input_bytes(settings) * linear.value_size if "out_proj" in target_names(settings) else 0)


def _states(linear: LinearAttentionSpec) -> int:
    """Values of the states between chunks of 64 tokens, per token."""
    return linear.num_value_heads * linear.key_head_dim * linear.value_head_dim // 64


def _running_delta_rule(settings: Settings, linear: LinearAttentionSpec) -> int:
    """What lives while the rule runs without gradients."""
    if settings.fuses_delta_rule:
        width, repeated_key = settings.weight_bytes, linear.num_value_heads * linear.key_head_dim
        copies = 2 * linear.conv_size + 2 * linear.key_size  # of what the convolution made, and queries and keys normed
        return width * (copies + repeated_key + 4 * linear.value_size + 64 * linear.num_value_heads + _states(linear))
    per_key, per_head_size = (4, 26) if settings.weight_bytes == 2 else (8, 28)
    sizes = linear.num_value_heads * (linear.key_head_dim + linear.value_head_dim)
    return per_key * linear.key_size + per_head_size * sizes


def _widest_delta_rule(settings: Settings, linear: LinearAttentionSpec) -> int:
    """What lives while the rule's backward pass has made its gradients and released the states."""
    if settings.fuses_delta_rule:
        # What was kept for it, what its forward pass makes is made again, and the gradients of both and of the states.
        width, repeated_key = settings.weight_bytes, linear.num_value_heads * linear.key_head_dim
        kept = (2 if settings.fuses_convolution else 3) * linear.conv_size + 64 * linear.num_value_heads
        made = 3 * repeated_key + 2 * linear.key_size + 6 * linear.value_size + 2 * _states(linear)
        return width * (kept + made)
    per_key, per_head_size = (8, 47) if settings.weight_bytes == 2 else (20, 57)
    sizes = linear.num_value_heads * (linear.key_head_dim + linear.value_head_dim)
    return per_key * linear.key_size + per_head_size * sizes


def _scores(spec: ModelSpec, settings: Settings) -> int:
    """Eager attention keeps the probabilities of every head in fp32 and in the compute type, and its mask."""
    if settings.attention != "eager":
        return 0
    per_score = _FP32 + (2 if settings.weight_bytes == 2 else 0)
    return settings.forward_tokens * (per_score * spec.num_heads + 1)


def _running_scores(spec: ModelSpec, settings: Settings) -> int:
    """What eager attention holds at its softmax: scores, their cast to fp32 and the probabilities."""
    if settings.attention != "eager":
        return 0
    return settings.forward_tokens * spec.num_heads * (10 if settings.weight_bytes == 2 else 8)


def _feed_forward(spec: ModelSpec, settings: Settings) -> int:
    width = settings.weight_bytes
    total = 3 * width * spec.dense_intermediate
    if settings.kind == "full":
        total += width * spec.dense_intermediate
    elif "down_proj" in target_names(settings):
        total += _input_bytes(settings) * adapted_intermediate(spec, settings)
    if not adapts_experts(spec, settings):
        total += _copies(spec, settings, ("gate_proj", "up_proj"))
    if spec.moe is not None and spec.moe.shared_intermediate:
        # The gate's factor, and its own copy of the input.
        changes = SHARED_GATE in target_names(settings) and _changes_inputs(settings)
        total += (width + (_input_bytes(settings) if changes else 0)) * spec.hidden_size
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
    if (settings.drops or settings.dora) and "down_proj" in names:  # its input's gradient before and after the mask
        total = max(total, 2 * settings.trained_bytes * adapted_intermediate(spec, settings) + 4 * hidden)
    if spec.moe is not None:
        total += (4 if settings.kind == "full" else 3) * width * spec.moe.top_k * hidden + 3 * hidden
    return total
