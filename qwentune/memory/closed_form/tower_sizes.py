"""How many parameters of towers are there, and how many of them are trained."""

from __future__ import annotations

from collections.abc import Iterable

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.tower_spec import AudioTower, TowerSpec, VisionTower
from qwentune.memory.settings import Settings, TowerTuning


def tower_weight_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of what sees and hears where it is loaded, which no kind of tuning quantises."""
    if settings.towers is None or spec.tower is None:
        return 0
    return settings.weight_bytes * spec.tower.parameters


def tuned_tower_parameters(spec: ModelSpec, settings: Settings) -> int:
    """Parameters of towers and mergers that receive gradients, adapters on them included."""
    return copied_tower_parameters(spec, settings) + _own_parameters(spec, settings)


def copied_tower_parameters(spec: ModelSpec, settings: Settings) -> int:
    """What stands beside the towers' own weights: adapters, and the copies that PEFT trains of whole modules."""
    if settings.towers is None or spec.tower is None or settings.kind == "full":
        return 0
    adapters = _of_kind(settings, "adapters", *_fans(spec.tower))
    return settings.rank * adapters + _of_kind(settings, "trained", *_trainable(spec.tower))


def _own_parameters(spec: ModelSpec, settings: Settings) -> int:
    if settings.towers is None or spec.tower is None or settings.kind != "full":
        return 0
    return _of_kind(settings, "trained", *_trainable(spec.tower))


def _of_kind(settings: Settings, kind: TowerTuning, body: int, merger: int) -> int:
    assert settings.towers is not None
    return (body if settings.towers.body == kind else 0) + (merger if settings.towers.merger == kind else 0)


def _trainable(tower: TowerSpec) -> tuple[int, int]:
    """Parameters of bodies and of mergers that can be trained at all."""
    constant = 0 if tower.audio is None else tower.audio.frozen_parameters
    return tower.body_parameters - constant, tower.merger_parameters


def _fans(tower: TowerSpec) -> tuple[int, int]:
    """Inputs and outputs together of all linear modules, of bodies and of mergers."""
    body = merger = 0
    if (vision := tower.vision) is not None:
        body += vision.depth * _sum(vision.block_linear_fans.values())
        merger += (1 + len(vision.deepstack)) * _sum(_merger_fans(vision))
    if (audio := tower.audio) is not None:
        folded = -(-audio.mel_bins // 8) * audio.downsample
        body += audio.depth * _sum(audio.linear_fans.values()) + (folded + audio.hidden_size if folded else 0)
        merger += _sum(_projector_fans(audio))
    return body, merger


def _merger_fans(vision: VisionTower) -> list[tuple[int, int]]:
    wide = vision.merged_size
    return [(wide, wide), (wide, vision.out_size)]


def _projector_fans(audio: AudioTower) -> list[tuple[int, int]]:
    hidden = audio.hidden_size
    return [*([(hidden, hidden)] if audio.downsample else []), (hidden, audio.out_size)]


def _sum(fans: Iterable[tuple[int, int]]) -> int:
    return sum(fan_in + fan_out for fan_in, fan_out in fans)
