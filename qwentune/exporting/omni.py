"""An Omni checkpoint: what reads and answers is tuned alone, and servers take only the whole."""

from __future__ import annotations

from pathlib import Path

from qwentune.facts.documents import read_object

OMNI = ("qwen2_5_omni", "qwen3_omni_moe")


def is_omni(folder: Path) -> bool:
    """Whether a folder holds a thinker and what speaks."""
    return read_object(folder / "config.json").get("model_type") in OMNI


def is_thinker(folder: Path) -> bool:
    """Whether a folder holds the weights of a thinker alone."""
    return str(read_object(folder / "config.json", optional=True).get("model_type")).endswith("_thinker")
