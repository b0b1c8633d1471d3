"""Small pictures, videos and sounds, whole and broken, made here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise of a size and a mode."""
    bands = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(noise[..., 0]) if bands == 1 else Image.frombytes(mode, (width, height), noise.tobytes())


def picture_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def sound_bytes(seconds: float, rate: int = 16000, channels: int = 1, format: str = "WAV", seed: int = 0) -> bytes:
    """The file of a tone with noise."""
    times = np.arange(round(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * 440 * times) + 0.1 * np.random.default_rng(seed).standard_normal(len(times))
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([wave] * channels, axis=1).clip(-1, 1), rate, format=format)
    return stream.getvalue()


def write_video(path: Path, num_frames: int, fps: int, width: int = 64, height: int = 48) -> Path:
    """An mp4 of grey frames that grow lighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(num_frames):
            shade = np.full((height, width, 3), 255 * k // max(1, num_frames - 1), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
