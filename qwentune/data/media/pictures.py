"""Pictures as servers read them: turned as EXIF says, transparency on white; resized and cut as Qwen's processor does.

Source: Qwen2VLImageProcessorPil of transformers 5.24, to which patches are equal bit for bit.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwentune.data.sample import RowError
from qwentune.facts.media import Number, Vision

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
LARGEST_PICTURE_BYTES = 2**29
MOST_PIXELS = 178_956_970  # beyond which Pillow, and with it every server, takes a picture for a decompression bomb
LONGEST_TO_SHORTEST = 200
TRUE_COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
SIDEWAYS, ORIENTATION = (5, 6, 7, 8), 0x0112  # of EXIF

# For good: which warnings are shown is the process's, not a thread's. What matters is raised or refused.
warnings.filterwarnings("ignore", module=r"PIL\.")


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height as it is seen; RowError where it is no whole picture of 8 bits a colour.

    All of it is decoded: a JPEG of 12 megapixels in 20 ms (at an eighth of its size; 140 where it is progressive), a
    PNG in 550, a WebP in 330.
    """
    with opened(file) as image:
        image.verify()  # the checksums of a PNG, which decoding does not look at
    file.seek(0)
    with opened(file) as image:
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a phone's second view
        if frames > 1:
            fix = "Save the frame that is meant, or give the file as a video."
            raise RowError(f"it has {frames} frames", fix)
        if image.mode not in TRUE_COLOURS:
            fix = "Save it with 8 bits a colour: magick FILE -depth 8 -colorspace sRGB png24:new.png"
            raise RowError(f"its colours are of the mode {image.mode}, which servers cut instead of scaling", fix)
        width, height = image.size
        if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
            what = f"it is {width}×{height}, and no side may be more than {LONGEST_TO_SHORTEST} times the other"
            raise RowError(what, "Crop it.")
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (1, 1))
        image.load()
        # A TIFF is turned already.
        is_sideways = image.format != "TIFF" and image.getexif().get(ORIENTATION) in SIDEWAYS
        return (height, width) if is_sideways else (width, height)


@contextmanager
def opened(file: BinaryIO) -> Generator[Any]:
    """The picture of a file; whatever Pillow raises of it, here or later, is a RowError."""
    pillow = needed("PIL.Image", "vision", "pictures")
    try:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST_PICTURE_BYTES:
            raise RowError(f"it has {size:,} bytes, and at most {LARGEST_PICTURE_BYTES:,} are read", "Scale it down.")
        with pillow.open(file, formats=_known_formats()) as image:
            yield image
    except RowError:
        raise
    except pillow.DecompressionBombError:
        what = f"it has more than {MOST_PIXELS:,} pixels, which servers take for an attack"
        raise RowError(what, "Scale it down: 16 megapixels are more than a model sees.") from None
    except Exception as error:  # a decoder may raise anything of broken bytes
        reason = str(error).splitlines()[0] if str(error) and not str(error).startswith("cannot identify") else ""
        said = f"it is broken: {reason}" if reason else "it is no picture of a known kind"
        raise RowError(said, "Save it again as PNG or JPEG, or leave the row out.") from None


def needed(module: str, extra: str, what: str) -> Any:
    """A module of one of the extras; RowError that names the extra where it is not installed."""
    try:
        return import_module(module)
    except (ImportError, OSError):  # soundfile raises OSError where its library is missing
        fix = f"pip install 'qwentune[{extra}]'"
        raise RowError(f"{what} need the extra '{extra}'", fix, waits_for=[module]) from None


def best_size(height: int, width: int, vision: Vision, least: int, most: int) -> tuple[int, int]:
    """Height and width to which a picture, or a frame, is resized: multiples of `patch * merge` within the bounds."""
    unit = vision.patch * vision.merge
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        return max(unit, math.floor(height / scale / unit) * unit), max(unit, math.floor(width / scale / unit) * unit)
    if rows * columns < least:
        scale = math.sqrt(least / (height * width))
        return math.ceil(height * scale / unit) * unit, math.ceil(width * scale / unit) * unit
    return rows, columns


def resized(image: Any, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) colours of a Pillow image as it is seen."""
    pillow, ops = import_module("PIL.Image"), import_module("PIL.ImageOps")
    image.load()
    image = ops.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB").resize((width, height), pillow.Resampling.BICUBIC))


def patches(frames: NDArray[np.uint8], vision: Vision) -> NDArray[np.float32]:
    """(T * H * W, 3 * temporal * patch²) of (frames, height, width, 3); the last frame fills an unfinished step."""
    if missing := -len(frames) % vision.temporal:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    num_frames, height, width, _ = frames.shape
    steps, size, merge = num_frames // vision.temporal, vision.patch, vision.merge
    table = _normalised(vision.mean, vision.std)
    colours = np.stack([table[i][frames[..., i]] for i in range(3)], axis=1)
    cut = (steps, vision.temporal, 3, height // size // merge, merge, size, width // size // merge, merge, size)
    cells = colours.reshape(cut).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cells.reshape(-1, 3 * vision.temporal * size * size)


@lru_cache(maxsize=1)
def _known_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    pillow = import_module("PIL.Image")
    pillow.init()
    return [name for name in FORMATS if name in pillow.OPEN]


@lru_cache(maxsize=8)
def _normalised(mean: Number, std: Number) -> NDArray[np.float32]:
    """(3, 256) what each value of each colour becomes: rescaled in fp64, then normalised in fp32."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    shifted = scaled[None] - np.asarray(mean, dtype=np.float32)[:, None]
    return shifted / np.asarray(std, dtype=np.float32)[:, None]
