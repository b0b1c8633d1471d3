"""What a run's towers are given at most: by the rendered data, else by the bound that the length of rows sets."""

from __future__ import annotations

from dataclasses import replace

from qwentune.data.layout.row_media import RowMedia
from qwentune.data.media.sounds import most_frames_per_pad
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.media import FAMILIES
from qwentune.facts.towers import loads_towers
from qwentune.memory.settings import TowerUse
from qwentune.recipe import DataOptions, MediaOptions, Tuning


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

    Without rendered data it is the `most_media` of a row.
    """
    if spec.tower is None or not loads_towers(spec.checkpoint_type, has_media=has_media):
        return None
    use = TowerUse(body=tuning.towers, merger=tuning.merger)
    if media is None:
        return most_media(spec, use, max_tokens) if has_media else use
    return replace(use, patches=media.patches, frames=media.frames)


def most_media(spec: ModelSpec, use: TowerUse, max_tokens: int) -> TowerUse:
    """The use of towers by a row of so many tokens of which nothing is known.

    It is taken to be all pads of pictures, and where the model hears too, all pads of its shortest clips as well: which
    of both takes more depends on what is tuned.
    """
    family = FAMILIES[spec.checkpoint_type]
    patches = 0 if family.vision is None else family.vision.merge**2 * max_tokens
    frames = 0 if family.hearing is None else int(most_frames_per_pad(family.hearing) * max_tokens)
    return replace(use, patches=patches, frames=frames, is_bound=True)
