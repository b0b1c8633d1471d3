"""What each family of models makes of pictures, videos and sounds: pads, grids, limits and positions; free of torch.

Sources: the processors of transformers 5.24 and the preprocessor_config.json of the published folders as quoted in
public code; where transformers and vLLM differ (positions after a video, marks of a video), vLLM, which serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal, TypeAlias

Number: TypeAlias = tuple[float, float, float]

CLIP_MEAN: Number = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Number = (0.26862954, 0.26130258, 0.27577711)
HALF: Number = (0.5, 0.5, 0.5)
CLIP_FRAMES = 3000  # that Qwen2-Audio's tower takes of a clip, no more and no fewer
CLIPS_AT_ONCE = 4  # that go through that tower together, however many short ones stand in a row


@dataclass(frozen=True, slots=True)
class Vision:
    """How pictures and videos become patches.

    Sizes in pixels are multiples of `patch * merge`; a grid step of a video is `temporal` frames. A picture has from
    `min_pixels` to `max_pixels`; a video from `min_video_pixels` to `max_video_pixels`, in each frame where `video` is
    `one_span`, in all frames together where it is `timestamped`; these four are the published folders' and give way to
    what a folder says. `video` says how a prompt shows one: `one_span` (marks around all pads) or `timestamped`
    (`<0.1 seconds>`, marks and pads for each step). `clock` says what the first axis of a position counts in a video:
    `steps`, or `seconds` times `tokens_per_second`; pictures have one step. `positions_side` is that of the square of
    learned positions, of towers that have them.
    """

    patch: int
    min_pixels: int
    max_pixels: int
    min_video_pixels: int
    max_video_pixels: int
    mean: Number
    std: Number
    video: Literal["one_span", "timestamped"]
    clock: Literal["steps", "seconds"] = "steps"
    tokens_per_second: float = 1.0
    merge: int = 2
    temporal: int = 2
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    positions_side: int = 48


@dataclass(frozen=True, slots=True)
class Hearing:
    """How sounds become mel frames (hop 160 at 16 kHz, `mel_bins` each) and how many pads stand for them.

    `count`: `halved_twice` (the whole clip in two strides of 2) or `by_hundred` (blocks of 100 frames of 13 pads).
    `most_seconds` is what the model takes of one clip, to which shorter ones are padded; None: any length, unpadded.
    """

    count: Literal["halved_twice", "by_hundred"]
    most_seconds: float | None
    mel_bins: int = 128
    sampling_rate: int = 16000
    hop: int = 160


@dataclass(frozen=True, slots=True)
class MediaFamily:
    """What the models of one `model_type` take besides text.

    `pads` names the control token that stands for each kind in a rendering, one for a medium, which becomes as many as
    the medium has tokens. `axes` is 3 where positions have a time, a row and a column, else 1.
    """

    model_type: str
    pads: Mapping[str, str]
    vision: Vision | None = None
    hearing: Hearing | None = None
    axes: Literal[1, 3] = 3


_PICTURES = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
# Videos of Omni models are left out: flags of a server decide what it does with them and with their sound.
_OMNI_2 = {"image": "<|IMAGE|>", "audio": "<|AUDIO|>"}
_OMNI_3 = {"image": "<|image_pad|>", "audio": "<|audio_pad|>"}
_VL2 = Vision(14, 3_136, 12_845_056, 3_136, 12_845_056, CLIP_MEAN, CLIP_STD, "one_span")
_VL3 = Vision(16, 65_536, 16_777_216, 4_096, 25_165_824, HALF, HALF, "timestamped")
_VL2_5 = replace(_VL2, clock="seconds", tokens_per_second=2.0)
_SEES_2_5 = replace(_VL2, clock="seconds", tokens_per_second=25.0)
_SEES_3 = replace(_SEES_2_5, patch=16, mean=HALF, std=HALF, tokens_per_second=13.0)
_WHOLE_CLIP, _ANY_LENGTH = Hearing("halved_twice", 30.0), Hearing("halved_twice", None)
_BY_HUNDRED = Hearing("by_hundred", None)

FAMILIES: Mapping[str, MediaFamily] = {
    family.model_type: family
    for family in (
        MediaFamily("qwen2_vl", _PICTURES, _VL2),
        MediaFamily("qwen2_5_vl", _PICTURES, _VL2_5),
        MediaFamily("qwen3_vl", _PICTURES, _VL3),
        MediaFamily("qwen3_vl_moe", _PICTURES, _VL3),
        MediaFamily("qwen3_5", _PICTURES, _VL3),
        MediaFamily("qwen3_5_moe", _PICTURES, _VL3),
        MediaFamily("qwen2_audio", {"audio": "<|AUDIO|>"}, hearing=_WHOLE_CLIP, axes=1),
        # The whole folder, and the thinker saved alone.
        MediaFamily("qwen2_5_omni", _OMNI_2, _SEES_2_5, _ANY_LENGTH),
        MediaFamily("qwen2_5_omni_thinker", _OMNI_2, _SEES_2_5, _ANY_LENGTH),
        MediaFamily("qwen3_omni_moe", _OMNI_3, _SEES_3, _BY_HUNDRED),
        MediaFamily("qwen3_omni_moe_thinker", _OMNI_3, _SEES_3, _BY_HUNDRED),
    )
}


def with_positions(family: MediaFamily, config: Mapping[str, Any]) -> MediaFamily:
    """The family with as many learned positions as a config.json says; the published number where it says none."""
    values: Mapping[str, Any] = config.get("thinker_config") or config
    for key in ("vision_config", "num_position_embeddings"):
        values = values.get(key) if isinstance(values, Mapping) else None  # type: ignore[assignment]
    if family.vision is None or not isinstance(values, int):
        return family
    return replace(family, vision=replace(family.vision, positions_side=isqrt(values)))
