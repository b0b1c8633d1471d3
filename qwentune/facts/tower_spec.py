"""The dimensions of the towers that see and hear, and the parameter counts that follow from them.

Source: the model classes of transformers 5.24, whose parameters on the meta device are as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

VisionKind: TypeAlias = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
AudioKind: TypeAlias = Literal["qwen2_audio", "qwen2_5_omni", "qwen3_omni", "qwen3_asr"]


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A tower of `depth` blocks over patches, and its merger, which makes one token of `merge`² patches.

    `kind` is the family whose blocks it has: layer norms and one wide layer (`qwen2_vl`), RMS norms, a gated
    feed-forward block and attention within windows of so many pixels (`qwen2_5_vl`), or layer norms, a learned table
    of `num_positions` and more mergers after the blocks in `deepstack` (`qwen3_vl`).
    """

    kind: VisionKind
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch: int
    out_size: int
    window: int = 0
    full_attention: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()
    num_positions: int = 0
    merge: int = 2
    temporal: int = 2

    @property
    def patch_values(self) -> int:
        """Values of one patch: colours, frames and pixels."""
        return 3 * self.temporal * self.patch**2

    @property
    def merged_size(self) -> int:
        """Width of the patches of one token together."""
        return self.merge**2 * self.hidden_size

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block has a gate, and norms no bias."""
        return self.kind == "qwen2_5_vl"

    @property
    def block_linear_fans(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear module of a block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        names = ("gate_proj", "up_proj", "down_proj") if self.is_gated else ("fc1", "fc2")
        attention = {"qkv": (hidden, 3 * hidden), "proj": (hidden, hidden)}
        return attention | {name: (inner, hidden) if name == names[-1] else (hidden, inner) for name in names}

    @property
    def block_parameters(self) -> int:
        """Weights, biases and norms of one block."""
        norms = (2 if self.is_gated else 4) * self.hidden_size
        return norms + sum((fan_in + 1) * fan_out for fan_in, fan_out in self.block_linear_fans.values())

    @property
    def outer_parameters(self) -> int:
        """The patch embedding and the table of positions."""
        bias = self.hidden_size if self.kind == "qwen3_vl" else 0
        return (self.patch_values + self.num_positions) * self.hidden_size + bias

    @property
    def merger_parameters(self) -> int:
        """The merger, and those after the deepstack's blocks."""
        wide = self.merged_size
        linear = (wide + 1) * wide + (wide + 1) * self.out_size
        norm = (1 if self.is_gated else 2) * self.hidden_size
        return norm + linear + len(self.deepstack) * (2 * wide + linear)

    @property
    def body_parameters(self) -> int:
        """All but the mergers."""
        return self.outer_parameters + self.depth * self.block_parameters


@dataclass(frozen=True, slots=True)
class AudioTower:
    """An encoder of `depth` layers over mel frames of `mel_bins`, and what makes tokens of its states.

    Before the layers stand convolutions: two along time, which halve the frames, or three in two dimensions with
    `downsample` channels (0: the former). `num_positions` counts the rows of a table that is a weight.
    """

    kind: AudioKind
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_size: int
    mel_bins: int = 128
    downsample: int = 0
    num_positions: int = 0

    @property
    def linear_fans(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear module of a layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (hidden, hidden))
        return attention | {"fc1": (hidden, inner), "fc2": (inner, hidden)}

    @property
    def block_parameters(self) -> int:
        """Weights, biases and norms of one layer."""
        missing = 0 if self.downsample else self.hidden_size  # keys have no bias, as in Whisper
        return 4 * self.hidden_size - missing + sum((a + 1) * b for a, b in self.linear_fans.values())

    @property
    def outer_parameters(self) -> int:
        """Convolutions, the table of positions and the last norm."""
        hidden, channels = self.hidden_size, self.downsample
        total = self.num_positions * hidden + 2 * hidden
        if channels:
            folded = -(-self.mel_bins // 8) * channels
            return total + 9 * channels + channels + 2 * (9 * channels + 1) * channels + folded * hidden
        marks = 2 * self.out_size if self.kind == "qwen2_5_omni" else 0
        return total + (3 * self.mel_bins + 1) * hidden + (3 * hidden + 1) * hidden + marks

    @property
    def merger_parameters(self) -> int:
        """The linear modules that make the text decoder's width."""
        hidden = self.hidden_size
        between = (hidden + 1) * hidden if self.downsample else 0
        return between + (hidden + 1) * self.out_size

    @property
    def body_parameters(self) -> int:
        """All but the last linear modules."""
        return self.outer_parameters + self.depth * self.block_parameters

    @property
    def frozen_parameters(self) -> int:
        """Of the body, what never receives gradients."""
        return self.num_positions * self.hidden_size


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """What of a checkpoint sees and what hears."""

    vision: VisionTower | None = None
    audio: AudioTower | None = None

    @property
    def body_parameters(self) -> int:
        """Parameters of the towers without their mergers."""
        return sum(tower.body_parameters for tower in (self.vision, self.audio) if tower is not None)

    @property
    def merger_parameters(self) -> int:
        """Parameters of the mergers."""
        return sum(tower.merger_parameters for tower in (self.vision, self.audio) if tower is not None)

    @property
    def parameters(self) -> int:
        """All parameters beside the text decoder's."""
        return self.body_parameters + self.merger_parameters
