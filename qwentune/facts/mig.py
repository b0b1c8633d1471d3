"""Slices of one GPU (MIG): which of them CUDA will see, and what it has, by the driver's word.

Source: NVIDIA's MIG user guide. A process sees one slice, the first of those that CUDA_VISIBLE_DEVICES leaves visible,
and no whole GPU beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from qwentune.facts.gpus import GpuSpec

MIB = 2**20
COMPUTE_SLICES = 7  # of an A100 and later data-centre GPUs
# `nvidia-smi -L`: "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-…)", below it "  MIG 3g.20gb     Device  0: (UUID: MIG-…)".
_LINE = re.compile(
    r"\s*(?:GPU (?P<gpu>\d+): .*|MIG (?P<profile>\S+)\s+Device\s+(?P<index>\d+):\s*)\(UUID: (?P<uuid>\S+)\)"
)
_PROFILE = re.compile(r"(?:(?P<compute>\d+)c\.)?(?P<slices>\d+)g\.(?P<gigabytes>\d+)gb")


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice: its size as in `3g.20gb`, its name for CUDA, and its place on which GPU."""

    profile: str
    uuid: str
    index: str
    gpu_index: str
    gpu_uuid: str


def slices(listed: str) -> list[Slice]:
    """The slices that `nvidia-smi -L` lists."""
    found: list[Slice] = []
    gpu_index = gpu_uuid = ""
    for line in filter(None, map(_LINE.match, listed.splitlines())):
        if line["gpu"] is not None:
            gpu_index, gpu_uuid = line["gpu"], line["uuid"]
        else:
            found.append(Slice(line["profile"], line["uuid"], line["index"], gpu_index, gpu_uuid))
    return found


def first_visible(found: Sequence[Slice], wanted: Sequence[str] | None) -> Slice | None:
    """The slice that a process takes; `wanted` are the devices of CUDA_VISIBLE_DEVICES, None where it is not set."""
    if wanted is None:
        return next(iter(found), None)
    for device in wanted:
        for each in found:
            if device == each.gpu_index or each.uuid.startswith(device) or each.gpu_uuid.startswith(device):
                return each
    return None


def sliced(spec: GpuSpec, part: Slice, details: str) -> GpuSpec:
    """The facts of a slice of the GPU `spec`, whose free memory the XML of `nvidia-smi -q -x` tells.

    A driver that does not tell it leaves the size in the slice's name, of which there is a little more in truth.
    """
    sizes = _PROFILE.search(part.profile)
    if sizes is None:
        return spec
    nominal = int(sizes["gigabytes"]) * 10**9
    compute = int(sizes["compute"] or sizes["slices"]) / COMPUTE_SLICES
    return replace(
        spec,
        name=f"{spec.name} MIG {part.profile}",
        total_bytes=_free_bytes(part, details) or nominal,
        bf16_tflops=spec.bf16_tflops and spec.bf16_tflops * compute,
        fp32_tflops=spec.fp32_tflops * compute,
        bandwidth_gb_per_second=spec.bandwidth_gb_per_second * min(1.0, nominal / spec.total_bytes),
    )


def _free_bytes(part: Slice, details: str) -> int | None:
    try:
        log = ElementTree.fromstring(details)
    except ElementTree.ParseError:
        return None
    for gpu in log.iter("gpu"):
        for device in gpu.iter("mig_device"):
            if (gpu.findtext("uuid"), device.findtext("index")) == (part.gpu_uuid, part.index):
                free, _, unit = (device.findtext("fb_memory_usage/free") or "").partition(" ")
                return int(free) * MIB if free.isdecimal() and unit == "MiB" else None
    return None
