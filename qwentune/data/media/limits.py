"""STUB of part ROWS."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwentune.facts.media import FAMILIES, Hearing, MediaFamily, Vision


@dataclass(frozen=True)
class MediaLimits:
    family: MediaFamily
    vision: Vision | None
    hearing: Hearing | None


def media_limits(folder: Path | None, family: MediaFamily, options: Any = None) -> MediaLimits:
    return MediaLimits(family, family.vision, family.hearing)
