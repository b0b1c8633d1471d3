"""Seconds of an optimizer step from a simple roofline: good enough to rank plans, not to promise a time.

Source: floating-point operations per token as usually counted (full 6N + 3a, LoRA 4N + 3a + 6 P_lora; recomputing a
layer costs another forward pass), with 0.8 of the data sheet's rate, which an H200 reached on large products. Memory
traffic of eager Qwen layers was 12 (full) and 16 (LoRA) times what they save for the backward pass, 160 and 250
kernels per layer; 20 microseconds per kernel on the host reproduce the step time at which small models stop getting
faster. The 3 microseconds between kernels on the device are unverified; they make larger micro-batches a little faster.
Linear attention in torch was counted at 45 kernels for each 64 tokens of a layer, forward and backward. What an
optimizer step reads and writes was counted in model/adamw.py's `_move`, kernel by kernel.
"""

from __future__ import annotations

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.machines import NETWORK_BYTES_PER_SECOND
from qwentune.memory.closed_form.activations import kept_bytes
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters
from qwentune.memory.closed_form.model_states import quantised_parameters, trained_parameters
from qwentune.memory.settings import Dtype, HostMemory, Settings

GEMM_EFFICIENCY = 0.8
BANDWIDTH_EFFICIENCY = 0.9
_SECONDS_PER_KERNEL = 20e-6
_SECONDS_BETWEEN_KERNELS = 3e-6
_RECOMPUTE_SHARE = 0.36  # of a layer's traffic and kernels belongs to its forward pass
# Of the tokens of a dialogue, taken; the supervised loss computes their logits alone, twice.
_TRAINED_SHARE = 0.5
_FRAMES_OF_A_TOKEN = 4  # of clips that are not very short
# What sharding costs where links are fast; only the order of them matters.
_SHARDING_COST = {
    "none": 1.0,
    "ddp": 1.02,
    "zero1": 1.03,
    "zero2": 1.04,
    "zero2-offload": 1.04,
    "fsdp2": 1.08,
    "zero3": 1.12,
    "zero3-offload": 1.12,
}
# A desktop CPU; plans for a CPU are ranked with it, and no time is promised.
_CPU_FLOPS, _CPU_BANDWIDTH, _CPU_SECONDS_PER_KERNEL = 2e11, 3e10, 5e-6


def step_seconds(spec: ModelSpec, settings: Settings, device: GpuSpec | HostMemory) -> float:
    """Seconds of one optimizer step, every row at its fullest."""
    bytes_per_second, _ = _rates(device)
    arithmetic, traffic, between, launches = _micro_batch_seconds(spec, settings, device)
    micro_batch_seconds = max(arithmetic + traffic + between, launches)
    # As if each rank moved all: what sharing saves here it costs on the way.
    optimizer_traffic = 0 if settings.offloads else trained_parameters(spec, settings) * _moved_bytes(settings)
    seconds = settings.accumulation * micro_batch_seconds + optimizer_traffic / bytes_per_second
    seconds *= _SHARDING_COST[settings.sharding]
    return seconds + _offload_seconds(spec, settings, device) + _network_seconds(spec, settings)


def bound(spec: ModelSpec, settings: Settings, device: GpuSpec | HostMemory) -> str:
    """What most of a step's time goes to: `matrix products`, `memory traffic` or `launches of kernels`."""
    arithmetic, traffic, between, launches = _micro_batch_seconds(spec, settings, device)
    if launches > arithmetic + traffic + between:
        return "launches of kernels"
    return "matrix products" if arithmetic >= traffic else "memory traffic"


def _micro_batch_seconds(
    spec: ModelSpec, settings: Settings, device: GpuSpec | HostMemory
) -> tuple[float, float, float, float]:
    """Of a micro-batch on the device: arithmetic, traffic, pauses between kernels; and on the host its launches."""
    bytes_per_second, seconds_per_kernel = _rates(device)
    recomputed = settings.num_checkpointed(spec.num_layers) / spec.num_layers
    is_full = settings.kind == "full"

    in_base, in_adapters = _flops_per_token(spec, settings, recomputed)
    arithmetic = in_base / _flops_per_second(settings.weights, device)
    arithmetic += in_adapters / _flops_per_second(settings.adapters, device)
    traffic = kept_bytes(spec, settings, spec.num_layers) * (12 if is_full else 16)
    traffic *= 1 + _RECOMPUTE_SHARE * recomputed
    if settings.kind == "qlora":
        # Each pass reads half a byte and writes two.
        traffic += 2.5 * quantised_parameters(spec) * (2 + recomputed)
    num_linear = spec.num_layers - spec.num_attention_layers
    kernels = spec.num_layers * (160 if is_full else 250)
    if not settings.fuses_delta_rule:
        kernels += num_linear * 45 * settings.max_tokens / 64
    kernels *= 1 + _RECOMPUTE_SHARE * recomputed

    arithmetic *= settings.forward_tokens
    arithmetic += _tower_flops(spec, settings) / _flops_per_second(settings.weights, device)
    between, launches = kernels * _SECONDS_BETWEEN_KERNELS, kernels * seconds_per_kernel
    return arithmetic, traffic / bytes_per_second, between, launches


def _network_seconds(spec: ModelSpec, settings: Settings) -> float:
    """Seconds of one optimizer step on the links between machines, as if no arithmetic went on meanwhile.

    The ranks of a machine add up first, so that each value crosses its link once: gradients go and come back; of
    what all ranks share, weights come for each pass of a micro-batch, and gradients go after it.
    """
    if settings.num_machines == 1:
        return 0.0
    gradients = settings.trained_bytes * trained_parameters(spec, settings)
    if settings.is_sharded:
        moved = settings.accumulation * (2 * settings.weight_bytes * spec.parameters + gradients)
    elif settings.sharding.startswith("zero2"):
        moved = (settings.accumulation + 1) * gradients
    else:
        moved = 2 * gradients
    return moved * (1 - 1 / settings.num_machines) / NETWORK_BYTES_PER_SECOND


def _offload_seconds(spec: ModelSpec, settings: Settings, device: GpuSpec | HostMemory) -> float:
    """Seconds of one optimizer step for the way to the host and back, and for the optimizer there."""
    if not settings.offloads or isinstance(device, HostMemory):
        return 0.0
    trained = trained_parameters(spec, settings)
    # Gradients go down; each further micro-batch fetches them again to add its own. New weights come up.
    journeys = 2 * settings.accumulation - 1 + 1
    link = journeys * settings.trained_bytes * trained / settings.num_ranks / (device.link_gb_per_second * 1e9)
    # Clip: gradient read and written. All ranks of a machine share the host.
    return link + trained / settings.num_machines * (8 + _moved_bytes(settings)) / _CPU_BANDWIDTH


def _moved_bytes(settings: Settings) -> int:
    """Bytes that an optimizer step reads and writes for each trained value."""
    before, kernel, measured = 4 + 4, 4 * 4 + 3 * 4, (8 + 4) + 8
    moved = before + kernel + measured
    if settings.uses_deepspeed:
        moved += 4 + settings.trained_bytes  # the new weights
    elif settings.trained_bytes == 2:
        joined, gradient, split = (2 + 4) + (2 + 2) + (6 + 4), 2 + 4, (4 + 2) + 8 + 8 + (4 + 2)
        moved += joined + gradient + split
    if settings.optimizer_state == "8bit":
        unpacked, packed, chosen = 1 + 4, 4 + 1, (2 + 1) + (1 + 1)
        moved += 2 * (unpacked + packed + chosen)
    return moved


def _rates(device: GpuSpec | HostMemory) -> tuple[float, float]:
    """Bytes per second, and seconds per kernel on the host."""
    if isinstance(device, HostMemory):
        return _CPU_BANDWIDTH, _CPU_SECONDS_PER_KERNEL
    return device.bandwidth_gb_per_second * 1e9 * BANDWIDTH_EFFICIENCY, _SECONDS_PER_KERNEL


def _flops_per_second(dtype: Dtype, device: GpuSpec | HostMemory) -> float:
    """Floating-point operations per second; in fp32 tensor cores stand by."""
    if isinstance(device, HostMemory):
        return _CPU_FLOPS
    tflops = device.fp32_tflops if dtype == "fp32" or device.bf16_tflops is None else device.bf16_tflops
    return tflops * 1e12 * GEMM_EFFICIENCY


def _tower_flops(spec: ModelSpec, settings: Settings) -> float:
    """Of the media of a forward and, where it goes through the towers, a backward pass; attention left out."""
    if settings.towers is None or spec.tower is None:
        return 0.0
    passes = (3 + settings.recomputes_towers) if settings.tunes_towers else 1
    flops = 0.0
    if (vision := spec.tower.vision) is not None:
        flops += 2 * settings.forward_patches * (vision.body_parameters + vision.merger_parameters / vision.merge**2)
    if (audio := spec.tower.audio) is not None:  # two frames become one position
        frames = settings.forward_frames
        if settings.towers.is_bound:  # time goes by usual clips, not by the shortest
            frames = min(frames, _FRAMES_OF_A_TOKEN * settings.forward_tokens)
        flops += frames * audio.body_parameters
    return passes * flops


def _flops_per_token(spec: ModelSpec, settings: Settings, recomputed: float) -> tuple[float, float]:
    """Of a forward and a backward pass: in the base, and in the adapters."""
    body, head = 2 * spec.active_body_parameters, 2 * spec.head_parameters
    attention = 2 * spec.num_attention_layers * spec.query_size * settings.max_tokens
    passes = 3 if settings.kind == "full" else 2
    head_passes = (passes + 1) * _TRAINED_SHARE if settings.loss == "supervised" else passes
    in_base = passes * body + head_passes * head + 3 * attention + recomputed * (body + attention)
    return in_base, (3 + recomputed) * 2 * adapter_parameters(spec, settings)
