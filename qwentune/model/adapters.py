"""Low-rank adapters around a frozen base, new or continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qwentune.model.hollow import refuse_other_adapter
from qwentune.model.loading import DTYPES
from qwentune.model.sharded import Shards
from qwentune.model.trained_rows import lay_over
from qwentune.recipe import Tuning


def add_adapters(
    model: PreTrainedModel,
    tuning: Tuning,
    dtype: str,
    trained_tokens: Sequence[int] = (),
    shards: Shards | None = None,
) -> PeftModel:
    """The model with new adapters; `trained_tokens` are ids whose embedding and head rows are trained too.

    A base model never learnt the rows of its chat tokens, and adapters on the projections alone leave them so: it
    would never stop.
    """
    tied = bool(model.config.tie_word_embeddings)
    tokens = list(trained_tokens)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        # The plain list form trains no head row on untied models.
        trainable_token_indices=(tokens if tied else {"embed_tokens": tokens, "lm_head": tokens}) if tokens else None,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if shards is not None:
        _begin_anew(adapted, shards)
    return _ready(adapted, dtype)


def load_adapters(model: PreTrainedModel, folder: Path, dtype: str, tuning: Tuning | None = None) -> PeftModel:
    """The model with the adapters of `folder`, trainable, bit for bit as they were saved.

    With `tuning` its alpha and dropout count from now on, instead of those that were saved. Raises ResumeError where
    its tensors are not exactly those of its configuration around this model.
    """
    if not is_deepspeed_zero3_enabled():  # under which no model is hollow; the run has looked before it began
        refuse_other_adapter(model.config, folder)
    config: Any = LoraConfig.from_pretrained(str(folder))
    if tuning is not None:
        scale = tuning.alpha / config.lora_alpha if config.lora_alpha else 1
        if scale != 1:  # experts' adapters, of which two are fused, have an alpha of their own
            config.alpha_pattern = {name: alpha * scale for name, alpha in config.alpha_pattern.items()}
        config.lora_alpha, config.lora_dropout = tuning.alpha, tuning.dropout
    adapted = PeftModel.from_pretrained(
        model, str(folder), config=config, is_trainable=True, autocast_adapter_dtype=False
    )
    return _ready(adapted, dtype)


def _begin_anew(model: PeftModel, shards: Shards) -> None:
    """Lets PEFT derive anew what it took from hollow weights: DoRA's norms, and the rows of trained tokens."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_magnitude_vector:
            with shards.whole(layer.get_base_layer()):
                for name, variant in layer.lora_variant.items():
                    variant.init(layer, name)
        elif isinstance(layer, TrainableTokensLayer):
            with shards.whole(layer.get_base_layer()):
                for name, tokens in layer.token_indices.items():
                    layer.update_layer(name, token_indices=tokens, tied_adapter=layer.tied_adapter)


def _ready(model: PeftModel, dtype: str) -> PeftModel:
    lay_over(model)
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):  # which PEFT would save in another order each time
                setattr(config, name, sorted(value))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model
