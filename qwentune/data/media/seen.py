"""What the model is to see or hear of one file, known without decoding it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

from qwentune.data.sample import MediaKind

LISTED = ".frames"  # how a file is named that lists the frames of a video, as JSON


@dataclass(frozen=True, slots=True)
class Seen:
    """A medium as a model of one family takes it; equal are two of which a model sees or hears the same.

    `path` is the file, or one that lists the frames of a video, as JSON. `digest` is of its bytes (of all frames).
    `original` is (width, height), of audio (samples, rate). `grid` counts patches (T, H, W), of audio (mel frames, 0,
    0). `num_tokens` pads stand for it in the row. Of a video, `frames` are the indices of those that are taken, `times`
    the seconds of each grid step, `seconds_per_step` between two of them.
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

    @property
    def is_listed(self) -> bool:
        """Whether it is a video of which a row lists the frames."""
        return self.kind == "video" and PurePath(self.path).suffix == LISTED

    def as_json(self) -> dict[str, Any]:
        """Its fields, as `of_json` takes them."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Seen:
        """The medium of such fields, whose tuples JSON has made lists."""
        steps, rows, columns = fields["grid"]
        read: dict[str, Any] = {**fields, "grid": (steps, rows, columns)}
        read |= {key: tuple(fields[key]) for key in ("original", "frames", "times")}
        return cls(**read)
