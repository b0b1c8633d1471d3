"""Where FlexAttention trains: what it needs of a card, of torch, and through Triton of this machine; free of torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

from qwentune.errors import Problem
from qwentune.facts.gpus import GpuSpec

WHERE = "memory.attention"


def flex_problem(device: GpuSpec) -> Problem | None:
    """Why FlexAttention does not train on that card, and what mends it; None where it does.

    Source: Triton's README (compute capability 8.0 and up; Turing went with 3.3, triton-lang/triton#5066, and torch has
    needed that since 2.7). torch 2.8's `get_flex_attn_bwd_configs` (_inductor/template_heuristics.py) takes an RTX 50xx
    for an H100; 2.9 knows what it has. Another machine is taken to have the same torch, and what Triton needs.
    """
    if device.compute_capability < (8, 0):
        capability = ".".join(map(str, device.compute_capability))
        what = f"flex_attention needs compute capability 8.0 (Ampere), and {device.name} has {capability}"
        return Problem(WHERE, what, "Leave it at auto, or take sdpa.")
    torch = version("torch")
    if device.compute_capability[0] == 12 and torch.split(".")[:2] == ["2", "8"]:
        what = (
            f"flex_attention in torch {torch} goes backward with 119,808 bytes of shared memory, and {device.name} has "
            "101,376"
        )
        return Problem(WHERE, what, "Install torch 2.9 or later, or take sdpa.")
    if device.is_here and (missing := _missing_for_triton()):
        fix = "Install both (Debian: apt-get install gcc python3-dev), name the compiler in CC, or take sdpa."
        return Problem(WHERE, f"flex_attention has Triton compile C for its kernels, and {missing}", fix)
    return None


def _missing_for_triton() -> str:
    """What is not here of what Triton compiles with, in words; empty where all is.

    Source: `_build` and `_find_compiler` in Triton's runtime/build.py.
    """
    given = os.environ.get("CC")
    if given is not None and shutil.which(given) is None:
        return f"CC names {given!r}, which is no program here"
    if given is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "neither gcc nor clang is here"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
    return "" if (headers / "Python.h").is_file() else f"{headers} holds no Python.h"
