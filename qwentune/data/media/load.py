"""The patches of pictures and videos and the features of sounds, as the processors of their families make them."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwentune.data.media.hashed import DriftError, digest_of, hashed, unchanged
from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.pictures import opened, patches, resized
from qwentune.data.media.seen import Seen
from qwentune.data.media.sounds import features, mel_frames, waveform
from qwentune.data.media.videos import frames_of
from qwentune.data.sample import RowError


def load(seen: Seen, limits: MediaLimits) -> NDArray[np.float32]:
    """(T * H * W, 3 * temporal * patch²) patches of a picture or video; (mel_bins, L) features of a sound.

    A sound of a model that takes clips of one length has as many columns as that has; `seen.grid[0]` are its own.
    Raises DriftError where the file is no longer what it was when it was looked at, RowError where it cannot be read.
    """
    if seen.kind == "audio":
        return _heard(seen, limits)
    assert limits.vision is not None
    return patches(colours(seen, limits), limits.vision)


@contextmanager
def _readable(seen: Seen) -> Generator[None]:
    """RowError where a file of a medium cannot be read."""
    try:
        yield
    except OSError as error:
        fix = "Put the file back that was there when the data was rendered, or begin a new run."
        raise RowError(f"{seen.path!r} cannot be read: {error.strerror}", fix) from None


def colours(seen: Seen, limits: MediaLimits) -> NDArray[np.uint8]:
    """(frames, height, width, 3) of a picture or a video, resized: what may be kept, at a quarter of its patches."""
    assert limits.vision is not None
    height, width = (side * limits.vision.patch for side in seen.grid[1:])
    with _readable(seen):
        files = files_of(seen)
        if seen.kind == "video" and not seen.is_listed:
            with unchanged(files[0], seen.digest) as file:
                return frames_of(file, seen.frames, height, width)
        digests = _digests(seen, files) if len(files) > 1 else [seen.digest]
        shown: list[NDArray[np.uint8]] = []
        for path, digest in zip(files, digests, strict=True):
            with unchanged(path, digest) as file, opened(file) as image:
                shown.append(resized(image, height, width))
        return np.stack(shown)


def files_of(seen: Seen) -> list[Path]:
    """The files that a medium is read from: its own, or the frames that its row lists.

    OSError or DriftError where the list is not there, or not what was written.
    """
    path = Path(seen.path)
    if not seen.is_listed:
        return [path]
    with unchanged(path, path.stem) as file:  # it is named by what it holds
        return [Path(name) for name in json.load(file)]


def _digests(seen: Seen, frames: list[Path]) -> list[str]:
    """Those of listed frames, which are those that were looked at; else DriftError that names the list's first file."""
    digests: list[str] = []
    for path in frames:
        with hashed(path) as (_, digest):
            digests.append(digest)
    if digest_of(digests) != seen.digest:
        raise DriftError(f"{frames[0]} and {len(frames) - 1} more frames")
    return digests


def _heard(seen: Seen, limits: MediaLimits) -> NDArray[np.float32]:
    assert limits.hearing is not None
    with _readable(seen), unchanged(Path(seen.path), seen.digest) as file:
        wave = waveform(file, limits.hearing)
    if mel_frames(len(wave), limits.hearing) != seen.grid[0]:
        raise RowError(f"{seen.path!r} decodes otherwise than before", "Save it again as WAV.")
    return features(wave, limits.hearing)
