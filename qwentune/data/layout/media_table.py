"""The media of a run: each once, with the number by which its pads are known, and how they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwentune.data.layout.sums import mark_stale
from qwentune.data.media.hashed import DriftError, state_of
from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.load import files_of, load
from qwentune.data.media.pads import number_of, pad_of
from qwentune.data.media.pictures import patches
from qwentune.data.media.pixels import kept_colours
from qwentune.data.media.seen import Seen
from qwentune.data.reading.faults import Waiting
from qwentune.data.sample import MediaKind, RowError
from qwentune.errors import DataError, Problem, ResumeError, UserError

FILE = "media.json"  # of a sealed folder, where there are media


class MediaTable:
    """Distinct media, numbered from 0 in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[Seen, int] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def renumbered(self, ids: NDArray[np.int32], media: Sequence[Seen]) -> NDArray[np.int32]:
        """The ids with the pads of `media` under the numbers that they have here; those that are new are added."""
        is_pad = ids < 0
        pads, places = np.unique(ids[is_pad], return_inverse=True)
        ours = {pad: pad_of(self.numbers.setdefault(media[number_of(pad)], len(self))) for pad in pads[::-1].tolist()}
        ids = ids.copy()
        ids[is_pad] = np.array([ours[pad] for pad in pads.tolist()], dtype=np.int32)[places]
        return ids

    def shorten(self, length: int) -> None:
        """Leaves only the first so many."""
        self.numbers = dict(list(self.numbers.items())[:length])

    def write(self, folder: Path, waiting: Sequence[Waiting]) -> bytes:
        """Writes the table into a folder, with what rows wait for that were left out; what identifies the media,
        wherever their files are.
        """
        rows = [seen.as_json() for seen in self.numbers]
        states = [[state_of(file) for file in _files(seen)] for seen in self.numbers]
        awaited = {place: [problem.where, _state(place)] for problem in waiting for place in problem.waits_for}
        document = {"media": rows, "states": states, "awaited": awaited}
        (folder / FILE).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        return json.dumps([{**row, "path": ""} for row in rows], sort_keys=True).encode() if rows else b""


@dataclass(frozen=True)
class KeptTable:
    """The media that were written. `changed` is one of which a file was written or removed since, by its number, and
    the file; `come` what a row that was left out waits for and is there now, or was written, and the row.
    """

    media: tuple[Seen, ...] = ()
    changed: tuple[int, str] | None = None
    come: tuple[str, str] | None = None

    @classmethod
    def read(cls, text: bytes) -> KeptTable:
        """What `MediaTable.write` wrote, and what has become of it."""
        document = json.loads(text)
        media = tuple(map(Seen.of_json, document["media"]))
        states = zip(media, document["states"], strict=True)
        changed = ((number, file) for number, (seen, then) in enumerate(states) if (file := _changed(seen, then)))
        awaited = document["awaited"].items()
        come = ((place, row) for place, (row, then) in awaited if _state(place) != then)
        return cls(media, next(changed, None), next(come, None))


def _changed(seen: Seen, then: Sequence[Any]) -> str | None:
    """A file of a medium that is not in the state that it was in."""
    files = _files(seen)
    if len(files) != len(then):
        return seen.path
    return next((file for file, state in zip(files, then, strict=True) if state_of(file) != state), None)


def _files(seen: Seen) -> list[str]:
    """The files of a medium: its own, and the frames that it lists, where the list can be read."""
    found = [seen.path]
    if seen.is_listed:
        with suppress(OSError, RowError):
            found += map(str, files_of(seen))
    return found


def _state(place: str) -> list[int] | bool | None:
    """The state of a file, or whether there is a module of that name."""
    return state_of(place) if os.path.isabs(place) else find_spec(place.partition(".")[0]) is not None


class UnloadableError(Exception):
    """The medium of a number, both its arguments with the RowError, cannot be read."""

    def __init__(self, number: int, error: RowError) -> None:
        super().__init__(number, error)
        self.number, self.error = number, error


@dataclass(frozen=True)
class RunMedia:
    """The media of a run by their numbers, and what the model takes of them; `pad_ids` are the pads that it knows.

    `folder` is that of the rendered data, where they stand in some; `keeps_pixels`, whether they are decoded once.
    """

    seen: Sequence[Seen]
    limits: MediaLimits
    pad_ids: Mapping[MediaKind, int]
    folder: Path | None = None
    keeps_pixels: bool = False

    @classmethod
    def of(
        cls,
        seen: Sequence[Seen],
        limits: MediaLimits,
        control_ids: Mapping[str, int],
        folder: Path | None = None,
        *,
        keeps_pixels: bool = False,
    ) -> RunMedia:
        """The media of a run whose tokenizer has these control tokens."""
        kinds: set[MediaKind] = {one.kind for one in seen}
        return cls(seen, limits, {kind: control_ids[limits.family.pads[kind]] for kind in kinds}, folder, keeps_pixels)

    @property
    def has_axes(self) -> bool:
        """Whether positions have a time, a row and a column."""
        return self.limits.family.axes == 3

    def load(self, number: int) -> NDArray[Any]:
        """The patches or features of a medium; UnloadableError where its file is not what it was."""
        seen, vision = self.seen[number], self.limits.vision
        try:
            if self.keeps_pixels and seen.kind != "audio" and vision is not None:
                return patches(kept_colours(seen, self.limits), vision)
            return load(seen, self.limits)
        except RowError as error:
            raise UnloadableError(number, error) from None

    def fault(self, unloadable: UnloadableError, where: str) -> UserError:
        """What to say of a medium that cannot be loaded: ResumeError where it is another than was rendered, which the
        next command then renders anew; DataError where it cannot be read.
        """
        error = unloadable.error
        is_drift = isinstance(error, DriftError)
        if is_drift and self.folder is not None:
            mark_stale(self.folder, f"{where}: {error.what}")
        kind = ResumeError if is_drift else DataError
        return kind(Problem(where, error.what, error.fix), "The data was rendered before.")

    def order(self, ids: NDArray[np.int32]) -> tuple[int, ...]:
        """The numbers of the media in the order of their pads."""
        return tuple(number for _, number in self.places(ids))

    def places(self, ids: NDArray[np.int32]) -> list[tuple[int, int]]:
        """Where each medium begins, and its number."""
        found: list[tuple[int, int]] = []
        pads = np.flatnonzero(ids < 0)
        at = 0
        while at < len(pads):
            number = number_of(int(ids[pads[at]]))
            found.append((int(pads[at]), number))
            at += self.seen[number].num_tokens
        return found

    def in_model(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids with the pads that the model knows."""
        is_pad = ids < 0
        pads, places = np.unique(ids[is_pad], return_inverse=True)
        known = [self.pad_ids[self.seen[number_of(pad)].kind] for pad in pads.tolist()]
        ids = ids.copy()
        ids[is_pad] = np.array(known, dtype=np.int32)[places]
        return ids

    def blocks(self, ids: NDArray[np.int32]) -> list[tuple[int, int, int]]:
        """Where pads stand side by side, one grid or one step of a video: from, to, and of which medium."""
        found: list[tuple[int, int, int]] = []
        pads = np.flatnonzero(ids < 0)
        at = 0
        while at < len(pads):
            number = number_of(int(ids[pads[at]]))
            size = self.seen[number].num_tokens // self._num_blocks(self.seen[number])
            found.append((int(pads[at]), int(pads[at]) + size, number))
            at += size
        return found

    def positions(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Time, row and column of each token of an example, shape (3, T): what stands before decides them.

        Text goes on after the largest position of what it follows, as vLLM has it (transformers after a video does
        not).
        """
        out = np.empty((3, len(ids)), dtype=np.int32)
        place = before = 0
        for start, stop, number in self.blocks(ids):
            out[:, before:start] = np.arange(place, place + start - before)
            place += start - before
            block = self._block(self.seen[number], stop - start)
            out[:, start:stop] = block + place
            place, before = place + int(block.max()) + 1, stop
        out[:, before:] = np.arange(place, place + len(ids) - before)
        return out

    def _num_blocks(self, seen: Seen) -> int:
        vision = self.limits.vision
        return seen.grid[0] if seen.kind == "video" and vision is not None and vision.video == "timestamped" else 1

    def _block(self, seen: Seen, size: int) -> NDArray[np.int32]:
        """Positions within a block of pads, from 0."""
        vision = self.limits.vision
        if seen.kind == "audio" or vision is None:
            return np.broadcast_to(np.arange(size, dtype=np.int32), (3, size))
        time, height, width = seen.grid
        shape = (time // self._num_blocks(seen), height // vision.merge, width // vision.merge)
        block = np.indices(shape, dtype=np.int32).reshape(3, -1)
        if seen.kind == "video" and vision.clock == "seconds":
            block[0] = block[0] * (vision.tokens_per_second * seen.seconds_per_step)  # cut, as vLLM has it
        return block
