"""How much of pictures, videos and sounds a row shows a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qwentune.data.layout.media_table import RunMedia

FRAMES_PER_SECOND = 100  # of mel frames
NUM_AHEAD = 4  # micro-batches with media that are made while a step runs


@dataclass(frozen=True, slots=True)
class RowMedia:
    """Patches of pictures and videos, and mel frames of sounds.

    `largest` are the patches of the largest picture or video among them, which is a video of `num_frames` where these
    are not 0.
    """

    patches: int = 0
    frames: int = 0
    largest: int = 0
    num_frames: int = 0

    @property
    def is_video(self) -> bool:
        """Whether the largest is a video."""
        return self.num_frames > 0


def row_media(media: RunMedia | None, ids: Iterable[NDArray[np.int32]]) -> RowMedia:
    """What the tokens of a row show, of which shared ones are given once; nothing where the run has no media."""
    if media is None:
        return RowMedia()
    from qwentune.data.media.pads import number_of

    patches = frames = 0
    largest = (0, 0)
    for tokens in ids:
        pads, counts = np.unique(tokens[tokens < 0], return_counts=True)
        for pad, count in zip(pads.tolist(), counts.tolist(), strict=True):
            seen = media.seen[number_of(pad)]
            times, (steps, rows, columns) = -(-count // seen.num_tokens), seen.grid
            if seen.kind == "audio":
                hearing = media.limits.family.hearing
                whole = 0 if hearing is None else round((hearing.most_seconds or 0) * FRAMES_PER_SECOND)
                frames += times * max(steps, whole)
                continue
            patches += times * steps * rows * columns
            largest = max(largest, (steps * rows * columns, len(seen.frames)))
    return RowMedia(patches, frames, *largest)


def most(rows: Iterable[RowMedia]) -> RowMedia:
    """The most of each over some rows; nothing where there are none."""
    found = RowMedia()
    for row in rows:
        largest = max((found.largest, found.num_frames), (row.largest, row.num_frames))
        found = RowMedia(max(found.patches, row.patches), max(found.frames, row.frames), *largest)
    return found
