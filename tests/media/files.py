"""Small pictures, videos and sounds, whole and broken, made here."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
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


def write_video(path: Path, num_frames: int, fps: int, width: int = 64, height: int = 48, **how: Any) -> Path:
    """An mp4 of grey frames that grow lighter, or of noise where `noisy`; `how` is also that of `write_frames`."""
    noisy = how.pop("noisy", False)
    rng = np.random.default_rng(0)
    shades = (np.full((height, width, 3), 255 * k // max(1, num_frames - 1), np.uint8) for k in range(num_frames))
    frames = (rng.integers(0, 256, shade.shape, dtype=np.uint8) if noisy else shade for shade in shades)
    return write_frames(path, frames, fps, width, height, **how)


def write_frames(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    fps: int,
    width: int,
    height: int,
    codec: str = "mpeg4",
    **options: str,
) -> Path:
    """An mp4 of frames (height, width, 3); `options` are the muxer's."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_cut_video(
    path: Path, num_frames: int, fps: int, first: int, codec: str = "mpeg4", *, index_first: bool = False
) -> Path:
    """The mp4 of `write_video` without the frames before `first`, which stand in it and an edit list leaves out."""
    import av

    whole = write_video(path.with_name("whole.mp4"), num_frames, fps, codec=codec)
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(whole)) as read, av.open(str(path), "w", options=options) as container:
        source = read.streams.video[0]
        stream: Any = container.add_stream_from_template(source)
        assert source.time_base is not None
        cut = round(first / fps / source.time_base)
        for packet in read.demux(source):
            if packet.size:
                assert packet.pts is not None
                assert packet.dts is not None
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                container.mux(packet)
    return path
