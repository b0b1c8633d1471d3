"""What the steps of a run took beside what the roofline says they take, kept in the cache for later plans.

A profile is one factor per card, tuning kind and model: the times that a run measures do not tell arithmetic, memory
traffic and communication apart, and a factor that all settings share leaves the choice between them as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from qwentune import console
from qwentune.data.cache import cache_folder
from qwentune.durable import write_text
from qwentune.errors import UserError
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.memory.closed_form.roofline import step_seconds
from qwentune.memory.rates import find_rates, with_rates
from qwentune.memory.settings import HostMemory, Settings, Tuning

ROOFLINE: Literal[1] = 1  # raise it with the type below whenever the roofline says other seconds than before
WARM_UP_STEPS = 3  # in which kernels are compiled and the allocator grows
FEWEST_WINDOWS = 5

Row: TypeAlias = Mapping[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Profile:
    """How many times the roofline's seconds a card took: the median over `num_steps` steps of one run."""

    roofline: Literal[1]
    device: str
    kind: Tuning
    model: str
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    num_steps: Annotated[int, Field(gt=0)]
    date: str
    versions: dict[str, str]


_PROFILE = TypeAdapter(Profile)


def measured(
    rows: Sequence[Row], spec: ModelSpec, settings: Settings, device: GpuSpec | HostMemory
) -> tuple[float, int] | None:
    """The factor and the steps that it was taken from; None on a CPU, and where too few steps were logged.

    Args:
        rows: The `step`, `tokens` and `seconds` of each time that one process logged, all of its own.
    """
    if isinstance(device, HostMemory) or not rows:
        return None
    # A logged time reaches back to the one before; the first reaches back beyond the first step.
    windows = [(before, row) for before, row in pairwise(rows) if _steps(rows[0], before) >= WARM_UP_STEPS]
    if len(windows) < FEWEST_WINDOWS:
        return None
    factors: list[float] = []
    for before, row in windows:
        num_rows = _steps(before, row) * settings.micro_batch * settings.accumulation * settings.num_ranks
        at_this_length = replace(settings, max_tokens=max(1, round((row["tokens"] or 0) / num_rows)))
        factors.append((row["seconds"] or 0) / _steps(before, row) / step_seconds(spec, at_this_length, device))
    return median(factors), _steps(windows[0][0], windows[-1][1])


def keep_profile(
    rows: Sequence[Row],
    spec: ModelSpec,
    settings: Settings,
    device: GpuSpec | HostMemory,
    versions: Mapping[str, str],
) -> None:
    """Writes what the steps of a run took, for later plans; nothing on a CPU, and where too few steps were logged."""
    if isinstance(device, HostMemory):
        return
    found = measured(rows, spec, settings, with_rates(device, spec.id))
    if found is None or not found[0] > 0:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    profile = Profile(ROOFLINE, device.name, settings.kind, spec.id, *found, now, dict(versions))
    try:
        path = _folder(device.name) / f"{settings.kind}-{sha256(spec.id.encode()).hexdigest()[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _PROFILE.dump_json(profile, indent=2).decode() + "\n")
    except (OSError, UserError) as error:
        console.say(f"warning: the measured times could not be kept for later plans: {error}")


def find_profile(spec: ModelSpec, kind: Tuning, device: GpuSpec | HostMemory) -> Profile | None:
    """What was measured on such a card: of this model, else the newest of another; None on a CPU."""
    if isinstance(device, HostMemory):
        return None
    rates = find_rates(device.name)
    since = "" if rates is None else rates.date  # a factor over the data sheet's seconds says nothing of measured ones
    fitting = [profile for profile in _stored(device.name) if profile.kind == kind and profile.date >= since]
    return max(fitting, key=lambda profile: (profile.model == spec.id, profile.date), default=None)


def _stored(device: str) -> Iterator[Profile]:
    for path in sorted(_folder(device).glob("*.json")):
        try:
            profile = _PROFILE.validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error.errors()[0]['msg']}"
        else:
            if profile.device == device:
                yield profile
                continue
            why = f"it is of the card {profile.device}"
        console.say(f"warning: {path} holds no times of {device} and is ignored: {why}; remove it")


def _folder(device: str) -> Path:
    return cache_folder() / "profiles" / re.sub(r"[^a-z0-9]+", "-", device.lower())


def _steps(before: Row, row: Row) -> int:
    return int((row["step"] or 0) - (before["step"] or 0))
