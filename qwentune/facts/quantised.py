"""Checkpoints published in fewer than 16 bits: they cannot be trained, what they were made of can."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import cast

from qwentune.errors import Problem
from qwentune.facts.architecture import ModelSpec

# How hub ids say it, behind the name of what was quantised: Qwen3-8B-FP8, Qwen2.5-7B-Instruct-GPTQ-Int4, …-MLX-4bit.
_WORDS = r"fp8|nvfp4|mxfp[48]|awq|gptq|gguf|mlx|bnb|int[2-8]|[2-8]-?bit|w\d+a\d+|q[2-8](_\w+)?|exl[23]|quantized"
_SUFFIX = re.compile(rf"[-_.](unsloth[-_.])?(?P<method>{_WORDS})(?=[-_.]|$).*", re.IGNORECASE)
_KEYS = ("quantization_config", "quantization")  # of a config.json; the second is MLX's
# What two sizes of a family differ in, and all checkpoints of a size have in common.
_SHAPE = tuple(
    field.name for field in fields(ModelSpec) if field.name not in ("id", "kind", "licence", "source", "max_positions")
)


def quantised_name(model: str, models: Mapping[str, ModelSpec]) -> Problem | None:
    """Why a hub id or a file of such a name is no model to train, with its 16-bit checkpoint where that is known."""
    found = _SUFFIX.search(_last_part(model))
    if found is None:
        return None
    name = _of_name(model, models)
    what = f"'{model}' holds quantised weights ({found['method'].upper()}), which cannot be trained"
    return Problem("model", what, _way_out(name))


def quantised_config(
    where: str, config: Mapping[str, object], spec: ModelSpec | None, models: Mapping[str, ModelSpec]
) -> Problem | None:
    """Why a checkpoint with that config.json, which lies in `where`, cannot be trained; None where it can.

    Its 16-bit checkpoint is told by the name that the file gives, else by the shape and the way of answering of `spec`.
    """
    key = next((key for key in _KEYS if config.get(key)), None)
    if key is None:
        return None
    given = config[key]
    values = cast("dict[str, object]", given) if isinstance(given, dict) else {"quant_method": given}
    bits = values.get("bits") or (4 if values.get("load_in_4bit") else None)
    method = str(values.get("quant_method") or ("MLX" if key == "quantization" else "unknown"))[:40].upper()
    named = f"{method}, {bits} bits" if isinstance(bits, int) else method
    what = f"the weights are quantised ({named}): a gradient through them is wrong, or there is none"
    name = _of_name(str(config.get("_name_or_path", "")), models) or _of_shape(spec, models)
    return Problem(f"{where}: {key}", what, _way_out(name))


def _way_out(name: str | None) -> str:
    way = f"Take the 16-bit checkpoint: model: {name}" if name else "Take the 16-bit checkpoint that it was made of"
    return f"{way}. With tuning.kind=qlora it is quantised to 4 bits while it loads."


def _of_name(model: str, models: Mapping[str, ModelSpec]) -> str | None:
    """The listed checkpoint whose quantised copy has that name, whoever made the copy."""
    plain = _SUFFIX.sub("", _last_part(model)).lower()
    return next((name for name in models if name.rpartition("/")[2].lower() == plain), None)


def _last_part(model: str) -> str:
    return model.replace("\\", "/").rpartition("/")[2]


def _of_shape(spec: ModelSpec | None, models: Mapping[str, ModelSpec]) -> str | None:
    """The one listed checkpoint of that shape that answers in that way; None where there are several, or none."""
    if spec is None:
        return None
    alike = [
        name
        for name, known in models.items()
        if known.kind == spec.kind and all(getattr(known, part) == getattr(spec, part) for part in _SHAPE)
    ]
    return alike[0] if len(alike) == 1 else None
