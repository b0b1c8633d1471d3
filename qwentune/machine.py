"""What of this machine helps or hinders a run: each thing looked at by itself, with what mends it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from qwentune import __version__
from qwentune.data.cache import cache_folder, writable_cache
from qwentune.errors import FULL, UserError, counted, nearest
from qwentune.facts.flex import flex_problem
from qwentune.facts.present import free_host_bytes, may_have_gpu, present_gpus
from qwentune.training.device import no_code, runs

GIB = 2**30
TESTED = Path(__file__).with_name("tested.txt")
LEAST_HOST_GIB, LEAST_DISK_GIB = 4, 20  # below which even small models are short of room
PROBED_MIB, SLOW_MIB_PER_SECOND = 64, 50
HUB_SECONDS = 5
VARIABLES = {
    "QWENTUNE_CACHE": "the folder of rendered data",
    "QWENTUNE_WORKERS": "the processes that render rows",
    "QWENTUNE_TRACEBACK": "shows tracebacks of bugs",
}
OF_TESTS = re.compile("QWENTUNE_(TEST|MEMORY|REPORTS)")
NO_GPU = "Plan for a card that is elsewhere with hardware.gpu=NAME; `qwentune gpus` lists them."


@dataclass(frozen=True)
class Finding:
    """One thing of the machine: how it stands, and where it does not stand well, what mends it."""

    state: Literal["ok", "warn", "fail"]
    about: str
    what: str
    mend: str = ""


def findings() -> Iterator[Finding]:
    """Everything that was looked at, in the order in which a run needs it."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        *(_python, _packages, _extras, _gpus, _torch, _compiler, _quantising),
        *(_memory, _cache, _hub, _variables),
    )
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    if not requirements():
        yield Finding("warn", "qwentune", "is not installed: its packages are not known", "pip install -e FOLDER")
    yield Finding("ok", "qwentune", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def tested_versions() -> dict[str, str]:
    """The version of each package that the tests were last run with."""
    lines = TESTED.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {package: number for package, _, number in pairs}


def requirements() -> list[Requirement]:
    """The packages that qwentune was installed with; none where it is run from a folder that nobody installed."""
    try:
        return [Requirement(line) for line in requires("qwentune") or ()]
    except PackageNotFoundError:
        return []


def _packages() -> Iterator[Finding]:
    tested, others = tested_versions(), list[str]()
    count = 0
    for wanted in requirements():
        if wanted.marker is not None:  # of an extra
            continue
        count += 1
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield Finding("fail", wanted.name, "is not installed", f"pip install '{wanted}'")
            continue
        if found not in wanted.specifier:
            what = f"{found} is none of the versions that qwentune runs with"
            yield Finding("fail", wanted.name, what, f"pip install '{wanted}'")
        elif (number := found.split("+")[0]) != tested.get(wanted.name, number):  # after a plus stands the build
            others.append(f"{wanted.name} {found} (tested: {tested[wanted.name]})")
    if others:
        yield Finding("warn", "packages", ", ".join(others), f"Where something fails: pip install -c {TESTED} qwentune")
    elif count:
        yield Finding("ok", "packages", f"{count} of the tested versions")


def _extras() -> Iterator[Finding]:
    lacking: dict[str, list[str]] = {}
    for wanted in requirements():
        found = re.search(r"extra == ['\"](\w+)['\"]", str(wanted.marker or ""))
        if found is None or found[1] == "test" or wanted.name == "qwentune":
            continue
        lacking.setdefault(found[1], [])
        try:
            version(wanted.name)
        except PackageNotFoundError:
            lacking[found[1]].append(wanted.name)
    if not lacking:
        return
    there = [name for name, missing in lacking.items() if not missing]
    rest = [f"{name} (lacks {', '.join(missing)})" for name, missing in lacking.items() if missing]
    what = "; ".join(filter(None, [f"installed: {', '.join(there)}" if there else "", *rest]))
    mend = f"Where rows or launch files need it: pip install 'qwentune[{','.join(k for k, v in lacking.items() if v)}]'"
    yield Finding("ok", "extras", what, mend if rest else "")


def _gpus() -> Iterator[Finding]:
    found = present_gpus()
    if found is None:
        if may_have_gpu():
            what = "something here says that there is an NVIDIA GPU, but neither nvidia-smi nor torch tells of one"
            yield Finding("fail", "GPU", what, "Mend the driver; containers need `--gpus all` and its utilities.")
        else:
            yield Finding("warn", "GPU", "none: this machine trains on its CPU", NO_GPU)
        return
    for card in found.cards:
        what = f"{card.name}, {card.total_bytes / GIB:.1f} GiB free"
        if card.bf16_tflops is None:
            yield Finding("warn", "GPU", f"{what}; it has no bf16 and trains in fp32", "Plan says what that costs.")
        else:
            yield Finding("ok", "GPU", what)


def _torch() -> Iterator[Finding]:
    import torch

    built = f"torch {version('torch')}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")
    cards = present_gpus()
    if not torch.cuda.is_available():
        if cards is None:
            yield Finding("ok", "torch", built)
        else:
            mend = "Install a build of torch for this driver; `nvidia-smi` names its CUDA."
            yield Finding("fail", "torch", f"{built}, sees no GPU", mend)
        return
    codes = torch.cuda.get_arch_list()
    for card in range(torch.cuda.device_count()):
        if not runs(torch.cuda.get_device_capability(card), codes):
            problem = no_code(torch.cuda.get_device_name(card), card, codes)
            yield Finding("fail", "torch", problem.what, problem.fix)
            return
    yield Finding("ok", "torch", f"{built}, code for {' '.join(codes)}")


def _compiler() -> Iterator[Finding]:
    cards = present_gpus()
    if cards is None:
        return
    problem = flex_problem(cards.spec)
    if problem is None:
        yield Finding("ok", "attention", "FlexAttention can be compiled")
    else:
        yield Finding("warn", "attention", f"{problem.what}; sdpa is used", problem.fix)


def _quantising() -> Iterator[Finding]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        given = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = quantize_4bit(given, quant_type="nf4")
        far = (dequantize_4bit(packed, state) - given).abs().max().item()
    except Exception as error:  # whatever a native library does here is what is to be told
        what = f"does not quantise here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding("fail", "bitsandbytes", what, "QLoRA and 8-bit optimizer states need it: reinstall bitsandbytes.")
        return
    if far < 0.2:
        yield Finding("ok", "bitsandbytes", f"{version('bitsandbytes')} quantises on {device}")
    else:
        yield Finding("fail", "bitsandbytes", f"4-bit values come back {far:.2f} off", "Reinstall bitsandbytes.")


def _memory() -> Iterator[Finding]:
    free = free_host_bytes() / GIB
    what = f"{free:.1f} GiB of host memory free, {counted(os.cpu_count() or 1, 'core{|s}')}"
    few = free < LEAST_HOST_GIB
    yield Finding("warn" if few else "ok", "memory", what, "End other programs: models are read here." if few else "")


def _cache() -> Iterator[Finding]:
    try:
        folder = writable_cache()
    except UserError as error:
        for problem in error.problems:
            yield Finding("fail", "cache", f"{problem.where}: {problem.what}", problem.fix)
        return
    free = shutil.disk_usage(folder).free / GIB
    try:
        speed = written_mib_per_second(folder)
    except OSError as error:
        mend = "Free some space." if error.errno in FULL else "Mend the disk, or name another folder: QWENTUNE_CACHE."
        yield Finding("fail", "cache", f"{cache_folder()}: {error.strerror}", mend)
        return
    what = f"{folder}: {free:.0f} GiB free, written at {speed:.0f} MiB/s"
    if free < LEAST_DISK_GIB:
        yield Finding("warn", "cache", what, "Rendered data and checkpoints may need more.")
    elif speed < SLOW_MIB_PER_SECOND:
        yield Finding("warn", "cache", what, "That is slow, as over a network: name a local folder, QWENTUNE_CACHE.")
    else:
        yield Finding("ok", "cache", what)


def written_mib_per_second(folder: Path) -> float:
    """How fast bytes reach the disk of a folder; OSError where they do not."""
    content = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(PROBED_MIB):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return PROBED_MIB / (time.perf_counter() - start)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        yield Finding("ok", "hub", "not asked: HF_HUB_OFFLINE is set; checkpoints come from folders and the cache")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whatever its HTTP library has
        what = f"{constants.ENDPOINT} does not answer: {type(error).__name__}"
        mend = "Name checkpoints by their folders, or set HF_ENDPOINT or HTTPS_PROXY; HF_HUB_OFFLINE=1 does not ask."
        yield Finding("warn", "hub", what, mend)
    else:
        yield Finding("ok", "hub", f"{constants.ENDPOINT} answers")


def _variables() -> Iterator[Finding]:
    for name in sorted(os.environ):
        if name in VARIABLES:
            yield Finding("ok", name, f"{os.environ[name]} ({VARIABLES[name]})")
        elif name.startswith("QWENTUNE_") and not OF_TESTS.match(name):
            mend = nearest(name, VARIABLES).strip() or f"Known are {', '.join(VARIABLES)}."
            yield Finding("warn", name, "is read by nothing", mend)
    if sys.platform == "win32":
        yield Finding("warn", "system", "Windows is not tested", "Use WSL.")
