"""The patches of pictures and videos and the features of sounds, as the processors of their families make them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.look import digest_of
from qwentune.data.media.pictures import patches
from qwentune.data.media.seen import Seen
from qwentune.data.media.sounds import features, mel_frames, waveform
from qwentune.data.media.videos import frames_listed, frames_of
from qwentune.data.sample import RowError


def load(seen: Seen, limits: MediaLimits) -> NDArray[np.float32]:
    """(T * H * W, 3 * temporal * patch²) patches of a picture or video; (mel_bins, L) features of a sound.

    A sound of a model that takes clips of one length has as many columns as that has; `seen.grid[0]` are its own.
    Raises RowError where the file is no longer what it was when it was looked at.
    """
    if seen.kind == "audio":
        assert limits.hearing is not None
        _refuse_drift(seen, [Path(seen.path)])
        wave = waveform(Path(seen.path), limits.hearing)
        if mel_frames(len(wave), limits.hearing) != seen.grid[0]:
            raise RowError(f"{seen.path!r} decodes otherwise than before", "Save it again as WAV.")
        return features(wave, limits.hearing)
    assert limits.vision is not None
    return patches(colours(seen, limits), limits.vision)


def colours(seen: Seen, limits: MediaLimits) -> NDArray[np.uint8]:
    """(frames, height, width, 3) of a picture or a video, resized: what may be kept, at a quarter of its patches."""
    assert limits.vision is not None
    path = Path(seen.path)
    height, width = (side * limits.vision.patch for side in seen.grid[1:])
    try:
        is_listed = seen.kind == "video" and path.suffix == ".frames"
        files = [Path(name) for name in json.loads(path.read_bytes())] if is_listed else [path]
    except (OSError, ValueError):
        raise RowError(f"{seen.path!r} is gone", "Render the data again: delete the cache folder.") from None
    _refuse_drift(seen, files)
    if seen.kind == "image" or is_listed:
        return frames_listed(files, height, width)
    return frames_of(path, seen.frames, height, width)


def _refuse_drift(seen: Seen, files: list[Path]) -> None:
    """Raises RowError where the files do not hold what they held."""
    fix = "Put the file back that was there when the data was rendered, or begin a new run."
    try:
        if digest_of(files) == seen.digest:
            return
    except OSError as error:
        raise RowError(f"{seen.path!r} cannot be read: {error.strerror}", fix) from None
    raise RowError(f"{seen.path!r} has changed since the data was rendered", fix)
