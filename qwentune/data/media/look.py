"""What a model will see or hear of a medium: its file is looked at, and every fault of it said, before a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qwentune.bounded import kind_fault, name_fault
from qwentune.data.cache import writable_cache
from qwentune.data.media.hashed import digest_of, hashed
from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.pictures import best_size, picture_size
from qwentune.data.media.seen import LISTED, Seen
from qwentune.data.media.sounds import LEAST_SECONDS, clip, mel_frames, num_pads, num_samples
from qwentune.data.media.videos import film, film_of, frames_taken, times_of, video_size
from qwentune.data.sample import MediaKind, Medium, RowError
from qwentune.durable import replace_file
from qwentune.errors import UsageError
from qwentune.facts.media import FAMILIES, Vision

NAMES = {"image": "an image", "video": "a video", "audio": "audio"}
# How files begin that are taken for media: what they are, and how to mend them.
TAKEN_FOR_MEDIA = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch the files: git lfs pull"),
    (b"<!doctype html", "a web page", "The download failed: fetch the file itself."),
    (b"<html", "a web page", "The download failed: fetch the file itself."),
    (b"<svg", "a drawing in SVG", "Draw it as PNG: rsvg-convert FILE -o new.png"),
    (b"<?xml", "a text of XML", "Draw it as PNG: rsvg-convert FILE -o new.png"),
    (b"%pdf", "a PDF", "Draw its page as PNG: pdftoppm -png FILE page"),
)


def look(medium: Medium, limits: MediaLimits | None) -> Seen:
    """The medium as the model takes it; `limits` are None of a model that takes text only.

    Raises RowError for all that is wrong with its file, and where the model does not take its kind; UsageError where a
    file of the checkpoint is at fault.
    """
    if limits is None or medium.kind not in limits.family.pads:
        raise refusal(medium, limits)
    if limits.faults:
        raise UsageError(limits.faults)
    files: list[Path] = []
    try:
        for content in medium.content if isinstance(medium.content, tuple) else (medium.content,):
            files.append(_file(content))
        if not files:
            raise RowError("it has no frames", "List them, or leave the row out.")
        match medium.kind:
            case "image":
                return _picture(files[0], medium, limits)
            case "video":
                return _video(files, medium, limits)
            case "audio":
                return _sound(files[0], limits)
    except (RowError, OSError) as error:
        fault = error if isinstance(error, RowError) else _unreadable(error)
        waits_for = [*fault.waits_for, *_places(medium)]
        given = files[-1] if files else medium.content
        name = "" if isinstance(medium.content, bytes) else f", {str(given)!r}"
        raise RowError(f"{medium.where}{name}: {fault.what}", fault.fix, waits_for=waits_for) from None


def refusal(medium: Medium, limits: MediaLimits | None) -> RowError:
    """Why a model does not take a medium, and which do."""
    takers = ", ".join(family.model_type for family in FAMILIES.values() if medium.kind in family.pads)
    takes = "text only" if limits is None else f"{' and '.join(limits.family.pads)} only"
    fix = f"Leave the row out, or train one of {takers}."
    return RowError(f"{medium.where} is {NAMES[medium.kind]}, and this model takes {takes}", fix)


def _file(content: Path | bytes) -> Path:
    """A readable file that holds the content, with an absolute path."""
    if isinstance(content, bytes):
        if not content:
            raise RowError("it is empty", "Give its bytes, or leave the row out.")
        return _kept(content, hashlib.sha256(content).hexdigest()[:32])
    file = Path(os.path.abspath(content))
    try:
        if fault := name_fault(str(content)):
            raise RowError(fault, "Write the path of a file.")
        if not os.path.lexists(file):
            fix = "It is looked for beside the data file, then from where the command was started."
            raise RowError("there is no such file", fix)
        if fault := kind_fault(file):
            raise RowError(fault, "Write the path of a file.")
        with open(file, "rb") as stream:
            head = stream.read(64).lstrip().lower()
    except OSError as error:
        raise _unreadable(error) from None
    if not head:
        raise RowError("the file is empty", "Download or save it again, or leave the row out.")
    for beginning, what, fix in TAKEN_FOR_MEDIA:
        if head.startswith(beginning):
            raise RowError(f"it is {what}", fix)
    return file


def _places(medium: Medium) -> Iterator[str]:
    """Where its files are, or are looked for: beside the rows, then from where the command was started."""
    for content in medium.content if isinstance(medium.content, tuple) else (medium.content,):
        if isinstance(content, Path):
            parts = Path(os.path.abspath(content)).parts
            yield os.path.join(*parts)
            if not os.path.lexists(content):
                yield from (os.path.abspath(os.path.join(*parts[start:])) for start in range(1, len(parts)))


def _unreadable(error: OSError) -> RowError:
    return RowError(f"it cannot be read: {error.strerror}", "Check the file and its permissions.")


def _kept(content: bytes, name: str) -> Path:
    """The file of the cache that holds the content, written where it does not."""
    file = writable_cache("media") / name
    if not _holds(file, content):
        staging = file.with_name(f".{name}.{os.getpid()}")
        staging.write_bytes(content)
        replace_file(staging, file)
    return file


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.stat().st_size == len(content) and file.read_bytes() == content
    except OSError:
        return False


def has_own_limits(medium: Medium, limits: MediaLimits) -> bool:
    """Whether the row bounds the medium otherwise than the run does, so that a request for it must say the same."""
    if limits.vision is None or not medium.limits:
        return False
    is_sized = medium.kind == "video" and bool(_own_pixels(medium, limits))
    is_clocked = isinstance(medium.content, tuple) and medium.limits.get("fps", limits.vision.fps) != limits.vision.fps
    return is_sized or is_clocked or _bounded_by_row(medium, limits) != limits.vision


def _own_pixels(medium: Medium, limits: MediaLimits) -> dict[str, int]:
    """The row's `min_pixels` and `max_pixels`, the first no larger than the recipe's, where that says one."""
    own = {name: int(medium.limits[name]) for name in ("min_pixels", "max_pixels") if name in medium.limits}
    if "min_pixels" in own and limits.min_pixels is not None:
        own["min_pixels"] = min(own["min_pixels"], limits.min_pixels)
    return own


def _bounded_by_row(medium: Medium, limits: MediaLimits) -> Vision:
    """The limits with those of the row where they are smaller, or the recipe leaves them to it."""
    vision = limits.vision
    assert vision is not None
    own = {**medium.limits, **_own_pixels(medium, limits)}
    most = min(vision.max_pixels, int(own.get("max_pixels", vision.max_pixels)))
    return replace(
        vision,
        max_pixels=max(1, most),
        min_pixels=min(most, int(own.get("min_pixels", vision.min_pixels))),
        max_frames=min(vision.max_frames, max(vision.temporal, int(own.get("max_frames", vision.max_frames)))),
        min_frames=min(vision.min_frames, max(1, int(own.get("max_frames", vision.min_frames)))),
        fps=min(vision.fps, own.get("fps", vision.fps)),
    )


def _picture(file: Path, medium: Medium, limits: MediaLimits) -> Seen:
    assert limits.vision is not None
    vision = _bounded_by_row(medium, limits)
    with hashed(file) as (opened, digest):
        width, height = picture_size(opened)
    rows, columns = best_size(height, width, vision, vision.min_pixels, vision.max_pixels)
    return _seen("image", file, digest_of([digest]), (width, height), (1, rows, columns), vision)


def _video(files: list[Path], medium: Medium, limits: MediaLimits) -> Seen:
    assert limits.vision is not None
    is_listed, vision = isinstance(medium.content, tuple), _bounded_by_row(medium, limits)
    digests: list[str] = []
    sizes: list[tuple[int, int]] = []
    for file in files if is_listed else ():
        with hashed(file) as (opened, digest):
            sizes.append(picture_size(opened))
        digests.append(digest)
    if is_listed:
        video = film_of(sizes, medium.limits.get("fps", limits.vision.fps))
    else:
        with hashed(files[0]) as (opened, digest):
            video = film(opened)
        digests.append(digest)
    _refuse_long(video.num_frames / video.fps, limits)
    frames = tuple(range(video.num_frames)) if is_listed else frames_taken(video, vision.fps, vision)
    if is_listed and video.num_frames > vision.max_frames:
        what = f"it lists {video.num_frames} frames, and at most {vision.max_frames} are taken"
        raise RowError(what, "List fewer, or raise data.media.max_frames.")
    path = files[0]
    if is_listed:  # named by where the frames are, which may move
        listed = json.dumps([str(file) for file in files]).encode()
        path = _kept(listed, hashlib.sha256(listed).hexdigest()[:32] + LISTED)
    size = video_size(video, len(frames), vision, _own_pixels(medium, limits))
    grid = (-(-len(frames) // vision.temporal), *size)
    seen = _seen("video", path, digest_of(digests), (video.width, video.height), grid, vision)
    seconds = vision.temporal * video.num_frames / video.fps / len(frames)
    times = times_of(frames, video.fps, vision.temporal)
    return replace(seen, frames=frames, times=times, seconds_per_step=seconds)


def _sound(file: Path, limits: MediaLimits) -> Seen:
    hearing = limits.hearing
    assert hearing is not None
    most = min(hearing.most_seconds or float("inf"), limits.max_seconds or float("inf"))
    with hashed(file) as (opened, digest):
        samples, rate = clip(opened, most)
    _refuse_long(samples / rate, limits)
    if hearing.most_seconds is not None and samples / rate > hearing.most_seconds:
        what = f"it lasts {samples / rate:.2f} s, and this model hears the first {hearing.most_seconds:g} s"
        raise RowError(what, f"Cut it: ffmpeg -i FILE -t {hearing.most_seconds:g} new.wav")
    if samples / rate < LEAST_SECONDS:
        what = f"it lasts {samples / rate:.3f} s, and at least {LEAST_SECONDS} s are needed"
        raise RowError(what, "Leave the row out.")
    frames = mel_frames(num_samples(samples, rate, hearing), hearing)
    return Seen("audio", str(file), digest_of([digest]), (samples, rate), (frames, 0, 0), num_pads(frames, hearing))


def _refuse_long(seconds: float, limits: MediaLimits) -> None:
    if limits.max_seconds is not None and seconds > limits.max_seconds:
        what = f"it lasts {seconds:.2f} s, longer than data.media.max_seconds, {limits.max_seconds:g}"
        raise RowError(what, "Cut it, raise the bound, or leave such rows out with data.bad_rows=skip.")


def _seen(
    kind: MediaKind, path: Path, digest: str, original: tuple[int, int], size: tuple[int, int, int], vision: Vision
) -> Seen:
    """What is seen of steps of so many pixels high and wide."""
    steps, height, width = size
    grid = (steps, height // vision.patch, width // vision.patch)
    return Seen(kind, str(path), digest, original, grid, steps * grid[1] * grid[2] // vision.merge**2)
