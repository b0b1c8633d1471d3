"""Adapters into weights: merged into the base's own files, never into a live 4-bit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qwentune.console import busy
from qwentune.exporting.changes import merged_tensors
from qwentune.exporting.processors import is_whole
from qwentune.exporting.tensors import ModelTensor, write_tensors
from qwentune.facts.weight_files import read_weights
from qwentune.model.hollow import refuse_other_adapter, refuse_other_weights
from qwentune.model.loading import load_model, read_config
from qwentune.model.senses import network_class


@busy("loading the weights")
def load_tuned(
    base: Path,
    adapter: Path | None,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | None = None,
    four_bit: bool = False,
) -> PreTrainedModel:
    """The tuned model in the dtype of its files or another: adapters, where there are any, on the unquantised base.

    `four_bit`: the base, or what full tuning made of it, in 4 bits. Raises ResumeError where a tensor of either is
    missing, another, or not the model's.
    """
    has_media = adapter is None or is_whole(adapter)
    refuse_other_weights(base, adapter, has_media=has_media)
    model: Any
    if four_bit:
        model = load_model(base, dtype="bf16", four_bit=True, device=device, has_media=has_media)
    else:
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if device is not None and device.type != "cpu":
            options["device_map"] = {"": device}  # else the host would hold all of it first
        config = read_config(base, has_media=has_media)
        model = network_class(config).from_pretrained(base, config=config, use_safetensors=True, **options)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    return model.eval()


@busy("merging the adapter")
def merge(base: Path, adapter: Path, target: Path) -> None:
    """Writes the weights of the base with the adapter merged in, under the base's names, in its files and dtypes.

    Raises ResumeError where the two do not fit, or where a merged weight would not be finite.
    """
    tensors = tuned_tensors(base, adapter)
    write_tensors(tensors, read_weights(base), target)


def tuned_tensors(base: Path, adapter: Path) -> dict[str, ModelTensor]:
    """The base's tensors by name, each as the adapter makes it; nothing of them is read yet. Raises as `merge`."""
    has_media = is_whole(adapter)
    refuse_other_weights(base, has_media=has_media)
    config = read_config(base, has_media=has_media)
    adapted = refuse_other_adapter(config, adapter)
    return merged_tensors(
        read_weights(base), adapted, adapter, tied=bool(getattr(config, "tie_word_embeddings", False))
    )


def largest_logit_difference(
    first: PreTrainedModel, second: PreTrainedModel, prompts: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
    """The largest difference of two models' logits over the prompts, and the first's largest logit; NaN stays NaN.

    Prompts are the keywords of a forward; the models may stand on two devices.
    """
    differences, sizes = [], []
    with torch.no_grad():
        for prompt in prompts:
            logits, others = (model(**_as_taken(model, prompt)).logits.float().cpu() for model in (first, second))
            differences.append((logits - others).abs().max())
            sizes.append(logits.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def _as_taken(model: PreTrainedModel, prompt: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prompt on the model's device; what towers see and hear in the dtype of their weights."""
    dtypes = {name: model.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in prompt.items()}
    return {name: tensor.to(model.device, dtypes[name]) for name, tensor in prompt.items()}
