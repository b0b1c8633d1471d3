"""Architectures whose examples do not stay apart where they share a row."""

from __future__ import annotations

from qwentune.errors import Problem

_ROTARY = "its position ids are not reset where the next example of a row begins"
_RECURRENT = (
    "its linear attention reads on from one example of a row into the next; to stop there it needs cu_seqlens and the "
    "kernels of causal-conv1d and flash-linear-attention, which qwentune does not use yet"
)

# By model type, of a whole model or of its text tower. tests/test_pack.py measures what leaks. As whole models Qwen2-VL
# and 2.5-VL are told where examples begin, as by their position ids alone they are not.
_REASONS = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _ROTARY),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _RECURRENT),
}


def packing_problems(model_type: str) -> list[Problem]:
    """Why a model of this type cannot be given packed rows, and how to go without them; empty where it can."""
    if (reason := _REASONS.get(model_type)) is None:
        return []
    return [Problem("data.packing", f"{model_type} cannot train on packed rows: {reason}", "data.packing=false")]
