"""What this machine has: its GPUs by the driver's word, its free host memory and disk; free of torch."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psutil

from qwentune.facts.gpus import GpuSpec, gpu_spec, named_by_driver, weakest
from qwentune.facts.mig import first_visible, sliced, slices

MIB = 2**20
KERNELS = ("fla", "causal_conv1d")  # that transformers takes for hybrids by itself: the delta rule, its convolution
FEWEST = ("index", "uuid", "name", "memory.total", "memory.free")
CAPABILITY, ECC, SLICES = "compute_cap", "ecc.mode.current", "mig.mode.current"
# nvidia-smi answers a query with a field that it does not know with nothing at all.
QUERIES = ((*FEWEST, CAPABILITY, ECC, SLICES), FEWEST)
ORDER, BY_BUS = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
DRIVER_SECONDS, TORCH_SECONDS = 30, 120
# Run in a process of its own, for asking leaves a CUDA context, of which the free memory here has no part.
ASK_TORCH = """
import json, torch
cards = []
for number in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(number)
    try:
        free = torch.cuda.mem_get_info(number)[0]
    except RuntimeError:  # another process has it for itself
        free = card.total_memory
    cards.append([card.name, card.total_memory, free, f"{card.major}.{card.minor}"])
print(json.dumps(cards))
"""


@dataclass(frozen=True, slots=True)
class PresentGpus:
    """The GPUs of this machine in the order in which CUDA counts them, each with its free memory."""

    cards: tuple[GpuSpec, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.cards)

    @property
    def spec(self) -> GpuSpec:
        """What all of them have."""
        return weakest(self.cards)

    def of_ranks(self, num_ranks: int) -> GpuSpec:
        """What all cards have that so many processes take: the first ones."""
        return weakest(self.cards[:num_ranks])


def present_gpus() -> PresentGpus | None:
    """The machine's NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible; None where there is no driver or no GPU.

    Of GPUs that are cut into slices (MIG) a process sees one slice. Where nvidia-smi does not tell, as in slim
    containers, and something says that there is a GPU, torch is asked in a process of its own.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [device.strip() for device in visible.split(",") if device.strip()]
    if wanted == []:
        return None
    program = shutil.which("nvidia-smi")
    rows = [] if program is None else _listed(program)
    if program is not None and any(row.get(SLICES) == "Enabled" for row in rows):
        part = first_visible(slices(_asked(program, "-L") or ""), wanted)
        if part is not None:
            whole = next(row for row in rows if row["index"] == part.gpu_index)
            return PresentGpus((sliced(_spec(whole), part, _asked(program, "-q", "-x") or ""),))
    # A GPU that is cut into no slice yet is seen by nobody.
    seen = _visible([row for row in rows if row.get(SLICES) != "Enabled"], wanted)
    is_ordered = len(rows) < 2 or os.environ.get(ORDER, BY_BUS) == BY_BUS
    is_told = rows and is_ordered and all(named_by_driver(row["name"]) or row.get(CAPABILITY) for row in seen)
    cards = tuple(replace(_spec(row), total_bytes=_bytes(row["memory.free"])) for row in seen)
    if not is_told:
        cards = _seen_by_torch(visible, os.environ.get(ORDER, BY_BUS)) or cards
    return PresentGpus(cards) if cards else None


def count_cards_by_bus() -> None:
    """Makes CUDA count cards as nvidia-smi does and not the fastest first; before torch starts it.

    What the user has set stays.
    """
    os.environ.setdefault(ORDER, BY_BUS)


def may_have_gpu() -> bool:
    """Whether anything says that there is an NVIDIA GPU: a device file, also WSL's, or a driver's library."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@cache
def _seen_by_torch(visible: str | None, order: str) -> tuple[GpuSpec, ...]:
    """The cards that torch sees with these devices visible, in that order; none where it sees or says nothing.

    What its own context takes of each, some hundred MiB, is not free to it; the plan counts a context once more.
    """
    if not may_have_gpu():
        return ()
    environment = {**os.environ, ORDER: order}
    command = [sys.executable, "-P", "-c", ASK_TORCH]
    try:
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TORCH_SECONDS, check=True
        )
        cards: list[tuple[str, int, int, str]] = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
    return tuple(
        replace(_named(name, total, capability), total_bytes=free, is_here=True)
        for name, total, free, capability in cards
    )


def _listed(program: str) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU by field, of as many fields as it knows."""
    for fields in QUERIES:
        answer = _asked(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if answer is None:
            break
        cells = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
        if rows := [dict(zip(fields, row, strict=True)) for row in cells if len(row) == len(fields)]:
            return rows
    return []


def _asked(program: str, *arguments: str) -> str | None:
    """What nvidia-smi says; nothing where it fails, None where it does not answer."""
    try:
        answer = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else ""


def _visible(rows: Sequence[dict[str, str]], wanted: Sequence[str] | None) -> list[dict[str, str]]:
    """The GPUs in the order in which CUDA_VISIBLE_DEVICES names them; CUDA stops at the first that there is not."""
    if wanted is None:
        return [*rows]
    seen: list[dict[str, str]] = []
    for device in wanted:
        named = [row for row in rows if row["index"] == device or row["uuid"].startswith(device)]
        if not named:
            break
        seen.append(named[0])
    return seen


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


def _spec(row: dict[str, str]) -> GpuSpec:
    found = _named(row["name"], _bytes(row["memory.total"]), row.get(CAPABILITY, ""))
    return replace(found, has_ecc=row.get(ECC) == "Enabled", is_here=True)


def _named(name: str, total_bytes: int, capability: str) -> GpuSpec:
    """The table's row for the driver's name: of those that fit, the one nearest in memory."""
    if matching := named_by_driver(name):
        return min(matching, key=lambda spec: abs(spec.total_bytes - total_bytes))
    # An unknown card is judged by its own memory; its speed only orders the candidates, so any row of its kind serves.
    # One of which nobody tells the kind is taken for an old one, which leaves out what it may not have.
    told = re.fullmatch(r"(\d+)\.(\d+)", capability)
    found = (int(told[1]), int(told[2])) if told else (0, 0)
    model = gpu_spec("rtx-4090" if found >= (8, 0) else "t4")
    return replace(
        model,
        name=name,
        compute_capability=found if told else model.compute_capability,
        source="nvidia-smi",
        fp16_tflops=None,
        rates_of=model.name,
    )
