"""The sections of a config.json that say what sees and hears, read and written.

Source of the defaults: the configuration classes of transformers 5.24, which fill in what a file leaves out.
"""

from __future__ import annotations

from typing import Any

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.config_file import ConfigFile
from qwentune.facts.tower_spec import AudioKind, AudioTower, TowerSpec, VisionKind, VisionTower

_KINDS: dict[str, tuple[VisionKind | None, AudioKind | None]] = {
    "qwen2_vl": ("qwen2_vl", None),
    "qwen2_5_vl": ("qwen2_5_vl", None),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), ("qwen3_vl", None)),
    "qwen2_audio": (None, "qwen2_audio"),
    **dict.fromkeys(("qwen2_5_omni", "qwen2_5_omni_thinker"), ("qwen2_5_vl", "qwen2_5_omni")),
    **dict.fromkeys(("qwen3_omni_moe", "qwen3_omni_moe_thinker"), ("qwen3_vl", "qwen3_omni")),
    "qwen3_asr": (None, "qwen3_asr"),
}
_WITHOUT_DEEPSTACK = ("qwen3_5", "qwen3_5_moe")
_DOWNSAMPLING = ("qwen3_omni", "qwen3_asr")


def read_tower(model_type: str, config: ConfigFile, hidden_size: int) -> TowerSpec | None:
    """What a checkpoint sees and hears with, by the sections of its file; None where it has none.

    Args:
        config: What holds the sections: the file, or the thinker's part of an omni model's.
        hidden_size: Width of the text decoder.
    """
    vision_kind, audio_kind = _KINDS.get(model_type, (None, None))
    vision, audio = config.section("vision_config"), config.section("audio_config")
    found = TowerSpec(
        _read_vision(vision_kind, vision, model_type) if vision_kind and vision.values else None,
        _read_audio(audio_kind, audio, hidden_size) if audio_kind and audio.values else None,
    )
    return None if found == TowerSpec() else found


def _read_vision(kind: VisionKind, config: ConfigFile, model_type: str) -> VisionTower:
    number = config.number
    if kind == "qwen2_vl":
        hidden, out = number("embed_dim", 1280), number("hidden_size", 3584)
        inner = hidden * number("mlp_ratio", 4)
    else:
        hidden, out = number("hidden_size", 1152 if kind == "qwen3_vl" else 3584), number("out_hidden_size", 3584)
        inner = number("intermediate_size", 4304 if kind == "qwen3_vl" else 3420)
    windows, is_deep = kind == "qwen2_5_vl", kind == "qwen3_vl" and model_type not in _WITHOUT_DEEPSTACK
    return VisionTower(
        kind=kind,
        depth=number("depth", 27 if kind == "qwen3_vl" else 32),
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=number("num_heads", 16),
        patch=number("patch_size", 16 if kind == "qwen3_vl" else 14),
        out_size=out,
        window=number("window_size", 112) if windows else 0,
        full_attention=config.numbers("fullatt_block_indexes", (7, 15, 23, 31)) if windows else (),
        deepstack=config.numbers("deepstack_visual_indexes", (8, 16, 24)) if is_deep else (),
        num_positions=number("num_position_embeddings", 2304) if kind == "qwen3_vl" else 0,
        merge=number("spatial_merge_size", 2),
        temporal=number("temporal_patch_size", 2),
    )


def _read_audio(kind: AudioKind, config: ConfigFile, hidden_size: int) -> AudioTower:
    number = config.number
    depth, hidden, inner, heads = (24, 1024, 4096, 16) if kind == "qwen3_asr" else (32, 1280, 5120, 20)
    return AudioTower(
        kind=kind,
        depth=number("encoder_layers", depth),
        hidden_size=number("d_model", hidden),
        intermediate_size=number("encoder_ffn_dim", inner),
        num_heads=number("encoder_attention_heads", heads),
        out_size=hidden_size if kind == "qwen2_audio" else number("output_dim", 3584),
        mel_bins=number("num_mel_bins", 128),
        downsample=number("downsample_hidden_size", 480) if kind in _DOWNSAMPLING else 0,
        num_positions=number("max_source_positions", 1500) if kind == "qwen2_audio" else 0,
    )


def tower_sections(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """The sections of the towers as a config.json has them; empty where the model has none."""
    found: dict[str, dict[str, Any]] = {}
    if spec.tower is not None and (vision := spec.tower.vision) is not None:
        found["vision_config"] = _vision_section(vision)
    if spec.tower is not None and (audio := spec.tower.audio) is not None:
        found["audio_config"] = _audio_section(audio)
    return found


def _vision_section(vision: VisionTower) -> dict[str, Any]:
    values: dict[str, Any] = {
        "depth": vision.depth,
        "num_heads": vision.num_heads,
        "patch_size": vision.patch,
        "spatial_merge_size": vision.merge,
        "temporal_patch_size": vision.temporal,
    }
    if vision.kind == "qwen2_vl":
        ratio = vision.intermediate_size // vision.hidden_size
        return values | {"embed_dim": vision.hidden_size, "mlp_ratio": ratio, "hidden_size": vision.out_size}
    values |= {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_size,
    }
    if vision.kind == "qwen2_5_vl":
        return values | {"window_size": vision.window, "fullatt_block_indexes": list(vision.full_attention)}
    deepstack = {"deepstack_visual_indexes": list(vision.deepstack)} if vision.deepstack else {}
    return values | {"num_position_embeddings": vision.num_positions, **deepstack}


def _audio_section(audio: AudioTower) -> dict[str, Any]:
    values: dict[str, Any] = {
        "encoder_layers": audio.depth,
        "d_model": audio.hidden_size,
        "encoder_ffn_dim": audio.intermediate_size,
        "encoder_attention_heads": audio.num_heads,
        "num_mel_bins": audio.mel_bins,
    }
    if audio.kind == "qwen2_audio":
        return values | {"max_source_positions": audio.num_positions}
    values["output_dim"] = audio.out_size
    return values | ({"downsample_hidden_size": audio.downsample} if audio.downsample else {})
