"""Models that see and hear: which class, and how pictures, videos and sounds of a batch reach it.

Transformers' classes take pictures and videos as keywords of their forward. Sounds are embedded here: its own path
counts pads and waits for the GPU, and Qwen2-Audio's reads a row without two pads side by side as one from before 2024.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PreTrainedConfig

from qwentune.data.layout import tower_inputs as made
from qwentune.data.layout.tower_inputs import tower_inputs
from qwentune.facts.media import CLIP_FRAMES, CLIPS_AT_ONCE, FAMILIES, with_positions
from qwentune.facts.towers import PROJECTOR, Part, loads_towers, part_of

# Of an Omni folder the thinker alone is trained; no table of transformers has its class.
THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
HEARD = ("input_features", "feature_lengths", "audio_")
OF_MEDIA = ("pixel_values", "image_", "video_", *HEARD)
UNUSED = "audio_bos_eos_token"  # Qwen2.5-Omni's thinker holds it and never reads it
NO_PICTURE = [[1, 2, 2]]  # the smallest grid
NO_SOUND = 200  # mel frames


def network_config(config: PreTrainedConfig, *, has_media: bool) -> PreTrainedConfig:
    """The configuration of what is loaded of a folder: all that sees, hears and reads, or the text decoder alone."""
    if loads_towers(config.model_type, has_media=has_media):
        return getattr(config, "thinker_config", config)
    text: Any = config.get_text_config()
    if text is not config:  # whether the head is tied is said above both, and transformers looks below
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def network_class(config: PreTrainedConfig) -> Any:
    """The class of a causal language model of that configuration, with towers where it has them."""
    if config.model_type in THINKERS:
        return getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")
    known: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING if config.model_type in FAMILIES else MODEL_FOR_CAUSAL_LM_MAPPING
    return known[type(config)]


def attention_of(config: PreTrainedConfig, implementation: str) -> str | dict[str, str]:
    """What `attn_implementation` says: our kernels are for text, and towers have transformers' own."""
    if config.model_type not in FAMILIES:
        return implementation
    towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    return {"text_config": implementation, **dict.fromkeys(towers, "sdpa")}


def odd_tower(config: PreTrainedConfig) -> str:
    """What of a tower is not as in every published checkpoint, so that its inputs would be wrong; else empty."""
    kind = config.model_type.removesuffix("_thinker")
    wanted: dict[str, dict[str, int]] = {"vision_config": {}, "audio_config": {}}
    if kind in made.HAS_WINDOWS:
        wanted["vision_config"]["window_size"] = made.WINDOW_PIXELS
    if kind in made.HALF_CHUNK:
        wanted["audio_config"]["n_window"] = made.HALF_CHUNK[kind]
    if kind == "qwen3_omni_moe":
        wanted["audio_config"]["n_window_infer"] = made.ATTENDED_FRAMES
    if kind == "qwen2_audio":
        wanted["audio_config"]["max_source_positions"] = CLIP_FRAMES // 2
    for section, values in wanted.items():
        for key, value in values.items():
            if (there := getattr(getattr(config, section), key)) != value:
                return f"{section}.{key} is {there}; {value} is needed"
    return ""


@dataclass(frozen=True)
class Media:
    """The tensors of a batch that are no text, in a wrapping that DDP does not look into: it moves what it finds."""

    tensors: Mapping[str, Tensor]


def media_arguments(batch: dict[str, Tensor]) -> dict[str, Media]:
    """The keyword of a model's forward that brings a batch's media; none where it has none."""
    found = {name: tensor for name, tensor in batch.items() if name.startswith(OF_MEDIA)}
    return {"media": Media(found)} if found else {}


def take_media(network: Any) -> None:
    """Makes the forward of a model with towers take `media`, and run each trained tower whatever the batch has.

    A rank whose batch has no picture would else have no gradient where others wait for one, and one rank alone would
    leave out steps that several take.
    """
    os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # pads are counted when rows are rendered
    forward, senses = network.forward, _Senses(network)

    @wraps(forward)
    def taking(*args: Any, media: Media | None = None, **kwargs: Any) -> Any:
        return forward(*args, **senses.arguments(kwargs, {} if media is None else media.tensors))

    network.forward = taking
    decoder = network.get_decoder()
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = senses.add_deep_features


class _Senses:
    """The towers of a network, and how what a batch has for them goes through."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.config = network.config
        self.family = with_positions(FAMILIES[self.config.model_type], self.config.to_dict())
        self.places: Tensor | None = None  # of the pads of pictures and videos in the row

    def arguments(self, kwargs: dict[str, Any], media: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keywords of transformers' forward for a row and its media."""
        ids: Tensor | None = kwargs.get("input_ids")
        grids = [media[name] for name in ("image_grid_thw", "video_grid_thw") if name in media]
        self.places = None if ids is None or not grids else self._places_of_pictures(ids, grids)
        arguments = {**kwargs, **{name: tensor for name, tensor in media.items() if not name.startswith(HEARD)}}
        missing: list[Tensor] = []
        if torch.is_grad_enabled():
            if not grids and self._is_trained("visual"):
                missing.append(self._no_picture())
            if "input_features" not in media and self._is_trained("audio_tower", PROJECTOR):
                missing.append(self._no_sound())
        if ids is None or not (missing or "input_features" in media):
            return arguments
        embeds = self.network.get_input_embeddings()(ids)
        if "input_features" in media:
            heard = self._heard(media).to(embeds.dtype)
            places = torch.nonzero_static((ids == self.config.audio_token_id).flatten(), size=len(heard))[:, 0]
            embeds = embeds.index_copy(1, places, heard[None])
        for nothing in missing:
            embeds = embeds + nothing.to(embeds.dtype)
        # Ids say where pictures belong; without any, most classes take but one of both.
        return {**arguments, "inputs_embeds": embeds, "input_ids": ids if grids else None}

    def add_deep_features(self, hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """What Qwen3-VL's `_deepstack_process` gives, without looking for the places in the mask of every layer."""
        places = mask.flatten().nonzero()[:, 0] if self.places is None else self.places
        return hidden.index_add(1, places, features[None].to(hidden.dtype))

    def _places_of_pictures(self, ids: Tensor, grids: Sequence[Tensor]) -> Tensor:
        assert self.family.vision is not None
        is_pad = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        count = sum(int(grid.prod(-1).sum()) for grid in grids) // self.family.vision.merge**2
        return torch.nonzero_static(is_pad.flatten(), size=count)[:, 0]

    def _module(self, name: str) -> Any:
        """A tower or projector, as it is now: adapters put others in their places."""
        return getattr(getattr(self.network, "model", self.network), name, None)

    def _is_trained(self, *names: str) -> bool:
        modules = [module for name in names if (module := self._module(name)) is not None]
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def _heard(self, media: Mapping[str, Tensor]) -> Tensor:
        """The embeddings of all sounds, one after another: (pads, H)."""
        tower, projector = self._module("audio_tower"), self._module(PROJECTOR)
        inputs = {name.removeprefix("audio_"): tensor for name, tensor in media.items() if name.startswith("audio_")}
        if projector is None:
            return tower(feature_lens=media["feature_lengths"], **inputs).last_hidden_state
        features = media["input_features"]
        if missing := CLIP_FRAMES - features.shape[-1]:
            features = functional.pad(features, (0, missing))
        counts = [made.halved_twice(int(length)) for length in media["feature_lengths"]]
        places, heard, outputs = inputs["valid_indices"].split(counts), inputs["heard"], list[Tensor]()
        for start in range(0, len(counts), CLIPS_AT_ONCE):
            some = slice(start, start + CLIPS_AT_ONCE)
            states = tower(features[some], attention_mask=heard[some, None, None]).last_hidden_state
            outputs.append(states.flatten(0, 1)[torch.cat(places[some]) - start * states.shape[1]])
        return projector(torch.cat(outputs))

    def _no_picture(self) -> Tensor:
        """What the smallest picture gives, times 0."""
        tower, vision = self._module("visual"), self.family.vision
        assert vision is not None
        grids = torch.tensor(NO_PICTURE)
        patches = torch.zeros(int(grids.prod()), 3 * vision.temporal * vision.patch**2)
        made_of = tower_inputs(self.family, {"image_grid_thw": grids})
        inputs = {name.removeprefix("image_"): tensor for name, tensor in _on(tower.device, made_of).items()}
        outputs = tower(patches.to(tower.device, tower.dtype), grid_thw=grids, **inputs)
        every = [outputs.pooler_output, *(outputs.get("deepstack_features") or ())]
        return torch.cat([each.flatten() for each in every]).sum() * 0

    def _no_sound(self) -> Tensor:
        """What a short silence gives, times 0."""
        assert self.family.hearing is not None
        silence = torch.zeros(1, self.family.hearing.mel_bins, NO_SOUND)
        batch = {"input_features": silence, "feature_lengths": torch.tensor([NO_SOUND])}
        batch |= tower_inputs(self.family, batch)
        return self._heard(_on(self._module("audio_tower").device, batch)).sum() * 0


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor if made.stays_on_cpu(name, tensors) else tensor.to(device) for name, tensor in tensors.items()}


def freeze(network: nn.Module, trained: Collection[Part]) -> None:
    """Stops gradients into the parts of a model with towers that are not trained."""
    for name, module in network.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if part_of(f"{name}.{own}") not in trained or not is_trainable(name, module):
                parameter.requires_grad_(False)


def is_trainable(name: str, module: nn.Module) -> bool:
    """Whether a module has weights that a step can move: some are constants, and one is held and never read."""
    return name.rpartition(".")[2] != UNUSED and any(parameter.requires_grad for parameter in module.parameters())
