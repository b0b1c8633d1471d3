"""What a server prepares media with: the base's own processor files, saying what the run's recipe said otherwise."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwentune.data.media.limits import NESTED, PICTURES, VIDEOS, limits_if_needed
from qwentune.facts.documents import read_object
from qwentune.facts.media import FAMILIES, Vision
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter
from qwentune.recipe import MediaOptions

PROCESSOR_FILES = (PICTURES, VIDEOS, NESTED)
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
MOST_FPS, MOST_FRAMES = 30, 768  # of vLLM's loaders (multimodal/video.py, 0.33)


def is_whole(folder: Path) -> bool:
    """Whether weights are those of a model with its towers, or adapters on one; not of a decoder loaded alone."""
    if (folder / ADAPTER_WEIGHTS).exists():
        return any(".language_model." in name for name in read_adapter(folder))
    return read_object(folder / "config.json").get("model_type") in FAMILIES


def write_processors(target: Path, base: Path, options: MediaOptions, kinds: Collection[str] = ()) -> None:
    """Copies the processor files of `base`; limits that the recipe's `options` have moved are written into them.

    `kinds` are those of the run's media.

    A base that says of pictures alone what holds for both (Qwen2-VL, Qwen2.5-VL) gets a file of videos, where
    transformers and vLLM look first; it leaves `do_sample_frames` as the class has it, for vLLM hands frames over that
    are chosen already. A file that cannot be read is copied as it is: the run had no media.
    """
    moved = _moved(base, options)
    found = {name: (base / name).read_bytes() for name in PROCESSOR_FILES if (base / name).exists()}
    files = {name: values for name, content in found.items() if (values := _object(content)) is not None}
    for name in found.keys() - files.keys():
        (target / name).write_bytes(found[name])
    vision = _vision(base, options)
    has_videos = VIDEOS in files or "video_processor" in files.get(NESTED, {})
    if vision is not None and not has_videos and ("video" in kinds or "video" in moved):
        files[VIDEOS] = _of_videos(files, vision)
        moved["video"] = _named(vision)["video"]
    for name, values in files.items():
        for section, kind in _sections(name, values):
            if kind in moved:
                _write_limits(section, moved[kind])
        is_as_it_was = name in found and values == _object(found[name])
        (target / name).write_bytes(found[name] if is_as_it_was else _json(values))


class ServerOption(NamedTuple):
    """An option of `vllm serve`, its value, and where that comes from."""

    name: str
    value: dict[str, Any]
    source: str


def server_options(base: Path, options: MediaOptions, kinds: Collection[str], *, has_files: bool) -> list[ServerOption]:
    """What vLLM (0.33) must be told to show media of these `kinds` as the run did.

    Limits of pictures and videos go into scopes of their own, for both have the same names; a package that `has_files`
    says them there. Which frames are taken is decided before any processor sees them: of that no file is asked.
    """
    vision = _vision(base, options)
    if vision is None:
        return []
    found: list[ServerOption] = []
    scopes = {f"{kind}s_kwargs": _as_call(limits) for kind, limits in _moved(base, options).items()}
    if scopes and not has_files:
        found.append(
            ServerOption("mm-processor-kwargs", scopes, "what data.media says otherwise than the base's files")
        )
    if "video" in kinds:
        frames = {"num_frames": -1, "fps": vision.fps, "min_frames": vision.min_frames, "max_frames": vision.max_frames}
        source = "how the run took frames, for which vLLM asks no file"
        found.append(ServerOption("media-io-kwargs", {"video": frames}, source))
    return found


def beyond_servers(base: Path, options: MediaOptions, kinds: Collection[str]) -> str:
    """What of the run's frames no option of vLLM expresses; empty where all is."""
    vision = _vision(base, options)
    if vision is None or "video" not in kinds or (vision.fps <= MOST_FPS and vision.max_frames <= MOST_FRAMES):
        return ""
    return (
        f"vLLM takes at most {MOST_FPS} frames of a second and {MOST_FRAMES} of a video, the run up to {vision.fps:g} "
        f"and {vision.max_frames}: longer or denser videos are served otherwise than they were trained"
    )


def _vision(base: Path, options: MediaOptions) -> Vision | None:
    family = FAMILIES.get(str(read_object(base / "config.json").get("model_type")))
    return None if family is None else limits_if_needed(base, family, options).vision


def _moved(base: Path, options: MediaOptions) -> dict[str, dict[str, float]]:
    """Of the kinds whose limits are not those of the base's files all their limits, as processor files name them."""
    if options == MediaOptions():
        return {}
    family = FAMILIES.get(str(read_object(base / "config.json").get("model_type")))
    if family is None or family.vision is None:
        return {}
    visions = [limits_if_needed(base, family, each).vision for each in (MediaOptions(), options)]
    before, after = (_named(vision) if vision else {} for vision in visions)
    return {kind: limits for kind, limits in after.items() if kind in family.pads and limits != before[kind]}


def _named(vision: Vision) -> dict[str, dict[str, float]]:
    frames = {"fps": vision.fps, "min_frames": vision.min_frames, "max_frames": vision.max_frames}
    of_video = {"min_pixels": vision.min_video_pixels, "max_pixels": vision.max_video_pixels, **frames}
    return {"image": {"min_pixels": vision.min_pixels, "max_pixels": vision.max_pixels}, "video": of_video}


def _as_call(limits: Mapping[str, float]) -> dict[str, Any]:
    """Limits as a call of a processor takes them, where `fps` names the steps of frames that are chosen already."""
    size = {edge: limits[name] for name, edge in EDGES.items()}
    return {"size": size, **({"fps": limits["fps"]} if "fps" in limits else {})}


def _of_videos(files: Mapping[str, dict[str, Any]], vision: Vision) -> dict[str, Any]:
    """What the base's files say of pictures, as a file of videos."""
    pictures = files.get(PICTURES) or files.get(NESTED, {}).get("image_processor", {})
    name = "Qwen3VLVideoProcessor" if vision.video == "timestamped" else "Qwen2VLVideoProcessor"
    kept = {key: value for key, value in pictures.items() if key not in (*EDGES, "size", "image_processor_type")}
    # Transformers is about to bound the frames of long videos further.
    return {**kept, "video_processor_type": name, "cap_pixels_per_frame": False}


def _sections(name: str, values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    if name == NESTED:
        for key, kind in (("image_processor", "image"), ("video_processor", "video")):
            if isinstance(values.get(key), dict):
                yield values[key], kind
    else:
        yield values, "image" if name == PICTURES else "video"


def _write_limits(section: dict[str, Any], limits: Mapping[str, float]) -> None:
    """Writes them where the file has them, of pixels in each of the two ways in which it may."""
    for key, value in limits.items():
        if key not in EDGES or key in section:
            section[key] = value
    size = section.get("size")
    if isinstance(size, dict) or not EDGES.keys() <= section.keys():
        section["size"] = {**(size if isinstance(size, dict) else {}), **{EDGES[key]: limits[key] for key in EDGES}}


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(content)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
