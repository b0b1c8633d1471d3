"""STUB of part ROWS."""

from __future__ import annotations

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.seen import Seen
from qwentune.data.sample import Medium


def look(medium: Medium, limits: MediaLimits) -> Seen:
    raise NotImplementedError
