"""Whether torch really has the device that the plan is for, and code for it; before any weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from qwentune.errors import Problem, UsageError
from qwentune.memory.settings import HostMemory

if TYPE_CHECKING:
    from qwentune.memory.plan_request import Device
    from qwentune.training.ranks import Ranks

WHERE = "hardware.gpu"
OLDER_CUDA = "https://download.pytorch.org/whl/cu126"  # holds code for cards from Maxwell to Hopper
TOLERANCE = 0.03  # of a card's memory, by which the driver's figure may be above torch's
CODE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")


def refuse_other_device(device: Device, ranks: Ranks) -> None:
    """Raises UsageError where the ranks of this machine would not train on what the plan is for.

    Every rank looks at the cards of all, so that each refuses in the same words.
    """
    if ranks.on_cpu:
        return
    import torch

    sees_gpu, torch_version = torch.cuda.is_available(), version("torch")
    if isinstance(device, HostMemory):
        if sees_gpu:
            seen = torch.cuda.get_device_name(0)
            what = f"the plan is for this machine's CPU, as nvidia-smi tells of no GPU, but torch would train on {seen}"
            fix = "Make nvidia-smi answer (containers: NVIDIA_DRIVER_CAPABILITIES=compute,utility), or set "
            raise UsageError(Problem(WHERE, what, fix + "hardware.gpu=cpu."))
        return
    if not sees_gpu:
        what = f"the plan is for {device.name}, but torch {torch_version} sees no GPU and would train on the CPU: "
        fix = f"Install a build of torch for this driver (`nvidia-smi` names its CUDA; {OLDER_CUDA} takes older ones), "
        raise UsageError(Problem(WHERE, what + _why_no_gpu(), fix + "or hardware.gpu=cpu."))
    seen, needed = torch.cuda.device_count(), ranks.num_here
    if seen < needed:
        what = f"{needed} processes take a GPU each, and torch sees {seen}"
        raise UsageError(Problem("hardware.count", what, f"accelerate launch --num_processes {seen} …"))
    found = [torch.cuda.get_device_properties(card) for card in range(needed)]
    weakest, least = min((card.major, card.minor) for card in found), min(card.total_memory for card in found)
    if weakest != device.compute_capability or least < device.total_bytes * (1 - TOLERANCE):
        names = ", ".join(dict.fromkeys(card.name for card in found))
        what = f"the plan is for {_described(device.name, device.compute_capability, device.total_bytes)}, but torch "
        what += f"would train on {_described(names, weakest, least)}"
        fix = "Make nvidia-smi and torch see the same cards: CUDA_VISIBLE_DEVICES, and CUDA_DEVICE_ORDER=PCI_BUS_ID."
        raise UsageError(Problem(WHERE, what, fix))
    codes = torch.cuda.get_arch_list()
    without = [card for card in range(needed) if not runs(torch.cuda.get_device_capability(card), codes)]
    if without:
        raise UsageError([no_code(torch.cuda.get_device_name(card), card, codes) for card in without])


def runs(capability: tuple[int, int], codes: Sequence[str]) -> bool:
    """Whether code for these architectures (`sm_80`, `compute_90`) runs on a card; of builds without any not judged.

    Source: CUDA's programming guide. Binary code runs on its major version from its minor on, PTX (`compute`) on
    anything newer; with the suffix a on that version alone, with f on those of its family.
    """
    found = [code for code in map(CODE.fullmatch, codes) if code is not None]
    for code in found:
        built_for = int(code["major"]), int(code["minor"])
        is_kin = built_for[0] == capability[0] or (code["kind"] == "compute" and not code["only"])
        if capability == built_for or (code["only"] != "a" and is_kin and built_for <= capability):
            return True
    return not found


def _described(name: str, capability: tuple[int, int], num_bytes: int) -> str:
    return f"{name} (compute capability {capability[0]}.{capability[1]}, {num_bytes / 2**30:.1f} GiB)"


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"


def no_code(name: str, card: int, codes: Sequence[str]) -> Problem:
    """What to say of a card that this build of torch has no code for."""
    import torch

    capability = torch.cuda.get_device_capability(card)
    oldest = min((int(code["major"]), int(code["minor"])) for code in map(CODE.fullmatch, codes) if code is not None)
    what = f"torch {version('torch')} holds no code for {name}, sm_{capability[0]}{capability[1]}: {' '.join(codes)}"
    fix = "pip install --upgrade torch"
    if capability < oldest:
        fix = f"Install a build for an older CUDA: pip install torch --index-url {OLDER_CUDA}"
    return Problem(WHERE, what, fix)
