"""Pictures, sounds and videos that tests make for themselves: seeded, small, without loss where the format allows.

What is asked of a file later (its size, frames, samples) is kept from the moment it was made, never read from it.
"""

from __future__ import annotations

import shutil
import wave
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = Literal["image", "video", "audio"]

RATE = 16000
# width, height; the last ones are larger than a small limit, flat, upright, tiny
SIZES = ((96, 64), (64, 64), (128, 96), (57, 131), (300, 200), (200, 30), (33, 170), (40, 24))
SECONDS = (0.1, 0.37, 1.0, 1.5, 2.25, 3.2)
# Frames and frames per second: a whole number of seconds, at 2 frames a second an even number of frames.
CLIPS = ((16, 8.0), (30, 10.0), (8, 2.0))
# An odd number of frames is taken of the first, all frames of the second (it has fewer than four).
ODD_CLIPS = ((25, 10.0), (3, 10.0))
FRAME = (96, 64)


@dataclass(frozen=True)
class Item:
    """A file and what it holds: a picture of width × height, a video of so many frames, or samples of sound."""

    kind: Kind
    name: str  # relative to the folder of the rows
    width: int = 0
    height: int = 0
    num_frames: int = 0
    fps: float = 0.0
    num_samples: int = 0  # at 16 kHz


@dataclass(frozen=True)
class Material:
    """Files of each kind below a folder."""

    folder: Path
    pictures: tuple[Item, ...]
    sounds: tuple[Item, ...]
    clips: tuple[Item, ...]

    def of(self, kind: Kind) -> tuple[Item, ...]:
        """The files of a kind."""
        return {"image": self.pictures, "audio": self.sounds, "video": self.clips}[kind]


def make(
    folder: Path,
    seed: int = 0,
    *,
    frame: tuple[int, int] = FRAME,
    clips: tuple[tuple[int, float], ...] = CLIPS,
) -> Material:
    """Writes the files into `folder/media`; the same seed writes the same files.

    Two pictures have the same size and other pixels, and one stands there twice under two names.
    """
    rng = np.random.default_rng(seed)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    pictures = [picture(folder, f"media/{n}.png", rng, size) for n, size in enumerate((*SIZES, SIZES[0]))]
    twin = replace(pictures[0], name="media/twin.png")
    shutil.copy(folder / pictures[0].name, folder / twin.name)
    sounds = [sound(folder, f"media/{n}.wav", rng, seconds) for n, seconds in enumerate(SECONDS)]
    sounds.append(sound(folder, "media/slow.wav", rng, 0.8, rate=8000))
    videos = [video(folder, f"media/{n}.mp4", rng, frame, *length) for n, length in enumerate(clips)]
    return Material(folder, (*pictures, twin), tuple(sounds), tuple(videos))


def picture(folder: Path, name: str, rng: np.random.Generator, size: tuple[int, int]) -> Item:
    """A PNG of blurred noise."""
    from PIL import Image

    Image.fromarray(_pixels(rng, size)).save(folder / name)
    return Item("image", name, *size)


def sound(folder: Path, name: str, rng: np.random.Generator, seconds: float, rate: int = RATE) -> Item:
    """A WAV of one channel and 16 bits: two sines under a little noise."""
    count = round(seconds * rate)
    pitches = rng.uniform(100, 2000, 2)
    times = np.arange(count)[:, None] / rate
    wave_form = np.sin(2 * np.pi * times * pitches).mean(1) * 0.5 + rng.normal(0, 0.01, count)
    write_wav(folder / name, wave_form, rate)
    return Item("audio", name, num_samples=count * RATE // rate)


def write_wav(path: Path, samples: NDArray[np.float64], rate: int = RATE) -> None:
    """Samples from -1 to 1 as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def read_wav(path: Path) -> NDArray[np.float32]:
    """The samples of a file of 16 bits, from -1 to 1."""
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def video(
    folder: Path, name: str, rng: np.random.Generator, size: tuple[int, int], num_frames: int, fps: float
) -> Item:
    """An MP4 whose frames go from one blurred noise to another."""
    start, end = _pixels(rng, size).astype(float), _pixels(rng, size).astype(float)
    steps = np.linspace(0, 1, num_frames)
    write_video(folder / name, [(start + (end - start) * step).astype(np.uint8) for step in steps], fps)
    return Item("video", name, *size, num_frames=num_frames, fps=fps)


def write_video(path: Path, frames: list[NDArray[np.uint8]], fps: float) -> None:
    """Frames of (height, width, 3) as MPEG-4 part 2, which every build of FFmpeg writes."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _pixels(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(height, width, 3) in patches of 8 with a little noise, so that a resize changes it."""
    width, height = size
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    fine = coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + rng.integers(-20, 20, (height, width, 3))
    return fine.clip(0, 255).astype(np.uint8)
