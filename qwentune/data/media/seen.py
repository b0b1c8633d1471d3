"""What a model sees or hears of a medium: its size in tokens, and from which file it comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwentune.data.sample import MediaKind


@dataclass(frozen=True, slots=True)
class Seen:
    """A medium as a model is given it; two that are equal are the same to the model.

    `digest` is of the bytes of its file (of all frames together, where it is frames), which is at `path`. `original`
    is width and height in pixels; of audio samples and rate. `grid` is (T, H, W) in patches; of audio (mel frames, 0,
    0). `num_tokens` are its pads in all. Of a video `frames` are the indices of those taken, `times` the seconds of
    each grid step, `seconds_per_step` apart.
    """

    kind: MediaKind
    path: str = field(compare=False)
    digest: str
    original: tuple[int, ...]
    grid: tuple[int, int, int]
    num_tokens: int
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    seconds_per_step: float = 0.0
