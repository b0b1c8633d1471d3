"""Bytes of weights, gradients and the optimizer's states of one rank, and of its step."""

from __future__ import annotations

from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters
from qwentune.memory.closed_form.tower_sizes import tuned_tower_parameters
from qwentune.memory.settings import Settings

# NF4: half a byte, an 8-bit scale per 64 values, and an fp32 scale per 256 of those scales.
NF4_BYTES_PER_PARAMETER = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# The most values in a bucket in which DeepSpeed reduces gradients; it is made whole, so runs ask for no larger one.
DEEPSPEED_BUCKET_VALUES = 500_000_000
# The most gathered values that its stage 3 keeps for later; what runs now may be more. For one rank it gathers nothing.
DEEPSPEED_LIVE_VALUES = 1_000_000_000
# The most values that AdamW moves at a time, and those of which moments in 8 bits share a scale: model/adamw.py's.
PIECE_VALUES = 2**24
BLOCK_VALUES = 256


def trained_parameters(spec: ModelSpec, settings: Settings) -> int:
    """Parameters that receive gradients, over all ranks."""
    decoder = spec.parameters if settings.kind == "full" else adapter_parameters(spec, settings)
    return decoder + tuned_tower_parameters(spec, settings)


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
        values = share_of(values, settings.num_ranks)
    piece = min(values, PIECE_VALUES)
    num_copies = 1 if not is_half else 2 if settings.adds_in_fp32 else 3
    moved = 4 * num_copies * piece
    if settings.optimizer_state != "8bit":
        return moved
    largest = min(piece, largest_tensor_bytes(spec, settings) // settings.trained_bytes)
    return moved + 8 * piece + round(2 * (1 + 4 / BLOCK_VALUES) * largest)


def gradient_bytes(spec: ModelSpec, settings: Settings) -> int:
    """All gradients of one rank once the backward pass is through."""
    trained = trained_parameters(spec, settings)
    if settings.sharding == "zero1":  # nothing is shared out before the optimizer steps
        return settings.trained_bytes * trained + _bucket_bytes(spec, settings)
    if settings.uses_deepspeed:
        share = 0 if settings.offloads else share_of(4 * trained, settings.num_ranks)
        # Stage 3 fills one bucket while another is on its way.
        leaving = leaving_bytes(spec, settings) if settings.is_sharded else 0
        return share + _bucket_bytes(spec, settings) + leaving
    if settings.sharding == "fsdp2":
        one_layer = settings.trained_bytes * trained // spec.num_layers
        return share_of(settings.trained_bytes * trained, settings.num_ranks) + one_layer
    # DDP holds the gradients a second time, in its buckets.
    return settings.trained_bytes * trained * (2 if settings.sharding == "ddp" else 1)


def _bucket_bytes(spec: ModelSpec, settings: Settings) -> int:
    return settings.trained_bytes * min(trained_parameters(spec, settings), DEEPSPEED_BUCKET_VALUES)


def leaving_bytes(spec: ModelSpec, settings: Settings) -> int:
    """What is laid flat once more to travel; a gradient larger than the bucket travels alone."""
    return max(_bucket_bytes(spec, settings), largest_tensor_bytes(spec, settings))


def sum_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Sums of gradients in fp32 beside those of a micro-batch; of shards their own."""
    if not settings.adds_in_fp32:
        return 0
    return share_of(4 * trained_parameters(spec, settings), settings.num_ranks if settings.is_sharded else 1)


def largest_tensor_bytes(spec: ModelSpec, settings: Settings) -> int:
    if settings.kind == "full":
        largest = max(spec.head_parameters, spec.expert_parameters_per_layer)
    else:
        largest = adapter_parameters(spec, settings) // spec.num_layers
    return settings.trained_bytes * largest


def share_of(num_bytes: int, num_ranks: int) -> int:
    return -(-num_bytes // num_ranks)
