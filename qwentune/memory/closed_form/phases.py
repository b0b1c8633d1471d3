"""Peak memory of one rank by phase and term, in closed form: pure functions of the model's dimensions and the settings.

A phase is judged at its worst moment. A training step has four: the loss head (all saved activations, and the
logits), the backward pass of the last layer (all saved activations and one layer's own), that of the first layer (all
gradients), and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.activations import (
    first_layer_activations,
    forward_bytes,
    kept_bytes,
    layer_activations,
    mask_bytes,
)
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters, adapts_head
from qwentune.memory.settings import GIB, MIB, HostMemory, Overheads, Settings, device_overheads

# Two fp32 gradients and the log-softmax, with the model's outputs dropped (transformers 5).
FULL_LOSS_BYTES_PER_LOGIT = 12
# The positions whose logits qwentune's own head holds at a time.
LOSS_CHUNK_TOKENS = 1024
# NF4: half a byte, an 8-bit scale per 64 values, and an fp32 scale per 256 of those scales.
NF4_BYTES_PER_PARAMETER = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# The most values in a bucket in which DeepSpeed reduces gradients; it is made whole, so runs ask for no larger one.
DEEPSPEED_BUCKET_VALUES = 500_000_000
# The most gathered values that its stage 3 keeps for later; what runs now may be more. For one rank it gathers nothing.
DEEPSPEED_LIVE_VALUES = 1_000_000_000
# The most values that AdamW moves at a time, and those of which moments in 8 bits share a scale: model/adamw.py's.
PIECE_VALUES = 2**24
BLOCK_VALUES = 256
# One NCCL communicator; up to 1.6 GB was reported once (NVIDIA/nccl#864), unverified.
NCCL_BYTES = 512 * MIB
# Interpreter, torch, CUDA libraries and pinned buffers of a rank on a GPU, unverified.
HOST_BYTES_PER_RANK = 3 * GIB


@dataclass(frozen=True, slots=True)
class Terms:
    """What the bytes of one moment are for.

    `workspaces` are libraries' own buffers inside torch's count; `allocator` (reserved but not handed out) and
    `context` (CUDA and NCCL) stand outside of it.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0
    workspaces: int = 0
    allocator: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """All bytes that the process takes, as nvidia-smi shows them."""
        return self.allocated + self.allocator + self.context

    @property
    def allocated(self) -> int:
        """Bytes of tensors: torch's `max_memory_allocated`."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.temporaries
            + self.workspaces
        )

    def as_dict(self) -> dict[str, int]:
        """The terms by name."""
        return asdict(self)


def phases(spec: ModelSpec, settings: Settings, overheads: Overheads, merges_here: bool) -> Mapping[str, Terms]:
    """The worst moment of each phase of a run: load, train_step, evaluate, save, resume, merge.

    Args:
        merges_here: Adapters are merged in this memory; on a GPU machine they are merged in the host's.
    """
    static = _static(spec, settings)
    moments = {
        "load": _load(spec, settings, static),
        "train_step": max(_step_moments(spec, settings, static), key=lambda terms: terms.allocated),
        "evaluate": _evaluate(spec, replace(settings, micro_batch=1), static),
        "save": replace(static, temporaries=static.temporaries + _gather_bytes(spec, settings)),
        "resume": replace(static, temporaries=static.temporaries + _largest_tensor_bytes(spec, settings)),
        "merge": _merge(spec, settings) if merges_here else Terms(),
    }
    return {name: _with_overheads(terms, settings, overheads) for name, terms in moments.items()}


def trained_parameters(spec: ModelSpec, settings: Settings) -> int:
    """Parameters that receive gradients, over all ranks."""
    return spec.parameters if settings.kind == "full" else adapter_parameters(spec, settings)


def base_weight_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the model's own weights, unsharded; QLoRA quantises linear modules only, never fused experts."""
    if settings.kind != "qlora":
        return settings.weight_bytes * spec.parameters
    quantised = quantised_parameters(spec)
    return round(NF4_BYTES_PER_PARAMETER * quantised) + settings.weight_bytes * (spec.parameters - quantised)


def quantised_parameters(spec: ModelSpec) -> int:
    """Parameters that bitsandbytes holds in 4 bits: the linear modules of the layers."""
    return spec.linear_parameters


def state_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of AdamW's states over all ranks: two moments, and what makes trained weights exact fp32 values.

    That are 16 more bits of a weight in bf16, or DeepSpeed's fp32 weights.
    """
    trained = trained_parameters(spec, settings)
    if settings.uses_deepspeed:
        return trained * (4 + 8)
    rests = 2 * trained if settings.trained_bytes == 2 else 0
    if settings.optimizer_state == "fp32":
        return rests + 8 * trained
    # Embeddings keep fp32 moments.
    in_fp32 = spec.head_parameters if settings.kind == "full" else 0
    return rests + 8 * in_fp32 + round((2 + 8 / BLOCK_VALUES) * (trained - in_fp32))


def moving_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes that AdamW's step of one rank takes beside weights, gradients and states, wherever the states are.

    Of a piece their fp32 values before the step; of weights in bf16 also the exact ones, and of gradients in bf16 the
    same in fp32. Moments in 8 bits are unpacked, and new codes of a tensor are there twice, to be chosen from.
    """
    values, is_half = trained_parameters(spec, settings), settings.trained_bytes == 2 and not settings.uses_deepspeed
    if settings.is_sharded or settings.uses_deepspeed:
        values = _share(values, settings.num_ranks)
    piece = min(values, PIECE_VALUES)
    num_copies = 1 if not is_half else 2 if settings.adds_in_fp32 else 3
    moved = 4 * num_copies * piece
    if settings.optimizer_state != "8bit":
        return moved
    largest = min(piece, _largest_tensor_bytes(spec, settings) // settings.trained_bytes)
    return moved + 8 * piece + round(2 * (1 + 4 / BLOCK_VALUES) * largest)


def host_bytes(spec: ModelSpec, settings: Settings) -> dict[str, int]:
    """Bytes of host memory by phase that one machine needs beside its GPUs, the page cache left out.

    Its ranks train at once; adapters are merged later, by one process without a GPU.
    """
    running = settings.num_ranks * (HOST_BYTES_PER_RANK + offloaded_bytes(spec, settings))
    loading = saving = running
    if settings.is_sharded:  # rank 0 gathers what is trained, not the states, which every rank writes for itself
        saving += settings.trained_bytes * trained_parameters(spec, settings)
    if settings.is_sharded and settings.uses_deepspeed:  # what rank 0 fuses
        loading += settings.weight_bytes * spec.expert_parameters_per_layer
    elif settings.is_sharded:  # FSDP2 shares adapters out when all are there
        loading += settings.num_ranks * settings.trained_bytes * adapter_parameters(spec, settings)
    merging = _with_overheads(_merge(spec, settings), settings, device_overheads(HostMemory(0))).total
    phases = dict.fromkeys(("load", "train_step", "evaluate", "save", "resume"), running)
    return {**phases, "load": loading, "save": saving, "resume": loading, "merge": merging}


def offloaded_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of host memory for what a rank's GPU hands over: the optimizer's states, gradients, and staging.

    fp32 weights and gradients, the new weights and one tensor's gradient are pinned, in blocks of a power of two as
    torch takes them. The two moments are not; nor are the gradients summed over micro-batches, or, while a checkpoint
    is read, its fp32 weights, which are more; nor what the step takes.
    """
    if not settings.offloads:
        return 0
    trained = _share(trained_parameters(spec, settings), settings.num_ranks)
    pinned = (4 * trained, 4 * trained, settings.trained_bytes * trained, _largest_tensor_bytes(spec, settings))
    return sum(1 << (size - 1).bit_length() for size in pinned) + (8 + 4) * trained + moving_bytes(spec, settings)


def disk_bytes(spec: ModelSpec, settings: Settings, keep: int) -> int:
    """Bytes of the run folder: `keep` checkpoints, the one being written, and the final weights or adapter."""
    weights = settings.trained_bytes * trained_parameters(spec, settings)
    num_written = 2 if settings.uses_deepspeed and not settings.is_sharded else 1  # DeepSpeed's own file has them too
    return (keep + 1) * (num_written * weights + state_bytes(spec, settings)) + weights


def _share(num_bytes: int, num_ranks: int) -> int:
    return -(-num_bytes // num_ranks)


def _static(spec: ModelSpec, settings: Settings) -> Terms:
    """What stays on a rank between steps; `temporaries` are the unsharded units and buffers of its sharding."""
    weights, adapters = base_weight_bytes(spec, settings), 0
    if settings.kind != "full":
        adapters = settings.trained_bytes * adapter_parameters(spec, settings)
    optimizer, unsharded = state_bytes(spec, settings), 0
    if settings.is_sharded:
        # Two layers (the current one and the prefetched one) and the root unit are gathered at a time.
        layer = weights - settings.weight_bytes * spec.embedding_parameters
        unsharded = 2 * layer // spec.num_layers + settings.weight_bytes * spec.embedding_parameters
        if settings.uses_deepspeed:
            kept = settings.weight_bytes * min(spec.parameters, DEEPSPEED_LIVE_VALUES)
            unsharded = max(unsharded, kept) if settings.num_ranks > 1 else 0
        weights, adapters = _share(weights, settings.num_ranks), _share(adapters, settings.num_ranks)
    if settings.sharding == "zero2-offload":  # on its way to the host a gradient passes one tensor's room
        unsharded = _largest_tensor_bytes(spec, settings)
    if settings.is_sharded or settings.uses_deepspeed:
        optimizer = 0 if settings.offloads else _share(optimizer, settings.num_ranks)
    return Terms(weights=weights, adapters=adapters, optimizer=optimizer, temporaries=unsharded)


def _gradient_bytes(spec: ModelSpec, settings: Settings) -> int:
    """All gradients of one rank once the backward pass is through."""
    trained = trained_parameters(spec, settings)
    if settings.sharding == "zero1":  # nothing is shared out before the optimizer steps
        return settings.trained_bytes * trained + _bucket_bytes(spec, settings)
    if settings.uses_deepspeed:
        share = 0 if settings.offloads else _share(4 * trained, settings.num_ranks)
        # Stage 3 fills one bucket while another is on its way.
        leaving = _leaving_bytes(spec, settings) if settings.is_sharded else 0
        return share + _bucket_bytes(spec, settings) + leaving
    if settings.sharding == "fsdp2":
        one_layer = settings.trained_bytes * trained // spec.num_layers
        return _share(settings.trained_bytes * trained, settings.num_ranks) + one_layer
    # DDP holds the gradients a second time, in its buckets.
    return settings.trained_bytes * trained * (2 if settings.sharding == "ddp" else 1)


def _bucket_bytes(spec: ModelSpec, settings: Settings) -> int:
    return settings.trained_bytes * min(trained_parameters(spec, settings), DEEPSPEED_BUCKET_VALUES)


def _leaving_bytes(spec: ModelSpec, settings: Settings) -> int:
    """What is laid flat once more to travel; a gradient larger than the bucket travels alone."""
    return max(_bucket_bytes(spec, settings), _largest_tensor_bytes(spec, settings))


def _step_moments(spec: ModelSpec, settings: Settings, static: Terms) -> list[Terms]:
    first, last = first_layer_activations(spec, settings), layer_activations(spec, settings)
    num_checkpointed = settings.num_checkpointed(spec.num_layers)
    num_saved = spec.num_layers - num_checkpointed
    saved = num_checkpointed * last.boundary_bytes + kept_bytes(spec, settings, num_saved) + mask_bytes(spec, settings)
    if settings.trains_rows:  # laid over what the embedding gives
        saved += settings.forward_tokens * spec.hidden_size * settings.weight_bytes
    # The first layers are the recomputed ones: where a layer after them keeps what it saved, it is free by then.
    recomputed = 0 if num_saved else last.saved_bytes

    gradients = _gradient_bytes(spec, settings)
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
        temporaries += _leaving_bytes(spec, settings)

    norm_copies = 2 if settings.kind == "full" else 1  # a norm that is trained keeps what it scales
    hidden = settings.forward_tokens * spec.hidden_size
    final_norm = hidden * (4 + norm_copies * settings.weight_bytes)
    if settings.kind != "qlora":  # whose unpacked weight is more
        last_layer_bytes += hidden * settings.weight_bytes  # the gradient that it is given
    moments = [
        replace(static, gradients=at_head, activations=saved + final_norm, logits=_logit_bytes(spec, settings)),
        replace(static, gradients=early, activations=last_layer_bytes, temporaries=temporaries),
        replace(
            static,
            gradients=gradients - embedding_gradient,
            activations=first_layer_bytes,
            temporaries=temporaries,
        ),
        replace(static, gradients=gradients, temporaries=static.temporaries + waiting - embedding_gradient),
    ]
    moments.append(_optimizer_moment(spec, settings, static, gradients))
    if spec.period > 1:  # the layer before the last is of another kind
        before = saved - (last.saved_bytes if num_saved else last.boundary_bytes - first.saved_bytes)
        early += (gradients - early) // spec.num_layers
        activations = before + max(first.backward_bytes, at_last + first.experts_bytes)
        moments.append(replace(static, gradients=early, activations=activations, temporaries=temporaries))
    sums = _sum_bytes(spec, settings)
    return [replace(moment, gradients=moment.gradients + sums) for moment in moments]


def _sum_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Sums of gradients in fp32 beside those of a micro-batch; of shards their own."""
    if not settings.adds_in_fp32:
        return 0
    return _share(4 * trained_parameters(spec, settings), settings.num_ranks if settings.is_sharded else 1)


def _optimizer_moment(spec: ModelSpec, settings: Settings, static: Terms, gradients: int) -> Terms:
    """The optimizer's step; of what is shared a rank has its share, and under FSDP2 all weights are shared by then."""
    share = _share(trained_parameters(spec, settings), settings.num_ranks)
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
    # Logits in fp32, and of the same size their log-softmax or their slope; the slope of the chunk before is there too.
    before = width if tokens > LOSS_CHUNK_TOKENS else 0
    chunk = chunk_tokens * spec.vocab_rows * (4 + 4 + before)
    # What the head reads, and its gradient.
    hidden = 2 * tokens * spec.hidden_size * width
    if settings.kind != "full":
        return chunk + hidden
    head_gradient = width * spec.head_parameters
    # Or the slope, and the chunk's share of the head's gradient beside the sum.
    share = chunk_tokens * spec.vocab_rows * width + head_gradient
    return max(chunk, share) + head_gradient + hidden


def _evaluate(spec: ModelSpec, settings: Settings, static: Terms) -> Terms:
    tokens, hidden = settings.forward_tokens, spec.hidden_size
    # DDP's buckets stay.
    gradients = _gradient_bytes(spec, settings) // 2 if settings.sharding == "ddp" else 0
    body = replace(static, gradients=gradients, activations=forward_bytes(spec, settings) + mask_bytes(spec, settings))
    # Logits in fp32 and their log-softmax; before them an adapter's part, and the sum with the base's in its type.
    is_chunked = settings.loss == "supervised"
    per_logit = max(4 + 4, settings.weight_bytes + 2 * settings.trained_bytes) if adapts_head(settings) else 4 + 4
    logits = (min(tokens, LOSS_CHUNK_TOKENS) if is_chunked else tokens) * spec.vocab_rows * per_logit
    head = replace(
        static,
        gradients=gradients,
        activations=tokens * hidden * settings.weight_bytes + mask_bytes(spec, settings),
        logits=logits,
    )
    return max(body, head, key=lambda terms: terms.allocated)


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
        share = _share(settings.trained_bytes * trained_parameters(spec, settings), settings.num_ranks)
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
        return max(experts, matrix, embedding) + (_share(embedding, settings.num_ranks) if spec.tied else 0)
    gathered = (matrix if settings.dora else 0, embedding if settings.trains_rows else 0)
    return max(_share(experts, settings.num_ranks), *gathered)


def _gather_bytes(spec: ModelSpec, settings: Settings) -> int:
    """The largest unit, gathered on rank 0 on its way to the host."""
    return _largest_tensor_bytes(spec, settings) if settings.is_sharded else 0


def _largest_tensor_bytes(spec: ModelSpec, settings: Settings) -> int:
    if settings.kind == "full":
        largest = max(spec.head_parameters, spec.expert_parameters_per_layer)
    else:
        largest = adapter_parameters(spec, settings) // spec.num_layers
    return settings.trained_bytes * largest


def _merge(spec: ModelSpec, settings: Settings) -> Terms:
    """The base in fp32, the adapters, one module's update and its sum; full tuning has nothing to merge."""
    if settings.kind == "full":
        return Terms()
    largest = max(spec.hidden_size * spec.dense_intermediate, spec.expert_parameters_per_layer)
    return Terms(
        weights=4 * spec.parameters,
        adapters=settings.trained_bytes * adapter_parameters(spec, settings),
        temporaries=2 * 4 * largest,
    )


def _with_overheads(terms: Terms, settings: Settings, overheads: Overheads) -> Terms:
    if terms.allocated == 0:
        return terms
    communicator = NCCL_BYTES if settings.sharding != "none" and overheads.context_bytes else 0
    terms = replace(terms, workspaces=overheads.workspace_bytes)
    slack = int(terms.allocated * overheads.allocator_fraction) + overheads.allocator_bytes
    return replace(terms, allocator=slack, context=overheads.context_bytes + communicator)
