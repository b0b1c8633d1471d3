"""What a server prepares media with: the base's own processor files, saying what the run's recipe said otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwentune.data.media.limits import NESTED, PICTURES, VIDEOS, MediaLimits, media_limits
from qwentune.facts.documents import read_object
from qwentune.facts.media import FAMILIES
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter
from qwentune.recipe import MediaOptions

PROCESSOR_FILES = (PICTURES, VIDEOS, NESTED)


def is_whole(folder: Path) -> bool:
    """Whether weights are those of a model with its towers, or adapters on one; not of a decoder loaded alone."""
    if (folder / ADAPTER_WEIGHTS).exists():
        return any(".language_model." in name for name in read_adapter(folder))
    return read_object(folder / "config.json").get("model_type") in FAMILIES


def write_processors(target: Path, base: Path, options: MediaOptions) -> None:
    """Copies the processor files of `base`; limits that the recipe's `options` have moved are written into them."""
    changed = _changed(base, options)
    for name in PROCESSOR_FILES:
        if not (base / name).exists():
            continue
        content = (base / name).read_bytes()
        values = json.loads(content)
        for section, kind in _sections(name, values):
            for key, value in changed.get(kind, {}).items():
                _write_limit(section, key, value)
        (target / name).write_bytes(content if values == json.loads(content) else _json(values))


def processor_arguments(base: Path, options: MediaOptions) -> dict[str, Any]:
    """What a server that has the base's processor files must be told, by vLLM's `mm_processor_kwargs`."""
    changed = _changed(base, options)
    return {**changed.get("video", {}), **changed.get("image", {})}


def _changed(base: Path, options: MediaOptions) -> dict[str, dict[str, float]]:
    """The limits that are not those of the base's files, of pictures and of videos, as processor files name them."""
    if options == MediaOptions():
        return {}
    family = FAMILIES.get(str(read_object(base / "config.json").get("model_type")))
    if family is None or family.vision is None:
        return {}
    before, after = (_named(media_limits(base, family, each)) for each in (MediaOptions(), options))
    return {kind: {k: v for k, v in after[kind].items() if before[kind][k] != v} for kind in after}


def _named(limits: MediaLimits) -> dict[str, dict[str, float]]:
    vision = limits.vision
    assert vision is not None
    frames = {"fps": vision.fps, "min_frames": vision.min_frames, "max_frames": vision.max_frames}
    of_video = {"min_pixels": vision.min_video_pixels, "max_pixels": vision.max_video_pixels, **frames}
    return {"image": {"min_pixels": vision.min_pixels, "max_pixels": vision.max_pixels}, "video": of_video}


def _sections(name: str, values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    if name == NESTED:
        for key, kind in (("image_processor", "image"), ("video_processor", "video")):
            if isinstance(values.get(key), dict):
                yield values[key], kind
    else:
        yield values, "image" if name == PICTURES else "video"


def _write_limit(section: dict[str, Any], key: str, value: float) -> None:
    """Where the file has the limit, in each of the two ways in which it may have one."""
    edge = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}.get(key)
    size: Mapping[str, Any] | None = section.get("size")
    if edge is not None and isinstance(size, dict):
        section["size"] = {**size, edge: value}
    if edge is None or key in section or not isinstance(size, dict):
        section[key] = value


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
