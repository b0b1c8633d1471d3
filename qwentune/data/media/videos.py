"""Videos: which of their frames are taken, and the frames themselves, resized.

One rule of frames per family, as transformers' processors (5.24) have it for files: `fps` frames of a second, at least
`min_frames` and at most `max_frames` of them. Where all pads stand in one span (Qwen2-VL, Qwen2.5-VL, Omni) their
number is even and they are every n-th frame from the first, cut down to whole ones; where steps are timestamped
(Qwen3-VL and later) they are spread from the first frame to the last, rounded. Frames that a row lists are all taken.

The frames of a file are those that decoding gives, which is what PyAV and OpenCV show a server: an edit list, as phones
and `ffmpeg -ss` write it, leaves out what it leaves out, though the file's header counts that too.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwentune.data.media.pictures import LONGEST_TO_SHORTEST, best_size, needed, resized
from qwentune.data.sample import RowError
from qwentune.facts.media import Vision

MOST_FRAMES = 2**20  # of a file: ten hours


@dataclass(frozen=True, slots=True)
class Film:
    """A video before frames are chosen; sizes as it is seen."""

    width: int
    height: int
    num_frames: int
    fps: float


def film(file: BinaryIO) -> Film:
    """What a file holds of a video, of which every frame is decoded; RowError where it holds no whole one.

    That takes as long as making its frames into a batch does once, which decodes them one after another too: a minute
    of 1080p about 5 s of one core.
    """
    with _container(file, ignore_editlist="1") as container:
        stream = container.streams.video[0]
        promised, stored = stream.frames, sum(packet.size > 0 for packet in container.demux(stream))
    if stored < promised:
        raise RowError(f"it breaks off: {stored} of {promised} frames are there", "Download or save it again.")
    with _container(file) as container:
        stream = container.streams.video[0]
        frames = container.decode(stream)
        first = next(frames, None)
        if first is None:
            raise RowError("it has no frame", "Save it again as mp4.")
        width, height = first.width, first.height
        if first.rotation % 180:
            width, height = height, width
        fps, num_frames = float(stream.average_rate or 0), 1 + sum(1 for _ in islice(frames, MOST_FRAMES))
    if not 0 < fps < 10_000 or num_frames > MOST_FRAMES:
        raise RowError(f"it has {num_frames:,} frames at {fps:g} a second", "Save it again as mp4, or cut it.")
    return Film(width, height, num_frames, fps)


def film_of(sizes: Sequence[tuple[int, int]], fps: float) -> Film:
    """The video of frames of such sizes that a row lists, at so many a second; RowError where they differ."""
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{width}×{height}" for width, height in dict.fromkeys(sizes))
        raise RowError(f"its frames are of different sizes: {listed}", "Scale them to one size.")
    return Film(*sizes[0], len(sizes), fps)


def frames_taken(video: Film, fps: float, vision: Vision) -> tuple[int, ...]:
    """The indices of the frames that are shown to the model, by the rule of its family."""
    total, wanted = video.num_frames, video.num_frames / video.fps * fps
    if vision.video == "timestamped":
        count = min(max(int(wanted), vision.min_frames), vision.max_frames, total)
        return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())
    most = math.floor(min(vision.max_frames, total) / vision.temporal) * vision.temporal
    count = math.floor(min(max(wanted, vision.min_frames), most) / vision.temporal) * vision.temporal
    if count == 0:  # one frame alone
        return (0,)
    return tuple(np.arange(0, total, total / count, dtype=np.float32).astype(int).tolist()[:count])


def video_size(video: Film, num_frames: int, vision: Vision, own: Mapping[str, int]) -> tuple[int, int]:
    """Height and width to which the frames are resized; `own` are a row's own bounds of the pixels of a frame."""
    height, width = video.height, video.width
    if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
        what = f"it is {width}×{height}, and no side may be more than {LONGEST_TO_SHORTEST} times the other"
        raise RowError(what, "Crop it.")
    times = 1 if vision.video == "one_span" else num_frames
    most = min(vision.max_video_pixels, own.get("max_pixels", vision.max_video_pixels) * times)
    least = min(most, own["min_pixels"] * times if "min_pixels" in own else vision.min_video_pixels)
    if vision.video == "one_span":
        return best_size(height, width, vision, least, most)
    return _size_of_all(height, width, num_frames, vision, least, most)


def frames_of(file: BinaryIO, indices: Sequence[int], height: int, width: int) -> NDArray[np.uint8]:
    """(frames, height, width, 3) of a file; RowError where a frame cannot be decoded."""
    found: dict[int, NDArray[np.uint8]] = {}
    wanted, last = set(indices), max(indices)
    with _container(file) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            if index in wanted:
                image = frame.to_image().rotate(frame.rotation, expand=True)
                found[index] = resized(image, height, width)
            if index == last:
                break
    if missing := len(wanted - found.keys()):
        raise RowError(f"{missing} of its frames cannot be decoded", "Save it again as mp4.")
    return np.stack([found[index] for index in indices])


def times_of(indices: Sequence[int], fps: float, temporal: int) -> tuple[float, ...]:
    """The seconds of each grid step: the mean of its first and last frame."""
    filled = [*indices, *[indices[-1]] * (-len(indices) % temporal)]
    return tuple((filled[i] / fps + filled[i + temporal - 1] / fps) / 2 for i in range(0, len(filled), temporal))


def _size_of_all(height: int, width: int, num_frames: int, vision: Vision, least: int, most: int) -> tuple[int, int]:
    """The size where all frames together are bounded; the number of frames counts as Qwen3-VL's processor counts it."""
    unit = vision.patch * vision.merge
    if height < unit or width < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    pixels = round(num_frames / vision.temporal) * vision.temporal * rows * columns
    if pixels > most:
        scale = math.sqrt(num_frames * height * width / most)
        return max(unit, math.floor(height / scale / unit) * unit), max(unit, math.floor(width / scale / unit) * unit)
    if pixels < least:
        scale = math.sqrt(least / (num_frames * height * width))
        return math.ceil(height * scale / unit) * unit, math.ceil(width * scale / unit) * unit
    return rows, columns


@contextmanager
def _container(file: BinaryIO, **options: str) -> Generator[Any]:
    """The file, opened from its beginning; whatever FFmpeg raises of it is a RowError."""
    av = needed("av", "video", "videos")
    try:
        file.seek(0)
        with av.open(file, options=options) as container:
            if not container.streams.video:
                raise RowError("it holds no video", "Give sounds as audio.")
            yield container
    except RowError:
        raise
    except Exception as error:  # a decoder may raise anything of broken bytes
        fix = "Save it again (ffmpeg -i FILE -c:v libx264 new.mp4), or leave the row out."
        raise RowError(f"it is no video that can be read: {getattr(error, 'strerror', None) or error}", fix) from None
