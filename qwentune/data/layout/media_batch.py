"""Media become tensors of a micro-batch: patches and features in the order of their pads, and what comes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwentune.data.layout.media_table import RunMedia
from qwentune.data.layout.tower_inputs import tower_inputs
from qwentune.data.layout.trie import Packed
from qwentune.data.media.seen import Seen
from qwentune.data.sample import MediaKind

PATCHES: dict[MediaKind, tuple[str, str]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def with_media(batch: dict[str, torch.Tensor], rows: Sequence[Packed], media: RunMedia) -> dict[str, torch.Tensor]:
    """A batch whose pads are those that the model knows, with what stands for them; each medium is read once.

    `pixel_values`, `pixel_values_videos`: (patches, ·) float32; `image_grid_thw`, `video_grid_thw`: (n, 3) int64;
    `input_features`: (n, mel bins, longest) float32, padded with zeros; `feature_lengths`: (n,) int64. What no row
    shows is absent. Beside these stands what the towers derive from grids and lengths (`tower_inputs`).
    """
    batch = {**batch, "input_ids": torch.as_tensor(media.in_model(batch["input_ids"].numpy()))}
    if media.has_axes:
        positions = [row.positions for row in rows if row.positions is not None]
        batch["depths"] = batch["position_ids"]
        batch["position_ids"] = torch.as_tensor(np.concatenate(positions, axis=1).astype(np.int64))[:, None]
    batch |= _tensors([number for row in rows for number in row.media], media)
    return batch | tower_inputs(media.limits.family, batch)


def as_prompt(ids: Sequence[int], media: RunMedia) -> dict[str, torch.Tensor]:
    """A prompt as transformers' `generate` takes it, which derives positions and tower inputs itself.

    `input_ids`, `attention_mask`: (1, T) int64; `mm_token_type_ids` (1, T) where the model sees and does not hear;
    `feature_attention_mask` (n, frames) beside `input_features`.
    """
    row = np.asarray(ids, dtype=np.int32)
    known = torch.as_tensor(media.in_model(row).astype(np.int64))[None]
    prompt = {"input_ids": known, "attention_mask": torch.ones_like(known), **_tensors(media.order(row), media)}
    if (lengths := prompt.pop("feature_lengths", None)) is not None:
        frames = torch.arange(prompt["input_features"].shape[-1])
        prompt["feature_attention_mask"] = (frames < lengths[:, None]).long()
    elif media.seen and media.limits.hearing is None:
        kinds = torch.zeros_like(known)
        for number, kind in enumerate(PATCHES, 1):
            kinds[known == media.pad_ids.get(kind, -1)] = number
        prompt["mm_token_type_ids"] = kinds
    return prompt


def _tensors(order: Sequence[int], media: RunMedia) -> dict[str, torch.Tensor]:
    """Patches and features of media in that order."""
    batch: dict[str, torch.Tensor] = {}
    loaded = {number: media.load(number) for number in dict.fromkeys(order)}
    by_kind: dict[MediaKind, list[int]] = {}
    for number in order:
        by_kind.setdefault(media.seen[number].kind, []).append(number)
    for kind, numbers in by_kind.items():
        seen, contents = [media.seen[number] for number in numbers], [loaded[number] for number in numbers]
        batch |= _sounds(seen, contents) if kind == "audio" else _pictures(kind, seen, contents)
    return batch


def _pictures(kind: MediaKind, seen: Sequence[Seen], patches: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
    values, grids = PATCHES[kind]
    return {
        values: torch.as_tensor(np.concatenate(patches)),
        grids: torch.tensor([one.grid for one in seen], dtype=torch.int64),
    }


def _sounds(seen: Sequence[Seen], features: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
    longest = max(one.shape[1] for one in features)
    padded = np.zeros((len(features), features[0].shape[0], longest), dtype=np.float32)
    for row, one in zip(padded, features, strict=True):
        row[:, : one.shape[1]] = one
    lengths = torch.tensor([one.grid[0] for one in seen], dtype=torch.int64)
    return {"input_features": torch.as_tensor(padded), "feature_lengths": lengths}
