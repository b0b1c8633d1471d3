"""The media of a dialogue in its rendering: where a template writes one pad, the model reads one for each token.

Each of them is a negative id, which says of which medium it is; only in a batch it becomes the pad that the model
knows. So what compares ids tells two pictures of one size apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, get_args

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.look import has_own_limits, look
from qwentune.data.media.seen import Seen
from qwentune.data.sample import MediaKind, Message, RowError

KINDS: tuple[MediaKind, ...] = get_args(MediaKind)


class Shown(NamedTuple):
    """A medium in a row: its kind, its tokens, how many pixels are left of each of its own.

    `has_own_limits`: the row bounds it otherwise than the run does.
    """

    kind: MediaKind
    num_tokens: int
    scale: float
    has_own_limits: bool = False


def number_of(token: int) -> int:
    """Which medium a negative id is a pad of."""
    return -token - 1


def label(seen: Seen, num_tokens: int) -> str:
    """What people are shown in the place of so many pads of a medium."""
    if seen.kind == "audio":
        samples, rate = seen.original[:2]
        size = f"{samples / rate:.1f} s"
    else:
        size = "×".join(map(str, seen.original[:2]))
    return f"⟨{seen.kind} {size} → {num_tokens}⟩"


def pad_of(number: int) -> int:
    """The negative id that stands for a token of a medium."""
    return -number - 1


@dataclass(frozen=True)
class ShownMedia:
    """The media of one dialogue: those that differ, and by message which of them it shows."""

    limits: MediaLimits
    table: tuple[Seen, ...]
    by_message: tuple[tuple[int, ...], ...]
    control_ids: Mapping[str, int]
    has_own_limits: tuple[bool, ...]  # of all that the messages show, in order

    @classmethod
    def of(
        cls, messages: Sequence[Message], limits: MediaLimits | None, control_ids: Mapping[str, int]
    ) -> ShownMedia | None:
        """The media of some messages, their files looked at; None where there are none.

        RowError where one cannot be shown to the model.
        """
        if not any(message.media for message in messages):
            return None
        table: dict[Seen, int] = {}
        by_message: list[tuple[int, ...]] = []
        for message in messages:
            seen = [look(medium, limits) for medium in message.media]
            by_message.append(tuple(table.setdefault(one, len(table)) for one in seen))
        assert limits is not None  # else `look` has refused
        for kind in {seen.kind for seen in table}:
            if (pad := limits.family.pads[kind]) not in control_ids:
                raise RowError(f"the tokenizer has no {pad}, which stands for media", "Take the checkpoint's own.")
        own = tuple(has_own_limits(medium, limits) for message in messages for medium in message.media)
        return cls(limits, tuple(table), tuple(by_message), control_ids, own)

    @property
    def shown(self) -> list[Shown]:
        """What the messages show, in order."""
        shown = [self.table[number] for number in self._numbers(range(len(self.by_message)))]
        each = zip(shown, self.has_own_limits, strict=True)
        return [Shown(seen.kind, seen.num_tokens, self._scale(seen), own) for seen, own in each]

    def _scale(self, seen: Seen) -> float:
        """The pixels that are left of each of a picture or frame; 1 where its sides were only rounded."""
        vision = self.limits.vision
        if seen.kind == "audio" or vision is None:
            return 1.0
        side = vision.patch * vision.merge
        rounded = [max(1, round(pixels / side)) * vision.merge for pixels in seen.original[:2]]
        width, height = seen.original[:2]
        is_rounded = [seen.grid[2], seen.grid[1]] == rounded
        return 1.0 if is_rounded else seen.grid[1] * seen.grid[2] * vision.patch**2 / (width * height)

    @cached_property
    def _kinds(self) -> dict[int, MediaKind]:
        """The kind that each pad of a template stands for, by its id."""
        pads = self.limits.family.pads
        return {self.control_ids[pads[kind]]: kind for kind in KINDS if pads.get(kind) in self.control_ids}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.limits.family.pads.values())))

    def kinds_in(self, rendering: str) -> list[MediaKind]:
        """What a rendering shows, in order: texts of the row are guarded, so each pad is the template's own."""
        return [self._kinds[self.control_ids[pad]] for pad in self._pattern.findall(rendering)]

    def kinds_of(self, kept: Sequence[int]) -> list[MediaKind]:
        """What some messages show, in order."""
        return [self.table[number].kind for number in self._numbers(kept)]

    def in_place(self, pieces: Sequence[int | str], kept: Sequence[int]) -> list[int | str]:
        """The pieces of a rendering of the messages `kept`, each pad as the pads of its medium.

        A video of a `timestamped` family is shown step by step, each with its time, marks and pads, in the place of
        the marks and the pad that the template wrote: as vLLM has it, which encodes the time apart from the text before
        it. (transformers' processor leaves the template's marks around those of the steps.)
        """
        places = [at for at, piece in enumerate(pieces) if piece in self._kinds]
        numbers = dict(zip(places, self._numbers(kept), strict=True))
        vision = self.limits.vision
        found: list[int | str] = []
        for at, piece in enumerate(pieces):
            if at not in numbers:
                found.append(piece)
                continue
            number = numbers[at]
            seen = self.table[number]
            steps = seen.grid[0]
            if seen.kind != "video" or vision is None or vision.video != "timestamped":
                found += [pad_of(number)] * seen.num_tokens
                continue
            start, end = found.pop(), pieces[at + 1]
            for step, seconds in enumerate(seen.times):
                found += [*[end] * (step > 0), f"<{seconds:.1f} seconds>", start]
                found += [pad_of(number)] * (seen.num_tokens // steps)
        return found

    def _numbers(self, kept: Sequence[int]) -> Iterator[int]:
        return (number for k in kept for number in self.by_message[k])
