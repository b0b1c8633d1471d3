"""Peak memory of one rank by phase and term, in closed form: pure functions of the model's dimensions and the settings.

A phase is judged at its worst moment. A training step has four: the loss head (all saved activations, and the
logits), the backward pass of the last layer (all saved activations and one layer's own), that of the first layer (all
gradients), and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qwentune.answering.answer import MOST_AT_ONCE, MOST_TOGETHER, most_cached
from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.activations import (
    first_layer_activations,
    forward_bytes,
    kept_bytes,
    layer_activations,
    mask_bytes,
)
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters, adapts_head
from qwentune.memory.closed_form.host_memory import merging
from qwentune.memory.closed_form.media_activations import media_bytes, without_gradients
from qwentune.memory.closed_form.model_states import (
    DEEPSPEED_LIVE_VALUES,
    base_weight_bytes,
    gradient_bytes,
    largest_tensor_bytes,
    leaving_bytes,
    moving_bytes,
    share_of,
    state_bytes,
    sum_bytes,
    trained_parameters,
)
from qwentune.memory.closed_form.terms import Terms, with_overheads
from qwentune.memory.closed_form.tower_sizes import copied_tower_parameters, tower_weight_bytes, tuned_tower_parameters
from qwentune.memory.settings import Overheads, Settings

# Two fp32 gradients and the log-softmax, with the model's outputs dropped (transformers 5).
FULL_LOSS_BYTES_PER_LOGIT = 12
# The positions whose logits qwentune's own head holds at a time.
LOSS_CHUNK_TOKENS = 1024
# The slices of the vocabulary of which it has one in fp32.
LOSS_SLICES = 8


def phases(spec: ModelSpec, settings: Settings, overheads: Overheads, merges_here: bool) -> Mapping[str, Terms]:
    """The worst moment of each phase of a run: load, train_step, evaluate, save, resume, merge; answer where it does.

    Args:
        merges_here: Adapters are merged in this memory; on a GPU machine they are merged in the host's.
    """
    static = _static(spec, settings)
    moments = {
        "load": _load(spec, settings, static),
        "train_step": max(_step_moments(spec, settings, static), key=lambda terms: terms.allocated),
        "evaluate": _evaluate(spec, replace(settings, micro_batch=1), static),
        "save": replace(static, temporaries=static.temporaries + _gather_bytes(spec, settings)),
        "resume": replace(static, temporaries=static.temporaries + largest_tensor_bytes(spec, settings)),
        "merge": merging(spec, settings) if merges_here else Terms(),
    }
    if settings.answers:
        moments["answer"] = _answer(spec, settings, static)
    return {name: with_overheads(terms, settings, overheads) for name, terms in moments.items()}


def _static(spec: ModelSpec, settings: Settings) -> Terms:
    """What stays on a rank between steps; `temporaries` are the unsharded units and buffers of its sharding."""
    weights, adapters = base_weight_bytes(spec, settings), 0
    if settings.kind != "full":
        adapters = settings.trained_bytes * adapter_parameters(spec, settings)
        adapters += settings.trained_bytes * copied_tower_parameters(spec, settings)
    optimizer, unsharded, towers = state_bytes(spec, settings), 0, tower_weight_bytes(spec, settings)
    if settings.is_sharded:
        # Two layers (the current one and the prefetched one) and the root unit are gathered at a time.
        layer = weights - settings.weight_bytes * spec.embedding_parameters
        unsharded = 2 * layer // spec.num_layers + settings.weight_bytes * spec.embedding_parameters
        if settings.uses_deepspeed:
            kept = settings.weight_bytes * min(spec.parameters, DEEPSPEED_LIVE_VALUES)
            unsharded = max(unsharded, kept) if settings.num_ranks > 1 else 0
        # Towers stay whole on every rank.
        weights, adapters = (share_of(size, settings.num_ranks) for size in (weights, adapters))
    if settings.sharding == "zero2-offload":  # on its way to the host a gradient passes one tensor's room
        unsharded = largest_tensor_bytes(spec, settings)
    if settings.is_sharded or settings.uses_deepspeed:
        optimizer = 0 if settings.offloads else share_of(optimizer, settings.num_ranks)
    return Terms(weights=weights, adapters=adapters, optimizer=optimizer, temporaries=unsharded, towers=towers)


def _step_moments(spec: ModelSpec, settings: Settings, static: Terms) -> list[Terms]:
    first, last = first_layer_activations(spec, settings), layer_activations(spec, settings)
    num_checkpointed = settings.num_checkpointed(spec.num_layers)
    num_saved = spec.num_layers - num_checkpointed
    saved = num_checkpointed * last.boundary_bytes + kept_bytes(spec, settings, num_saved) + mask_bytes(spec, settings)
    if settings.trains_rows:  # laid over what the embedding gives
        saved += settings.forward_tokens * spec.hidden_size * settings.weight_bytes
    # The first layers are the recomputed ones: where a layer after them keeps what it saved, it is free by then.
    recomputed = 0 if num_saved else last.saved_bytes

    gradients = gradient_bytes(spec, settings)
    # Plain gradients are freed after each optimizer step, so in the only micro-batch of a step they do not exist yet.
    # Sums in fp32 take them over after each micro-batch.
    starts_without = settings.sharding == "none" and (settings.accumulation == 1 or settings.adds_in_fp32)
    head_gradient = settings.weight_bytes * spec.head_parameters if settings.kind == "full" else 0
    # New ones of a layer's experts: gate's and up's where earlier ones are there to be added to, else all three stay.
    experts = settings.weight_bytes * spec.expert_parameters_per_layer if settings.kind == "full" else 0
    at_last = experts if starts_without else 2 * experts // 3
    at_first = 0 if starts_without else at_last  # counted with all gradients
    last_layer_bytes = saved + recomputed + max(last.backward_bytes, at_last + last.experts_bytes)
    first_layer_bytes = first.saved_bytes + max(first.backward_bytes, at_first + first.experts_bytes)
    first_layer_bytes += mask_bytes(spec, settings)
    early = min(gradients, head_gradient) if starts_without else gradients
    at_head = 0 if starts_without else gradients  # the head's own is counted with the logits
    # The embedding's gradient comes after the first layer's, unless the tied head has made it.
    embedding_gradient = head_gradient if starts_without and not spec.tied else 0
    # A tied head's gradient waits for the embedding's; both wait where there is one already.
    tied_gradient = head_gradient if spec.tied and not starts_without else 0
    waiting = head_gradient + tied_gradient
    # bitsandbytes unpacks the weight that it multiplies with.
    unpacked = 2 * spec.hidden_size * max(spec.dense_intermediate, spec.query_size)
    temporaries = static.temporaries + tied_gradient + (unpacked if settings.kind == "qlora" else 0)
    if settings.uses_deepspeed and not settings.is_sharded:
        temporaries += leaving_bytes(spec, settings)

    norm_copies = 2 if settings.kind == "full" else 1  # a norm that is trained keeps what it scales
    hidden = settings.forward_tokens * spec.hidden_size
    hidden_bytes = hidden * settings.weight_bytes
    final_norm = hidden * (4 + norm_copies * settings.weight_bytes)
    if settings.kind != "qlora":  # whose unpacked weight is more
        last_layer_bytes += hidden_bytes  # the gradient that it is given
    # Those of towers come last, from what the decoder's backward pass gives for their outputs.
    media = media_bytes(spec, settings)
    tower_gradients = settings.trained_bytes * tuned_tower_parameters(spec, settings) if starts_without else 0
    static = replace(static, media=media.inputs)
    forward = replace(static, media=media.inputs + media.running, gradients=at_head, activations=hidden_bytes)
    backward = replace(forward, media=media.inputs + media.kept + media.backward)
    backward = replace(backward, gradients=gradients - embedding_gradient - tower_gradients)
    static = replace(static, media=media.inputs + media.kept)
    moments = [
        *([forward, backward] if media.inputs else []),
        replace(
            static,
            gradients=at_head,
            activations=saved + final_norm,
            logits=_logit_bytes(spec, settings),
            media=static.media + media.outputs,
        ),
        replace(static, gradients=early, activations=last_layer_bytes, temporaries=temporaries),
        replace(
            static,
            gradients=gradients - embedding_gradient - tower_gradients,
            activations=first_layer_bytes,
            temporaries=temporaries,
        ),
    ]
    if spec.period > 1:  # the layer before the last is of another kind
        before = saved - (last.saved_bytes if num_saved else last.boundary_bytes - first.saved_bytes)
        early += (gradients - early) // spec.num_layers
        activations = before + max(first.backward_bytes, at_last + first.experts_bytes)
        moments.append(replace(static, gradients=early, activations=activations, temporaries=temporaries))
    static = replace(static, media=media.inputs)
    after = static.temporaries + waiting - embedding_gradient
    moments.append(replace(static, gradients=gradients, temporaries=after))
    moments.append(_optimizer_moment(spec, settings, static, gradients))
    sums = sum_bytes(spec, settings)
    return [replace(moment, gradients=moment.gradients + sums) for moment in moments]


def _optimizer_moment(spec: ModelSpec, settings: Settings, static: Terms, gradients: int) -> Terms:
    """The optimizer's step; of what is shared a rank has its share, and under FSDP2 all weights are shared by then."""
    share = share_of(trained_parameters(spec, settings), settings.num_ranks)
    temporaries = static.temporaries
    if settings.adds_in_fp32:  # of what was not added up yet nothing is left but DDP's buckets
        gradients = gradients // 2 if settings.sharding == "ddp" else 0
    if settings.sharding == "fsdp2":
        gradients, temporaries = 0 if settings.adds_in_fp32 else settings.trained_bytes * share, 0
    elif settings.offloads:
        return replace(static, gradients=gradients)
    elif settings.uses_deepspeed:
        # As it came from the bucket, flat, and in fp32 where it was not; stage 2 has sums in fp32, stage 3 keeps one.
        twice = settings.sharding == "zero1" or (settings.sharding == "zero2" and settings.trained_bytes == 4)
        gradients = (8 if twice else 4) * share
    return replace(static, gradients=gradients, temporaries=temporaries + moving_bytes(spec, settings))


def _logit_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Judged as if every token were trained."""
    tokens = settings.forward_tokens
    if settings.loss == "full":
        return tokens * spec.vocab_rows * FULL_LOSS_BYTES_PER_LOGIT
    width, chunk_tokens = settings.weight_bytes, min(tokens, LOSS_CHUNK_TOKENS)
    # Logits and their slope; what the head reads, and its gradient. A slice in fp32 is less than the slope.
    chunk = 2 * chunk_tokens * spec.vocab_rows * width + 2 * tokens * spec.hidden_size * width
    return chunk + (width * spec.head_parameters if settings.kind == "full" else 0)


def _evaluate(spec: ModelSpec, settings: Settings, static: Terms) -> Terms:
    tokens, hidden = settings.forward_tokens, spec.hidden_size
    gradients = _buckets(spec, settings)
    body = replace(static, gradients=gradients, activations=forward_bytes(spec, settings) + mask_bytes(spec, settings))
    # Logits in fp32 and their log-softmax; before them an adapter's part, and the sum with the base's in its type.
    per_logit = max(4 + 4, settings.weight_bytes + 2 * settings.trained_bytes) if adapts_head(settings) else 4 + 4
    logits = tokens * spec.vocab_rows * per_logit
    if settings.loss == "supervised":
        in_fp32 = 4 * -(-spec.vocab_rows // LOSS_SLICES)
        logits = min(tokens, LOSS_CHUNK_TOKENS) * (spec.vocab_rows * settings.weight_bytes + in_fp32)
    head = replace(
        static,
        gradients=gradients,
        activations=tokens * hidden * settings.weight_bytes + mask_bytes(spec, settings),
        logits=logits,
    )
    media = media_bytes(spec, without_gradients(settings))
    tower = replace(static, gradients=gradients, activations=tokens * hidden * settings.weight_bytes)
    tower = replace(tower, media=media.inputs + media.running)
    decoder = [replace(moment, media=media.inputs + media.outputs) for moment in (body, head)]
    return max(tower, *decoder, key=lambda terms: terms.allocated)


def _buckets(spec: ModelSpec, settings: Settings) -> int:
    """Those of DDP, which stay."""
    return gradient_bytes(spec, settings) // 2 if settings.sharding == "ddp" else 0


def _answer(spec: ModelSpec, settings: Settings, static: Terms) -> Terms:
    """Prompts that are answered in an evaluation: the longest alone, or several that have fewer tokens together."""
    cached = most_cached(settings.max_tokens)
    together = min(cached, MOST_TOGETHER)
    forward = replace(settings, micro_batch=1, max_tokens=max(settings.max_tokens, together), attention="sdpa")
    # Of several prompts every pair of tokens has a place in the mask, as a boolean and as what is added to the scores.
    mask = together**2 // 2 * (1 + settings.weight_bytes)
    hears = settings.towers is not None and spec.tower is not None and spec.tower.audio is not None
    num_logits = settings.max_tokens if hears else MOST_AT_ONCE  # which gives those of the whole prompt
    media = media_bytes(spec, without_gradients(settings))
    return replace(
        static,
        gradients=_buckets(spec, settings),
        activations=forward_bytes(spec, forward) + mask,
        logits=num_logits * spec.vocab_rows * (settings.weight_bytes + 4),
        media=media.inputs + media.outputs,
        cache=_cache_bytes(spec, settings, cached),
    )


def _cache_bytes(spec: ModelSpec, settings: Settings, tokens: int) -> int:
    """Keys and values of so many tokens, one layer's twice while a token is added; and the states of linear layers."""
    keys = (spec.num_attention_layers + 1) * tokens * 2 * spec.kv_size * settings.weight_bytes
    if (linear := spec.linear_attention) is None:
        return keys
    state = 4 * linear.value_size * linear.key_head_dim + settings.weight_bytes * linear.conv_size * linear.conv_kernel
    return keys + (spec.num_layers - spec.num_attention_layers) * MOST_AT_ONCE * state


def _load(spec: ModelSpec, settings: Settings, static: Terms) -> Terms:
    """Every rank reads all weights, or its share where the weights are sharded, which stay its own from then on."""
    if settings.is_sharded:
        adapters = static.adapters
        if settings.uses_deepspeed and settings.kind != "full":  # made whole, and shared out with the optimizer
            adapters = settings.trained_bytes * adapter_parameters(spec, settings)
        loading = _sharded_loading_bytes(spec, settings)
        return replace(static, adapters=adapters, optimizer=0, temporaries=loading)
    loading = _loading_bytes(spec, settings)
    if settings.uses_deepspeed and not settings.is_sharded:
        # The rank's share is copied once before it becomes fp32.
        share = share_of(settings.trained_bytes * trained_parameters(spec, settings), settings.num_ranks)
        loading = max(loading, share)
    return replace(static, weights=base_weight_bytes(spec, settings), optimizer=0, temporaries=loading)


def _loading_bytes(spec: ModelSpec, settings: Settings) -> int:
    """The 16-bit original of a tensor while it is quantised, or one layer's experts while they are fused."""
    fused = settings.weight_bytes * spec.expert_parameters_per_layer
    original = 2 * spec.hidden_size * spec.dense_intermediate if settings.kind == "qlora" else 0
    return max(fused, original)


def _sharded_loading_bytes(spec: ModelSpec, settings: Settings) -> int:
    """One layer's own experts while they are fused; or a tensor that is gathered.

    DeepSpeed gathers each, or one layer's experts, to be filled by rank 0. Under FSDP2 DoRA begins with the norms of
    whole matrices, and trained rows are taken from the whole embedding and head.
    """
    experts = settings.weight_bytes * spec.expert_parameters_per_layer
    matrix = settings.weight_bytes * spec.hidden_size * max(spec.dense_intermediate, spec.query_outputs)
    embedding = settings.weight_bytes * spec.head_parameters
    if settings.uses_deepspeed:  # a tied head is made, and let go of when all is there
        return max(experts, matrix, embedding) + (share_of(embedding, settings.num_ranks) if spec.tied else 0)
    gathered = (matrix if settings.dora else 0, embedding if settings.trains_rows else 0)
    return max(share_of(experts, settings.num_ranks), *gathered)


def _gather_bytes(spec: ModelSpec, settings: Settings) -> int:
    """The largest unit, gathered on rank 0 on its way to the host."""
    return largest_tensor_bytes(spec, settings) if settings.is_sharded else 0
