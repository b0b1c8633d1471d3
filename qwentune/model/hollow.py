"""A model without weights, by which the files of weights are judged before one of them is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel

from qwentune.errors import Problem, ResumeError
from qwentune.facts.adapter_config import ADAPTER_CONFIG, largest_trained_token, read_adapter_config
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter
from qwentune.model.loading import listed, load_model
from qwentune.model.part_names import named_for
from qwentune.model.senses import network_class


def refuse_other_weights(base: Path, adapter: Path | None = None, *, has_media: bool = False) -> None:
    """Raises ResumeError where a tensor of the base, or of the adapter on it, is missing, another, or not its model's.

    Only headers are read, so that it takes a second or two whatever the model's size. UsageError for a config.json of
    which no model can be built.
    """
    model = load_model(base, dtype="fp32", device=torch.device("meta"), has_media=has_media)
    if adapter is not None:
        refuse_other_adapter(model.config, adapter)


def refuse_other_adapter(config: PreTrainedConfig, folder: Path) -> PeftModel:
    """The adapter around this model, without a weight; ResumeError where its tensors are not exactly those."""
    with named_for(config, folder) as named:
        return _refuse_other(config, folder, named)


def _refuse_other(config: PreTrainedConfig, folder: Path, named: Path) -> PeftModel:
    """The adapter as `named` has it; `folder` is the one to speak of."""
    described = read_adapter_config(named)
    stored = {name: tensor.shape for name, tensor in read_adapter(named).items()}
    path, vocabulary = folder / ADAPTER_CONFIG, int(config.get_text_config().vocab_size)
    if (token := largest_trained_token(described)) >= vocabulary:
        what = f"trains the row of token {token}, but the model has {vocabulary} rows"
        raise ResumeError(Problem(f"{path}: trainable_token_indices", what))
    try:
        adapted = _adapted(config, named)
        state: dict[str, Any] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # whatever PEFT raises over it, this file was what it read
        what = f"PEFT makes no adapter of it: {type(error).__name__}: {str(error)[:300]}"
        raise ResumeError(Problem(str(path), what, "Name an adapter of this base model.")) from None
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if problems := _differences(stored, expected, folder / ADAPTER_WEIGHTS):
        raise ResumeError(problems, "This adapter is broken, or belongs to another base model.")
    return adapted


def _adapted(config: PreTrainedConfig, folder: Path) -> PeftModel:
    lora: Any = LoraConfig.from_pretrained(str(folder))
    lora.init_lora_weights = False  # which needs weights for some kinds, and changes no shape
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = network_class(config)._from_config(config)
        return cast(PeftModel, get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True))


def _differences(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], file: Path
) -> list[Problem]:
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    misshapen = [
        f"{name} {list(stored[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    kept = [name for name in extra if name.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight"))]
    if kept:  # as PEFT saves them where they are adapted, unless it is told not to
        fix = "Save it again with save_embedding_layers=False: the base has these weights, and they must not change."
        what = f"brings weights of the base along: {listed(kept)}"
        return [Problem(str(file), what, fix)]
    kinds = {"are missing": missing, "have no place in the model": extra, "are of another shape": misshapen}
    return [
        Problem(str(file), f"{len(names)} tensors {what}: {listed(names)}") for what, names in kinds.items() if names
    ]
