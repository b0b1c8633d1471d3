"""What a tower derives from the sizes of its media, made before the step: on a GPU deriving it would wait for it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from qwentune.facts.media import CLIP_FRAMES, MediaFamily

# Of every published checkpoint; `qwentune.model.senses` refuses a folder that says otherwise.
WINDOW_PIXELS = 112  # of Qwen2.5's windows
HALF_CHUNK = {"qwen2_5_omni": 100, "qwen3_omni_moe": 50}  # mel frames
ATTENDED_FRAMES = 800  # of Qwen3-Omni, mel frames that attend to each other

HAS_WINDOWS = ("qwen2_5_vl", "qwen2_5_omni")
HAS_LEARNED_POSITIONS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe")


def stays_on_cpu(name: str, batch: Container[str]) -> bool:
    """Whether a tensor of a batch is read as numbers in the step, or cut up already into what is read."""
    if name == "input_features":
        return "audio_padded_feature" in batch
    return name == "trees" or name.endswith(("_grid_thw", "seqlens", "feature_lengths"))


def tower_inputs(family: MediaFamily, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keywords of a model's forward that follow from grids and lengths of a batch.

    For P patches in S frames: `image_cu_seqlens` (S + 1,) int32, `image_position_ids` (P, 2); with windows
    `image_window_index` (P / 4,), `image_cu_window_seqlens`; with learned positions `image_interp_indices` and
    `image_interp_weights` (P, 4); `video_…` alike. For sounds `audio_…` as the family's tower takes them.
    """
    inputs: dict[str, Tensor] = {}
    for kind in ("image", "video"):
        if (grids := batch.get(f"{kind}_grid_thw")) is not None:
            inputs |= {f"{kind}_{name}": tensor for name, tensor in _of_grids(family, grids).items()}
    if (lengths := batch.get("feature_lengths")) is not None:
        found = _of_sounds(family, batch["input_features"], lengths)
        inputs |= {f"audio_{name}": tensor for name, tensor in found.items()}
    return inputs


def _of_grids(family: MediaFamily, grids: Tensor) -> dict[str, Tensor]:
    from transformers import vision_utils

    made: Any = vision_utils
    assert family.vision is not None
    merge, kind = family.vision.merge, family.model_type.removesuffix("_thinker")
    inputs = {
        "cu_seqlens": made.get_vision_cu_seqlens(grids),
        "position_ids": made.get_vision_position_ids(grids, merge),
    }
    if kind in HAS_WINDOWS:
        windows = made.get_vision_window_index(grids, merge, WINDOW_PIXELS, family.vision.patch)
        inputs["window_index"], inputs["cu_window_seqlens"] = windows
    if kind in HAS_LEARNED_POSITIONS:
        taps = made.get_vision_interpolation_indices_and_weights(
            grids, family.vision.positions_side, align_corners=True, spatial_merge_size=merge
        )
        inputs["interp_indices"], inputs["interp_weights"] = taps
    return inputs


def halved_twice(frames: int) -> int:
    """What two strides of 2 leave of so many mel frames."""
    return ((frames - 1) // 2 - 1) // 2 + 1


def _of_sounds(family: MediaFamily, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Of sounds (n, mel bins, frames), of which the first `lengths` (n,) frames are sound."""
    kind = family.model_type.removesuffix("_thinker")
    counts = [int(length) for length in lengths]
    if kind == "qwen2_audio":
        heard = (lengths - 1) // 2 + 1
        places = [k * (CLIP_FRAMES // 4) + torch.arange(halved_twice(count)) for k, count in enumerate(counts)]
        return {"valid_indices": torch.cat(places), "heard": torch.arange(CLIP_FRAMES // 2) < heard[:, None]}
    frames = torch.cat([sound[:, :length] for sound, length in zip(features, counts, strict=True)], dim=1)
    half = HALF_CHUNK[kind]
    if kind == "qwen2_5_omni":
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

        omni: Any = modeling_qwen2_5_omni
        chunks, chunk_lengths = omni.chunk_and_pad_features(frames, lengths, half)
        inputs = {
            "valid_indices": omni.get_valid_indices(chunk_lengths),
            "cu_seqlens": omni.get_audio_cu_seqlens(chunk_lengths),
            "pool_indices": omni.get_pool_indices(lengths),
        }
    else:
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

        omni: Any = modeling_qwen3_omni_moe
        chunks, chunk_lengths = omni.chunk_and_pad_features(frames, lengths, half)
        inputs = {
            "valid_indices": omni.get_valid_indices(chunk_lengths, half),
            "cu_seqlens": omni.get_audio_cu_seqlens(chunk_lengths, lengths, ATTENDED_FRAMES, half),
        }
    return {"padded_feature": chunks, "chunk_lengths": chunk_lengths, **inputs}
