"""Pixels of pictures and videos, kept as they are resized where the recipe says so: a quarter of their patches.

A file in the folder `media` of the cache for each medium, with its CRC-32: what is not what was written is made anew.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwentune.console import say
from qwentune.data.cache import cache_folder
from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.load import colours
from qwentune.data.media.seen import Seen
from qwentune.durable import replace_file
from qwentune.errors import DoesNotFitError, Problem

SUM_BYTES = 4


def kept_colours(seen: Seen, limits: MediaLimits) -> NDArray[np.uint8]:
    """What `colours` gives, read where it was kept and kept where it was not; its errors where it is made."""
    path, shape = _place(seen, limits), _shape(seen, limits)
    size = math.prod(shape)
    with suppress(OSError):
        found = np.fromfile(path, dtype=np.uint8)
        if len(found) == size + SUM_BYTES and found[size:].tobytes() == _sum(found[:size]):
            return found[:size].reshape(shape)
    frames = np.ascontiguousarray(colours(seen, limits))
    with suppress(OSError):  # without it the next epoch takes longer
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        staging.write_bytes(frames.tobytes() + _sum(frames))
        replace_file(staging, path)
    return frames


def refuse_without_room(media: Iterable[Seen], limits: MediaLimits) -> None:
    """Says what the pixels of some media take; DoesNotFitError where the disk has no room for those not there yet."""
    missing = present = 0
    for seen in media:
        if seen.kind != "audio":
            size = math.prod(_shape(seen, limits)) + SUM_BYTES
            with suppress(OSError):
                if _place(seen, limits).stat().st_size == size:
                    present += size
                    continue
            missing += size
    folder = cache_folder()
    sizes = f"{(missing + present) / 2**30:.2f} GiB of pixels, {present / 2**30:.2f} of them there already"
    free = shutil.disk_usage(folder).free
    if missing > free:
        what = f"pixels: the cache {folder} would hold {sizes}, and {free / 2**30:.2f} GiB are free"
        fix = "Make room, lower data.media.max_pixels, or set data.media.cache=none."
        raise DoesNotFitError(Problem("data.media.cache", what, fix))
    say(f"data.media.cache: {folder} will hold {sizes}; remove its folder media to be rid of them")


def _place(seen: Seen, limits: MediaLimits) -> Path:
    """Where the pixels of a medium are, under all that makes them what they are."""
    made_of = seen.kind, seen.digest, seen.frames, _shape(seen, limits), _decoders()
    return cache_folder() / "media" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.pixels"


def _shape(seen: Seen, limits: MediaLimits) -> tuple[int, int, int, int]:
    assert limits.vision is not None
    height, width = (side * limits.vision.patch for side in seen.grid[1:])
    return max(1, len(seen.frames)), height, width, 3


@lru_cache(maxsize=1)
def _decoders() -> tuple[str, ...]:
    found: list[str] = []
    for name in ("pillow", "av"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return tuple(found)


def _sum(pixels: NDArray[np.uint8]) -> bytes:
    return zlib.crc32(pixels.data).to_bytes(SUM_BYTES, "little")
