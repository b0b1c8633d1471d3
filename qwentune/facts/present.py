"""What this machine has: its GPUs by the driver's word, its free host memory and disk; free of torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import psutil

from qwentune.facts.gpus import GPUS, GpuSpec, gpu_spec
from qwentune.facts.mig import first_visible, sliced, slices

MIB = 2**20
KERNELS = ("fla", "causal_conv1d")  # that transformers takes for hybrids by itself: the delta rule, its convolution
QUERY = "index,uuid,name,memory.total,memory.free,compute_cap,ecc.mode.current,mig.mode.current"


@dataclass(frozen=True, slots=True)
class PresentGpus:
    """The GPUs of this machine: the facts of one with the free memory of the fullest, and how many there are."""

    spec: GpuSpec
    count: int


def present_gpus() -> PresentGpus | None:
    """The machine's NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible; None where there is no driver or no GPU.

    Of GPUs that are cut into slices (MIG) a process sees one slice.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    answer = _asked(program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    rows = [row for row in rows if len(row) == len(QUERY.split(","))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [device.strip() for device in visible.split(",") if device.strip()]
    if any(row[7] == "Enabled" for row in rows):
        part = first_visible(slices(_asked(program, "-L")), wanted)
        if part is not None:
            whole = next(row for row in rows if row[0] == part.gpu_index)
            return PresentGpus(sliced(_spec(whole), part, _asked(program, "-q", "-x")), 1)
    # A GPU that is cut into no slice yet is seen by nobody.
    rows = [row for row in rows if row[7] != "Enabled"]
    if wanted is not None:
        rows = [row for row in rows if any(row[0] == device or row[1].startswith(device) for device in wanted)]
    if not rows:
        return None
    return PresentGpus(replace(_spec(rows[0]), total_bytes=min(_bytes(row[4]) for row in rows)), len(rows))


def _asked(program: str, *arguments: str) -> str:
    """What nvidia-smi says; nothing where it fails."""
    answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout if answer.returncode == 0 else ""


def spills() -> bool:
    """Whether a full GPU takes host memory instead of failing, as under Windows' driver model, also in WSL."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def installed_kernels() -> frozenset[str]:
    """The packages of fused kernels for hybrids that are installed here."""
    return frozenset(name for name in KERNELS if find_spec(name) is not None)


def free_host_bytes() -> int:
    """Host memory that the system can give without swapping."""
    return psutil.virtual_memory().available


def free_disk_bytes(run: Path, *, fresh: bool) -> int:
    """Bytes that a run in the folder `run` may fill: those free there, and its own earlier ones unless it is `fresh`.

    A run that goes on replaces its checkpoints and weights, a fresh one moves them aside.
    """
    existing = next(path for path in (run, *run.resolve().parents) if os.access(path, os.F_OK))
    free = shutil.disk_usage(existing).free
    return free if fresh else free + sum(_held_bytes(run / name) for name in ("checkpoints", "adapter", "model"))


def _held_bytes(folder: Path) -> int:
    held = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run beside this one may be removing it
                held += os.lstat(os.path.join(root, name)).st_size
    return held


def _bytes(mib: str) -> int:
    """The bytes of a number of MiB; GPUs that share the host's memory give none."""
    return int(mib) * MIB if mib.isdecimal() else free_host_bytes()


def _spec(row: list[str]) -> GpuSpec:
    _, _, name, total, _, capability, ecc, _ = row
    return replace(_named(name, _bytes(total), capability), has_ecc=ecc == "Enabled")


def _named(name: str, total_bytes: int, capability: str) -> GpuSpec:
    """The table's row for the driver's name: of the rows whose words it holds, the one nearest in memory."""
    words = name.lower().replace("-", " ").split()
    matching = [spec for spec in GPUS.values() if set(spec.name.split("-")) - {"80gb", "40gb", "12gb"} <= set(words)]
    if matching:
        return min(matching, key=lambda spec: abs(spec.total_bytes - total_bytes))
    # An unknown card is judged by its own memory; its speed only orders the candidates, so any row of its kind serves.
    major, _, minor = capability.partition(".")
    model = gpu_spec("rtx-4090" if int(major) >= 8 else "t4")
    return replace(model, name=name, compute_capability=(int(major), int(minor or 0)), source="nvidia-smi")
