"""What a checkpoint takes of a medium: its family's facts, its folder's processor files, and the recipe's bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from qwentune.bounded import UnreadableError, read_text
from qwentune.errors import Problem, UsageError
from qwentune.facts.documents import read_object
from qwentune.facts.media import Hearing, MediaFamily, Number, Vision, with_positions
from qwentune.recipe import MediaOptions

LARGEST_FILE_BYTES = 2**20
PICTURES, VIDEOS, NESTED = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
# What a processor file may say otherwise, and nothing here carries out.
ALWAYS: Mapping[str, bool | float] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    **{"resample": 3, "rescale_factor": 1 / 255, "dither": 0.0, "n_fft": 400, "cap_pixels_per_frame": False},
}


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """How the model of one run takes media; `vision` and `hearing` outweigh those of the family.

    `max_seconds` is the longest clip or video that the recipe lets in; None: any. `min_pixels` is the recipe's own
    bound, which a row may lower; None: a row may say any. `faults` are those of the folder's files, said where a row
    has a medium.
    """

    family: MediaFamily
    vision: Vision | None
    hearing: Hearing | None
    max_seconds: float | None = None
    min_pixels: int | None = None
    faults: tuple[Problem, ...] = ()


def media_limits(folder: Path | None, family: MediaFamily, options: MediaOptions) -> MediaLimits:
    """The limits of a checkpoint; without a folder, those of its family's published ones.

    Raises UsageError where one of the folder's files says what cannot be carried out.
    """
    vision, hearing = family.vision, family.hearing
    if folder is not None:
        family = with_positions(family, read_object(folder / "config.json", optional=True))
        files = _ProcessorFiles(folder)
        if vision is not None:
            vision = _bounded(_of_folder(vision, files), options)
        if hearing is not None:
            sounds = files.section("feature_extractor", PICTURES)
            hearing = replace(hearing, **sounds.found(mel_bins="feature_size", hop="hop_length"))
            hearing = replace(hearing, **sounds.found(sampling_rate="sampling_rate"))
    elif vision is not None:
        vision = _bounded(vision, options)
    return MediaLimits(family, vision, hearing, options.max_seconds, options.min_pixels)


def limits_if_needed(folder: Path, family: MediaFamily, options: MediaOptions) -> MediaLimits:
    """The limits of a checkpoint; what is wrong with its files is among them, for text needs none of these."""
    try:
        return media_limits(folder, family, options)
    except UsageError as error:
        return MediaLimits(family, None, None, faults=tuple(error.problems))


def _bounded(vision: Vision, options: MediaOptions) -> Vision:
    """The limits that the recipe leaves of a folder's.

    `max_pixels` bounds a picture, and of a video each frame, or where all frames are bounded together, so many times
    it as frames may be taken: this is what a processor file can say as well.
    """
    most = options.max_pixels or vision.max_pixels
    frames = min(options.max_frames or vision.max_frames, vision.max_frames)
    of_video = most * (frames if vision.video == "timestamped" else 1)
    max_pixels, max_video_pixels = min(most, vision.max_pixels), min(of_video, vision.max_video_pixels)
    least = options.min_pixels or vision.min_pixels
    of_video = vision.min_video_pixels if vision.video == "timestamped" else options.min_pixels or 0
    return replace(
        vision,
        max_pixels=max_pixels,
        min_pixels=min(least, max_pixels),
        max_video_pixels=max_video_pixels,
        min_video_pixels=min(of_video or vision.min_video_pixels, max_video_pixels),
        fps=options.fps or vision.fps,
        max_frames=frames,
        min_frames=min(vision.min_frames, frames),
    )


def _of_folder(vision: Vision, files: _ProcessorFiles) -> Vision:
    pictures = files.section("image_processor", PICTURES)
    shared = {"patch": "patch_size", "merge": "merge_size", "temporal": "temporal_patch_size"}
    vision = replace(vision, **pictures.found(**shared), **pictures.pixels("min_pixels", "max_pixels"))
    vision = replace(vision, **pictures.colours(mean="image_mean", std="image_std"))
    videos = files.section("video_processor", VIDEOS, PICTURES)
    videos.must_agree(vision, shared)
    vision = replace(vision, **videos.pixels("min_video_pixels", "max_video_pixels"))
    vision = replace(vision, **videos.found(fps="fps", min_frames="min_frames", max_frames="max_frames"))
    if vision.clock == "seconds":
        config = files.config("vision_config").found(tokens_per_second="tokens_per_second")
        config |= files.config().found(tokens_per_second="position_id_per_seconds")
        vision = replace(vision, **config)
    return vision


@dataclass(frozen=True, slots=True)
class _Section:
    """What one processor file says of one kind."""

    file: Path
    fields: Mapping[str, Any]

    def found(self, **names: str) -> dict[str, Any]:
        """Numbers above 0 under the names, by ours."""
        return {ours: self._number(name) for ours, name in names.items() if self.fields.get(name) is not None}

    def pixels(self, least: str, most: str) -> dict[str, int]:
        """The bounds of a size by our names, as transformers reads them."""
        of_size = _Section(self.file, _object(self.fields.get("size"))).found(
            **{least: "shortest_edge", most: "longest_edge"}
        )
        return of_size | self.found(**{least: "min_pixels", most: "max_pixels"})

    def colours(self, **names: str) -> dict[str, Number]:
        """Triples of numbers under the names, by ours."""
        found: dict[str, Number] = {}
        for ours, name in names.items():
            match self.fields.get(name):
                case None:
                    pass
                case [int() | float() as red, int() | float() as green, int() | float() as blue]:
                    found[ours] = (red, green, blue)
                case value:
                    raise self._error(name, value, "three numbers are needed")
        return found

    def must_agree(self, vision: Vision, names: Mapping[str, str]) -> None:
        """Raises UsageError where pictures and videos are cut otherwise, which no model takes."""
        for ours, name in names.items():
            if self.fields.get(name) not in (None, getattr(vision, ours)):
                raise self._error(name, self.fields[name], f"pictures have {getattr(vision, ours)}")

    def _number(self, name: str) -> float:
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**40:
            raise self._error(name, value, "a number above 0 is needed")
        return value

    def _error(self, name: str, value: object, why: str) -> UsageError:
        return UsageError(Problem(str(self.file), f"{name} is {value!r}: {why}", "Take the checkpoint's own file."))


@dataclass(frozen=True, slots=True)
class _ProcessorFiles:
    """The processor files of a checkpoint's folder; what is absent says nothing."""

    folder: Path

    def section(self, name: str, *files: str) -> _Section:
        """What the files say under `name`, else the first of `files` as a whole; as transformers looks for it."""
        found = [self._read(NESTED, name), *map(self._read, files)]
        section = next((one for one in found if one.fields), found[1])
        for key, value in ALWAYS.items():
            if section.fields.get(key) not in (None, value):
                what = f"{key} is {section.fields[key]!r}, and media are prepared with {value!r}"
                raise UsageError(Problem(str(section.file), what, "Take the checkpoint's own file."))
        return section

    def config(self, name: str = "") -> _Section:
        """What the model's config says, of one part of it where it is named; of an Omni folder, of its thinker."""
        whole = self._read("config.json")
        thinker = _object(whole.fields.get("thinker_config")) or whole.fields
        return _Section(whole.file, _object(thinker.get(name)) if name else thinker)

    def _read(self, file: str, name: str = "") -> _Section:
        path = self.folder / file
        if not path.exists():
            return _Section(path, {})
        try:
            value = _object(json.loads(read_text(path, LARGEST_FILE_BYTES)))
        except (UnreadableError, ValueError) as error:
            raise UsageError(Problem(str(path), f"it cannot be read: {error}", "Fetch the checkpoint again.")) from None
        return _Section(path, _object(value.get(name)) if name else value)


def _object(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}
