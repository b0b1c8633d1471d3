"""What sees and hears in a traced step: its media, which part of it is tuned, and what of it is recomputed."""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qwentune.data.layout.tower_inputs import stays_on_cpu, tower_inputs
from qwentune.facts.media import CLIP_FRAMES, CLIPS_AT_ONCE, FAMILIES
from qwentune.facts.towers import PROJECTOR, TOWERS, Part
from qwentune.memory.settings import Settings, TowerTuning
from qwentune.model.senses import OF_MEDIA, freeze


@dataclass(frozen=True)
class MediaBatch:
    """The part of a batch that is no text."""

    tensors_by_name: Mapping[str, Tensor]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> MediaBatch:
        """The media of a batch."""
        return cls({name: tensor for name, tensor in batch.items() if name.startswith(OF_MEDIA)})

    @classmethod
    def on_meta(cls, settings: Settings, config: PreTrainedConfig) -> MediaBatch:
        """One picture of all patches of a forward pass, and one sound of all its frames, on meta.

        How many pictures and windows share the patches changes no size; one of each spares the loop over them.
        """
        family = FAMILIES[config.model_type]
        batch: dict[str, Tensor] = {}
        if patches := settings.forward_patches:
            assert family.vision is not None
            merge, vision = family.vision.merge, family.vision
            grid = torch.tensor([[1, merge, patches // merge]])
            batch["pixel_values"] = torch.empty(patches, 3 * vision.temporal * vision.patch**2, device="meta")
            batch |= tower_inputs(family, {"image_grid_thw": grid}) | {"image_grid_thw": grid}
            if "image_cu_window_seqlens" in batch:
                batch["image_cu_window_seqlens"] = batch["image_cu_seqlens"]
        if frames := settings.forward_frames:
            assert family.hearing is not None
            count = heard = 1
            length = padded = frames
            if family.hearing.most_seconds is not None:  # whole clips, of no more pads than the row has
                count, padded = -(-frames // CLIP_FRAMES), CLIP_FRAMES
                # A frozen tower keeps nothing of those that went through it before.
                heard = count if settings.tunes_towers else min(count, 2 * CLIPS_AT_ONCE)
                length = min(padded, 4 * (settings.forward_tokens // heard))
            lengths = torch.tensor([length] * heard)
            sounds = {"input_features": torch.empty(count, family.hearing.mel_bins, padded)}
            batch |= sounds | {"feature_lengths": lengths} | tower_inputs(family, sounds | {"feature_lengths": lengths})
        if family.axes == 3:
            row = torch.empty((1, settings.forward_tokens), dtype=torch.int64)
            batch |= {"depths": row, "position_ids": row.expand(3, 1, -1).contiguous()}
        return cls({name: x if stays_on_cpu(name, batch) else x.to("meta") for name, x in batch.items()})

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that lies on the device."""
        named = self.tensors_by_name
        return [tensor for name, tensor in named.items() if not stays_on_cpu(name, named)]


def tower_modules(network: Any) -> list[nn.Module]:
    """What sees and hears, and what stands between it and the decoder; none in a model of text."""
    whole = getattr(network, "model", network)
    return [module for name in (*TOWERS, PROJECTOR) if (module := getattr(whole, name, None)) is not None]


def freeze_towers(network: Any, settings: Settings) -> None:
    """Stops gradients into what is not tuned, under full tuning; adapters freeze what they do not train."""
    if settings.towers is None or settings.kind != "full":
        return
    parts: dict[Part, TowerTuning] = {"tower": settings.towers.body, "merger": settings.towers.merger}
    freeze(network, ["language", *(part for part, tuning in parts.items() if tuning == "trained")])
