"""A config.json that older and newer readers take the same numbers from: the base's own keys, and what became of them.

Transformers 5 holds as `rope_parameters` and `dtype` what stood in `rope_theta`, `rope_scaling` and `torch_dtype`, and
writes the new keys alone; readers of the old ones then fall back to a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPE_KEYS = ("dtype", "torch_dtype")
SECTIONS = ("text_config", "thinker_config")
OLD_KINDS_OF_ROPE = {"mrope": "default"}


def kept_config(base: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The base's config.json with its moved keys in both places; of the dtype that `saved` names, if it names one."""
    dtype = next((saved[key] for key in DTYPE_KEYS if isinstance(saved.get(key), str)), None) if saved else None
    return in_both_places(base if dtype is None else _with_dtype(base, dtype))


def kept_part_config(base: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers wrote of a part of the base's model, loaded alone, with all keys that the base has of it."""
    return in_both_places({**part_of_config(base, saved.get("model_type")), **saved})


def part_of_config(config: Mapping[str, Any], model_type: str | None) -> dict[str, Any]:
    """The section of a config.json that describes a part of this type; empty where none does."""
    for section in (config.get(name) for name in SECTIONS):
        if isinstance(section, dict):
            if section.get("model_type") == model_type:
                return section
            if found := part_of_config(section, model_type):
                return found
    return {}


def in_both_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every section of a config.json with the new keys beside the old ones that it has."""
    both = {
        key: in_both_places(value) if isinstance(value, dict) and not key.startswith("rope_") else value
        for key, value in config.items()
    }
    if "rope_theta" in both and not isinstance(both.get("rope_parameters"), dict):
        scaling: dict[str, Any] = both.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        rope = {key: value for key, value in scaling.items() if key != "type"}
        rope |= {"rope_type": OLD_KINDS_OF_ROPE.get(kind, kind), "rope_theta": both["rope_theta"]}
        if "partial_rotary_factor" in both:
            rope["partial_rotary_factor"] = both["partial_rotary_factor"]
        both["rope_parameters"] = rope
    if "torch_dtype" in both:
        both.setdefault("dtype", both["torch_dtype"])
    return both


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in DTYPE_KEYS if changed.get(key) is not None}
