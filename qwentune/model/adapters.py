"""Low-rank adapters around a frozen base, new or continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qwentune.facts.media import FAMILIES
from qwentune.facts.towers import TOWERS, Part, not_adapted, part_of
from qwentune.model.hollow import refuse_other_adapter
from qwentune.model.loading import DTYPES
from qwentune.model.part_names import named_for
from qwentune.model.senses import is_trainable
from qwentune.model.sharded import Shards
from qwentune.model.trained_rows import lay_over
from qwentune.recipe import Tuning

EXPERTS = {  # as `tuning.targets` names them, and the parameters that hold them
    "gate": "mlp.gate.weight",
    "gate_proj": "mlp.experts.gate_up_proj",
    "up_proj": "mlp.experts.gate_up_proj",
    "down_proj": "mlp.experts.down_proj",
}
FUSED_EXPERTS = ("qwen3_vl_moe", "qwen3_omni_moe_thinker")


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
    tied = bool(getattr(model.config, "tie_word_embeddings", False))  # Qwen2-Audio's does not say
    tokens = list(trained_tokens)
    has_towers = model.config.model_type in FAMILIES
    targets, of_parts = _of_parts(model, tuning) if has_towers else (tuning.targets, {})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        # The plain list form trains no head row on untied models.
        trainable_token_indices=(tokens if tied else {"embed_tokens": tokens, "lm_head": tokens}) if tokens else None,
        **of_parts,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if shards is not None:
        _begin_anew(adapted, shards)
    return _ready(adapted, dtype)


def _of_parts(model: PreTrainedModel, tuning: Tuning) -> tuple[list[str], dict[str, Any]]:
    """Targets and other options of PEFT that keep adapters where they are asked for.

    Never `all-linear`: of a mixture of experts PEFT makes the ends of names of it, and then `0` of a merger is every
    first layer. Qwen3-VL's fused experts are adapted as PEFT adapts Qwen3's, which it knows by name.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    targets = tuning.targets
    if targets == "all-linear":
        fused = EXPERTS if model.config.model_type in FUSED_EXPERTS else ()
        targets = [*dict.fromkeys((*(n.rpartition(".")[2] for n in linear if part_of(n) == "language"), *fused))]
    options: dict[str, Any] = {}
    if model.config.model_type == "qwen3_vl_moe":
        parameters = {EXPERTS[kind] for target in targets if (kind := target.rpartition(".")[2]) in EXPERTS}
        twice = [".*\\.gate_up_proj"] if EXPERTS["up_proj"] in parameters else []
        options["target_parameters"] = sorted(parameters)
        options["rank_pattern"] = dict.fromkeys(twice, 2 * tuning.rank)
        options["alpha_pattern"] = dict.fromkeys(twice, 2 * tuning.alpha)
        targets = [target for target in targets if target.rpartition(".")[2] not in EXPERTS]
    asked: dict[Part, str] = {"tower": tuning.towers, "merger": tuning.merger}
    adapted: list[Part] = [part for part, how in asked.items() if how == "adapters"]
    trained: list[Part] = [part for part, how in asked.items() if how == "trained"]
    options["modules_to_save"] = [*_children_of(model, trained)] or None
    options["exclude_modules"] = not_adapted(adapted)
    return [*targets, *(name for name in linear if part_of(name) in adapted)], options


def _children_of(model: nn.Module, parts: Sequence[Part]) -> Iterator[str]:
    """The full names of the modules that together hold the parameters of these parts, as large as PEFT can copy."""
    found: tuple[str, ...] = ()
    for name, module in model.named_modules():
        is_whole = name.rpartition(".")[2] not in TOWERS and not isinstance(module, nn.ModuleList)
        if is_whole and part_of(name) in parts and not name.startswith(found) and is_trainable(name, module):
            found = (*found, f"{name}.")
            yield name


def load_adapters(model: PreTrainedModel, folder: Path, dtype: str, tuning: Tuning | None = None) -> PeftModel:
    """The model with the adapters of `folder`, trainable, bit for bit as they were saved.

    With `tuning` its alpha and dropout count from now on, instead of those that were saved. Raises ResumeError where
    its tensors are not exactly those of its configuration around this model.
    """
    if not is_deepspeed_zero3_enabled():  # under which no model is hollow; the run has looked before it began
        refuse_other_adapter(model.config, folder)
    with named_for(model.config, folder) as named:
        config: Any = LoraConfig.from_pretrained(str(named))
        if tuning is not None:
            scale = tuning.alpha / config.lora_alpha if config.lora_alpha else 1
            if scale != 1:  # experts' adapters, of which two are fused, have an alpha of their own
                config.alpha_pattern = {name: alpha * scale for name, alpha in config.alpha_pattern.items()}
            config.lora_alpha, config.lora_dropout = tuning.alpha, tuning.dropout
        adapted = PeftModel.from_pretrained(
            model, str(named), config=config, is_trainable=True, autocast_adapter_dtype=False
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
    network: Any = model.get_base_model()
    if network.config.model_type in FAMILIES:  # where layers are recomputed PEFT pulls a tower into the backward pass
        network.disable_input_require_grads()
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):  # which PEFT would save in another order each time
                setattr(config, name, sorted(value))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." not in name:  # which stand in a tower of the base's dtype
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model
