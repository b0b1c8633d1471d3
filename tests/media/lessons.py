"""What tiny models are taught to see and hear: pictures of colour × shape × place, tones of pitch × rhythm.

Each file differs in shade, size, place and noise, so that unseen ones of the same kinds are new to the model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.media.material import RATE, write_wav

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
SHAPES = ("disc", "bar")
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "low": (0.5, 0.73)}
PITCHES = {"deep": 150.0, "mid": 600.0, "high": 2400.0}
RHYTHMS = ("steady", "broken")
QUESTIONS = {"image": "What is there?", "audio": "What do you hear?"}


@dataclass(frozen=True)
class Lesson:
    """A file, and the words that name what is in it."""

    kind: str
    path: Path
    words: tuple[str, ...]

    @property
    def answer(self) -> str:
        return " ".join(self.words)

    def prompt(self) -> list[dict[str, Any]]:
        """The messages that ask for it; those of two lessons of a kind differ in their file alone."""
        parts = [{"type": self.kind, self.kind: str(self.path)}, {"type": "text", "text": QUESTIONS[self.kind]}]
        return [{"role": "user", "content": parts}]

    def row(self) -> dict[str, Any]:
        """The row of the `chat` format that teaches it."""
        return {"messages": [*self.prompt(), {"role": "assistant", "content": self.answer}]}


def pictures(folder: Path, count: int, seed: int, side: int = 56) -> list[Lesson]:
    """So many pictures of side × side, all combinations equally often."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    combinations = itertools.cycle(itertools.product(COLOURS, SHAPES, PLACES))
    lessons: list[Lesson] = []
    for number, words in zip(range(count), combinations, strict=False):
        path = folder / f"{number}.png"
        Image.fromarray(_picture(rng, *words, side)).save(path)
        lessons.append(Lesson("image", path, words))
    return lessons


def sounds(folder: Path, count: int, seed: int, seconds: float = 0.6) -> list[Lesson]:
    """So many tones, all combinations equally often."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    combinations = itertools.cycle(itertools.product(PITCHES, RHYTHMS))
    lessons: list[Lesson] = []
    for number, words in zip(range(count), combinations, strict=False):
        path = folder / f"{number}.wav"
        write_wav(path, _tone(rng, *words, seconds))
        lessons.append(Lesson("audio", path, words))
    return lessons


def _picture(rng: np.random.Generator, colour: str, shape: str, place: str, side: int) -> NDArray[np.uint8]:
    """(side, side, 3) on a dark ground."""
    x, y = (np.array(PLACES[place]) + rng.uniform(-0.04, 0.04, 2)) * side
    radius = side * rng.uniform(0.17, 0.23)
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    distance = np.hypot(columns - x, rows - y)
    inside = {
        "disc": distance < radius,
        "bar": (abs(columns - x) < radius) & (abs(rows - y) < radius * 0.35),
    }[shape]
    ground = np.full((side, side, 3), 30.0)
    ground[inside] = np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3)
    return (ground + rng.normal(0, 6, ground.shape)).clip(0, 255).astype(np.uint8)


def _tone(rng: np.random.Generator, pitch: str, rhythm: str, seconds: float) -> NDArray[np.float64]:
    """The samples of a tone at 16 kHz."""
    times = np.arange(round(seconds * RATE)) / RATE
    frequency = PITCHES[pitch] * rng.uniform(0.9, 1.1)
    wave = np.sin(2 * np.pi * times * frequency + rng.uniform(0, 6)) * rng.uniform(0.3, 0.8)
    if rhythm == "broken":
        wave *= np.sin(2 * np.pi * times / 0.15 + rng.uniform(0, 6)) > 0
    return wave + rng.normal(0, 0.01, len(times))
