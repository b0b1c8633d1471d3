"""Checkpoints that hold more than a text decoder: which decoder their text tower is, and whether it can be trained."""

from __future__ import annotations

from qwentune.errors import Problem
from qwentune.facts.architecture import ModelSpec

# The layers of a tower are those of the decoder; only its position ids have three axes.
DECODERS = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen2_audio": "qwen2",
    "qwen2_5_omni": "qwen2",
    "qwen2_5_omni_thinker": "qwen2",
    "qwen3_omni_moe": "qwen3_moe",
    "qwen3_omni_moe_thinker": "qwen3_moe",
    "qwen3_asr": "qwen3",
}
# transformers loads the text towers of these alone, as causal language models.
_LOADED_ALONE = ("qwen3_5", "qwen3_5_moe")


def tower_remark(spec: ModelSpec) -> str:
    """What of a checkpoint is described, in words; empty where it holds a text decoder alone."""
    if spec.tower_of is None:
        return ""
    use = "planned and trained" if spec.tower_of in _LOADED_ALONE else "planned"
    return f"{spec.tower_of}: the text tower alone is {use}; the vision tower is neither loaded nor counted."


def training_problems(spec: ModelSpec) -> list[Problem]:
    """Why the model cannot be trained; empty where it can."""
    if spec.tower_of is None or spec.tower_of in _LOADED_ALONE:
        return []
    what = f"{spec.tower_of} cannot be trained yet: its text tower is not loaded without its vision tower"
    return [Problem("model", what, "`qwentune plan` tells what its text tower would take.")]
