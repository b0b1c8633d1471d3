"""The table of Qwen checkpoints that see or hear: a text decoder of the other table with towers.

Sources, beside those of the other table:
  transformers  the default values of its configuration classes, 5.24
  torchtitan    pytorch/torchtitan experiments/qwen3_vl@0375bb67 (2B, 8B, 30B-A3B, 235B-A22B), models/qwen3_5@0276e6ed
  maxtext       AI-Hypercomputer/maxtext@e591f30c (Qwen3-VL 2B, 4B, 30B; Qwen3-Omni)
  swift         modelscope/ms-swift@3602360a swift/model/models/qwen.py (hub ids)
  asr           ivan-digital/qwen3-asr-swift docs/asr-model.md
  quoted        config.json files as quoted in public code
"unverified" marks what none of them states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qwentune.facts.architecture import Kind, ModelSpec
from qwentune.facts.published import MODELS as TEXT_MODELS
from qwentune.facts.tower_spec import AudioTower, TowerSpec, VisionTower

# fmt: off
_FULL_ATTENTION = (7, 15, 23, 31)
_POSITIONS_3 = 2304  # 48 x 48


def _vision_2(out_size: int) -> VisionTower:
    return VisionTower("qwen2_vl", 32, 1280, 5120, 16, 14, out_size)


def _vision_2_5(out_size: int, intermediate_size: int = 3420) -> VisionTower:
    return VisionTower("qwen2_5_vl", 32, 1280, intermediate_size, 16, 14, out_size, 112, _FULL_ATTENTION)


def _vision_3(out_size: int, is_deep: bool = True, size: str = "large") -> VisionTower:
    depth, hidden, inner, heads, deepstack = {
        "tiny": (12, 768, 3072, 12, ()), "small": (24, 1024, 4096, 16, (5, 11, 17)),
        "large": (27, 1152, 4304, 16, (8, 16, 24)),
    }[size]
    return VisionTower("qwen3_vl", depth, hidden, inner, heads, 16, out_size,
                       deepstack=deepstack if is_deep else (), num_positions=_POSITIONS_3)


def _vision_3_5(model: str, out_size: int) -> VisionTower:
    size = "tiny" if "-0.8B" in model else "small" if "-2B" in model or "-4B" in model else "large"
    return _vision_3(out_size, is_deep=False, size=size)


def _spec(
    name: str, text: str, model_type: str, tower: TowerSpec, source: str, *, kind: Kind = "chat", **changes: object,
) -> ModelSpec:
    """A checkpoint whose text decoder has the dimensions of another one."""
    decoder = TEXT_MODELS[f"Qwen/{text}"]
    spec = replace(decoder, id=f"Qwen/{name}", kind=kind, tower=tower, tower_of=model_type, source=source)
    return replace(spec, **changes)  # pyright: ignore[reportArgumentType]


def _vl_2() -> Iterator[ModelSpec]:
    kinds: Mapping[str, Kind] = {"": "base", "-Instruct": "chat"}
    source = "dims transformers, quoted; ids swift; positions quoted, unverified for the base models"
    for size, text in (("2B", "1.5B"), ("7B", "7B"), ("72B", "72B")):
        tower = TowerSpec(_vision_2(TEXT_MODELS[f"Qwen/Qwen2-{text}"].hidden_size))
        for suffix, kind in kinds.items():
            yield _spec(f"Qwen2-VL-{size}{suffix}", f"Qwen2-{text}", "qwen2_vl", tower, source, kind=kind,
                        max_positions=32768)
    tower = TowerSpec(_vision_2(8192))
    yield _spec("QVQ-72B-Preview", "Qwen2-72B", "qwen2_vl", tower, "dims as Qwen2-VL-72B, unverified; ids swift",
                licence="Qwen", max_positions=32768)
    for size, licence in (("3B", "Qwen Research"), ("7B", "Apache-2.0"), ("32B", "Apache-2.0"), ("72B", "Qwen")):
        inner = 3420 if size in ("3B", "7B") else 3456
        tower = TowerSpec(_vision_2_5(TEXT_MODELS[f"Qwen/Qwen2.5-{size}"].hidden_size, inner))
        yield _spec(f"Qwen2.5-VL-{size}-Instruct", f"Qwen2.5-{size}", "qwen2_5_vl", tower,
                    "dims quoted (72B's tower and the licences unverified); ids swift", licence=licence,
                    max_positions=128000)


def _vl_3() -> Iterator[ModelSpec]:
    texts = {"2B": "1.7B", "4B": "4B", "8B": "8B", "32B": "32B", "30B-A3B": "30B-A3B", "235B-A22B": "235B-A22B"}
    for size, text in texts.items():
        hidden = TEXT_MODELS[f"Qwen/Qwen3-{text}"].hidden_size
        tower = TowerSpec(_vision_3(hidden, size="small" if size in ("2B", "4B") else "large"))
        source = "dims " + ("torchtitan, maxtext" if size != "32B" else "unverified") + "; ids swift"
        for suffix, kind in (("Instruct", "chat"), ("Thinking", "thinking")):
            yield _spec(f"Qwen3-VL-{size}-{suffix}", f"Qwen3-{text}", "qwen3_vl_moe" if "-A" in size else "qwen3_vl",
                        tower, source, kind=kind, rope_theta=5e6, max_positions=262144)  # pyright: ignore[reportArgumentType]


def _audio_and_omni() -> Iterator[ModelSpec]:
    audio = AudioTower("qwen2_audio", 32, 1280, 5120, 20, 4096, num_positions=1500)
    kinds: Mapping[str, Kind] = {"": "base", "-Instruct": "chat"}
    for suffix, kind in kinds.items():
        yield _spec(f"Qwen2-Audio-7B{suffix}", "Qwen1.5-7B", "qwen2_audio", TowerSpec(audio=audio),
                    "dims quoted, transformers; ids swift", kind=kind, vocab_rows=156032, max_positions=8192,
                    rope_theta=1e4, licence="Apache-2.0")
    for size, licence in (("3B", "Qwen Research (unverified)"), ("7B", "Apache-2.0")):
        hidden = TEXT_MODELS[f"Qwen/Qwen2.5-{size}"].hidden_size
        tower = TowerSpec(_vision_2_5(hidden), AudioTower("qwen2_5_omni", 32, 1280, 5120, 20, hidden))
        yield _spec(f"Qwen2.5-Omni-{size}", f"Qwen2.5-{size}", "qwen2_5_omni", tower,
                    "dims transformers, quoted (of the 3B whether the head is tied unverified); ids swift",
                    licence=licence, tied=False, max_positions=32768)
    tower = TowerSpec(_vision_3(2048), AudioTower("qwen3_omni", 32, 1280, 5120, 20, 2048, downsample=480))
    for suffix, kind in (("Instruct", "chat"), ("Thinking", "thinking"), ("Captioner", "chat")):
        yield _spec(f"Qwen3-Omni-30B-A3B-{suffix}", "Qwen3-30B-A3B", "qwen3_omni_moe", tower,
                    "dims maxtext, transformers; ids swift", kind=kind, vocab_rows=152064, max_positions=65536)  # pyright: ignore[reportArgumentType]
    for size, text, tower in (
        ("0.6B", "0.6B", AudioTower("qwen3_asr", 18, 896, 3584, 14, 1024, downsample=480)),
        ("1.7B", "1.7B", AudioTower("qwen3_asr", 24, 1024, 4096, 16, 2048, downsample=480)),
    ):
        yield _spec(f"Qwen3-ASR-{size}-hf", f"Qwen3-{text}", "qwen3_asr", TowerSpec(audio=tower),
                    "dims asr, transformers; the id of the 0.6B unverified", max_positions=65536)


def _with_tower(spec: ModelSpec) -> ModelSpec:
    """Qwen3.5 and later see too; a run on text alone leaves their tower out."""
    if spec.tower_of is None:
        return spec
    return replace(spec, tower=TowerSpec(_vision_3_5(spec.id, spec.hidden_size)))
# fmt: on


MODELS: Mapping[str, ModelSpec] = {
    spec.id: spec for spec in (*map(_with_tower, TEXT_MODELS.values()), *_vl_2(), *_vl_3(), *_audio_and_omni())
}
"""Every known checkpoint by its full hub id (`Qwen/...`) or `builtin:` name."""

_REMOTE = "runs code that lies beside its weights, which qwentune never does. Take "
NOT_TAKEN: Mapping[str, str] = {
    **dict.fromkeys(
        ("Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"), _REMOTE + "Qwen/Qwen2.5-VL-7B-Instruct or Qwen/Qwen3-VL-8B-Instruct."
    ),
    **dict.fromkeys(("Qwen/Qwen-Audio", "Qwen/Qwen-Audio-Chat"), _REMOTE + "Qwen/Qwen2-Audio-7B-Instruct."),
}
"""Why checkpoints of the first generation are not taken, and what to take instead."""
