"""What a run's towers are given at most: by the rendered data, else by the bound that the length of rows sets."""

from __future__ import annotations

from qwentune.data.layout.row_media import RowMedia
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.towers import loads_towers
from qwentune.memory.settings import TowerUse
from qwentune.recipe import DataOptions, MediaOptions, Tuning

_FRAMES_PER_PAD = 4  # two strides of 2, and a mean of two; of Qwen3-Omni nearly 8
_FRAMES_PER_PAD_BY_HUNDRED = 100 / 13


def expects_media(spec: ModelSpec, data: DataOptions, media: RowMedia | None) -> bool:
    """Whether rows have media: by the rendered data, else where the model is made for them or the recipe bounds them.

    A model that is also loaded without its towers is taken to be given text, unless `data.media` or one of the first
    rows says something else.
    """
    from qwentune.data.at_hand import show_media

    if media is not None:
        return media != RowMedia()
    if data.media != MediaOptions() or loads_towers(spec.checkpoint_type, has_media=False):
        return True
    return loads_towers(spec.checkpoint_type, has_media=True) and show_media(data)


def tower_use(
    spec: ModelSpec, tuning: Tuning, max_tokens: int, media: RowMedia | None, *, has_media: bool
) -> TowerUse | None:
    """What of towers is tuned, and the most that a row gives them; None where they are not loaded.

    Without rendered data a row is taken to be all pads: of pictures, whose patches take more than the sounds of as
    many pads, else of sounds.
    """
    if spec.tower is None or not loads_towers(spec.checkpoint_type, has_media=has_media):
        return None
    if media is None:
        media = _bound(spec, max_tokens) if has_media else RowMedia()
    return TowerUse(media.patches, media.frames, tuning.towers, tuning.merger)


def _bound(spec: ModelSpec, max_tokens: int) -> RowMedia:
    assert spec.tower is not None
    if (vision := spec.tower.vision) is not None:
        return RowMedia(patches=vision.merge**2 * max_tokens)
    assert spec.tower.audio is not None
    per_pad = _FRAMES_PER_PAD_BY_HUNDRED if spec.tower.audio.downsample else _FRAMES_PER_PAD
    return RowMedia(frames=round(per_pad * max_tokens))
