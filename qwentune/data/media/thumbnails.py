"""Small pictures of media for a page, drawn from what the model is given: its patches, its mel features."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.seen import Seen

SIDE = 128  # pixels, at most
NUM_FRAMES = 4  # of a video, evenly spaced
LONGEST_SOUND = 1000  # mel frames that are drawn


def thumbnails(seen: Seen, loaded: NDArray[Any], limits: MediaLimits) -> list[str]:
    """`data:` URLs of what was loaded of a medium; none where pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return []
    urls: list[str] = []
    for pixels in _sound(loaded) if seen.kind == "audio" else _frames(seen, loaded, limits):
        picture = Image.fromarray(pixels)
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=75)
        urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def _frames(seen: Seen, patches: NDArray[np.float32], limits: MediaLimits) -> Iterator[NDArray[np.uint8]]:
    """Frames put together again from the patches of their grid steps, (height, width, 3)."""
    vision = limits.vision
    assert vision is not None
    time, height, width = seen.grid
    side, patch = vision.merge, vision.patch
    steps = patches.reshape(time, height // side, width // side, side, side, 3, vision.temporal, patch, patch)
    for step in np.unique(np.linspace(0, time - 1, NUM_FRAMES).round().astype(int)):
        frame = steps[step, ..., 0, :, :].transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
        yield ((frame * vision.std + vision.mean) * 255).round().clip(0, 255).astype(np.uint8)


def _sound(features: NDArray[np.float32]) -> Iterator[NDArray[np.uint8]]:
    """Loudness by pitch (up) and time, (mel bins, frames)."""
    drawn = features[::-1, :LONGEST_SOUND]
    low, high = float(drawn.min()), float(drawn.max())
    yield ((drawn - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
