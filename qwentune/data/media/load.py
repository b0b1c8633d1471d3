"""STUB of part ROWS."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.seen import Seen


def load(seen: Seen, limits: MediaLimits) -> NDArray[Any]:
    raise NotImplementedError
