"""Checkpoints that hold more than a text decoder: what of them is loaded, and which weights are whose."""

from __future__ import annotations

import re
from collections.abc import Collection

from qwentune.errors import Problem
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.media import FAMILIES
from qwentune.recipe.schema import Part, Tuning

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
# transformers loads the text decoders of these alone, as causal language models.
LOADED_ALONE = ("qwen3_5", "qwen3_5_moe")

TOWERS = ("visual", "audio_tower")
# Proved to train spread over cards as they do on one. Of Qwen3-VL-MoE transformers turns experts over as it reads them
# where their shape is another one, and takes the shape of a rank's rows for another one always.
SPREAD = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_audio")
# What turns a tower's outputs into embeddings of the language model: beside the tower, or inside it.
PROJECTOR = "multi_modal_projector"
MERGERS = ("merger", "merger_list", "deepstack_merger_list", "proj", "proj1", "proj2", PROJECTOR)
_OF_A_TOWER = re.compile(rf"(?:^|\.)(?:(?:{'|'.join(TOWERS)})\.(?P<child>[a-z_0-9]+)|(?P<beside>{PROJECTOR}))(?:\.|$)")


def loads_towers(model_type: str, *, has_media: bool) -> bool:
    """Whether a checkpoint of that type is loaded with its towers: wherever it has some that can be needed.

    A run on texts alone takes the decoder alone where transformers can load that.
    """
    return model_type in FAMILIES and (has_media or model_type not in LOADED_ALONE)


def part_of(name: str) -> Part:
    """Whose a parameter or module is, by its name in memory; a tower as a whole counts as tower."""
    found = _OF_A_TOWER.search(f"{name}.")
    if found is None:
        return "tower" if name.rpartition(".")[2] in TOWERS else "language"
    return "merger" if found["beside"] or found["child"] in MERGERS else "tower"


def not_adapted(parts: Collection[Part]) -> str:
    """A regular expression that full names of the modules of towers match, but for those of `parts`."""
    tower, merger = "|".join(TOWERS), "|".join(MERGERS)
    if "tower" in parts:
        inside = rf"(?:{tower})\.(?:{merger})(?:\..*)?" if "merger" not in parts else None
    else:
        inside = rf"(?:{tower})(?:\.(?!(?:{merger})(?:\.|$)).*)?" if "merger" in parts else rf"(?:{tower})(?:\..*)?"
    beside = None if "merger" in parts else rf"{PROJECTOR}(?:\..*)?"
    return rf"(?:.*\.)?(?:{'|'.join(each for each in (inside, beside) if each is not None)})"


def tower_remark(spec: ModelSpec) -> str:
    """What of a checkpoint is left out, in words; empty where nothing is."""
    if spec.tower_of in LOADED_ALONE:
        return f"{spec.tower_of}: the vision tower is loaded where rows have media; texts train the decoder alone."
    if spec.tower_of is None or spec.tower_of in FAMILIES:
        return ""
    return f"{spec.tower_of}: the text decoder alone is planned; its tower is neither loaded nor counted."


def training_problems(spec: ModelSpec) -> list[Problem]:
    """Why the model cannot be trained; empty where it can."""
    if spec.tower_of is None or spec.tower_of in FAMILIES:
        return []
    what = f"{spec.tower_of} cannot be trained yet"
    return [Problem("model", what, "`qwentune plan` tells what its text tower would take.")]


def sharding_problem(spec: ModelSpec, sharding: str, *, tuned: bool) -> Problem | None:
    """Why a model whose towers are loaded cannot be spread over cards in that way; None where it can."""
    kind = spec.checkpoint_type
    takes_fsdp2 = kind in SPREAD and not tuned
    if sharding in ("none", "ddp") or (sharding == "fsdp2" and takes_fsdp2):
        return None
    what = f"{kind} is held whole on every card so far"
    if sharding == "fsdp2" and kind in SPREAD:
        what = f"towers and mergers of {kind} stay whole, so they cannot be trained"
    fix = "fsdp2, single or ddp" if takes_fsdp2 else "single or ddp, and LoRA or QLoRA"
    return Problem("hardware.launch", f"{sharding}: {what}", f"Leave it at auto, or take {fix}.")


def part_problems(spec: ModelSpec, tuning: Tuning, *, has_media: bool, sharding: str) -> list[Problem]:
    """What of a recipe its towers do not allow: to be trained where none is loaded, or to be spread over cards."""
    has_towers = loads_towers(spec.checkpoint_type, has_media=has_media)
    tuned = (tuning.towers, tuning.merger) != ("frozen", "frozen")
    if has_towers and (problem := sharding_problem(spec, sharding, tuned=tuned)):
        return [problem]
    why = f"{spec.id} reads text only"
    if spec.checkpoint_type in FAMILIES:
        why = "no row has a picture, a video or a sound"
    asked = {"towers": tuning.towers, "merger": tuning.merger}
    return [
        Problem(f"tuning.{key}", f"{how}, but {why}", f"Leave it out, or use tuning.{key}=frozen.")
        for key, how in asked.items()
        if how != "frozen" and not (has_towers and has_media)
    ]
