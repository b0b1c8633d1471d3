"""Adapters into weights: merged into a freshly loaded base, never into a live 4-bit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qwentune.console import busy
from qwentune.exporting.processors import is_whole
from qwentune.facts.documents import read_object
from qwentune.facts.weight_files import read_weights
from qwentune.model.hollow import refuse_other_weights
from qwentune.model.loading import read_config
from qwentune.model.senses import network_class


@busy("loading the weights")
def load_tuned(base: Path, adapter: Path | None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The tuned model in the dtype of its files or another: adapters, where there are any, on the unquantised base.

    Raises ResumeError where a tensor of either is missing, another, or not the model's.
    """
    has_media = adapter is None or is_whole(adapter)
    refuse_other_weights(base, adapter, has_media=has_media)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    config = read_config(base, has_media=has_media)
    model: Any = network_class(config).from_pretrained(base, config=config, use_safetensors=True, **options)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    return model.eval()


def merge_bytes(base: Path) -> int:
    """Bytes of host memory that `merge` takes: the base in fp32, and its largest tensor once more."""
    sizes = [prod(tensor.shape) for tensor in read_weights(base).values()]
    return 4 * (sum(sizes) + max(sizes, default=0))


@busy("merging the adapter")
def merge(base: Path, adapter: Path, target: Path) -> None:
    """Writes the base with the adapters merged in, as safetensors in the base's dtype.

    The sums are made in fp32 and rounded once. PEFT refuses to merge weights that are not finite.
    """
    dtype = _dtype(base)
    merged: Any = load_tuned(base, adapter, torch.float32)
    merged = merged.merge_and_unload(safe_merge=True)
    merged.to(dtype).save_pretrained(target)


def largest_logit_difference(
    first: PreTrainedModel, second: PreTrainedModel, prompts: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
    """The largest difference of two models' logits over the prompts, and the first's largest logit; NaN stays NaN.

    Prompts are the keywords of a forward.
    """
    differences, sizes = [], []
    with torch.no_grad():
        for prompt in prompts:
            logits, others = (model(**_in_dtype(model, prompt)).logits.float() for model in (first, second))
            differences.append((logits - others).abs().max())
            sizes.append(logits.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def _in_dtype(model: PreTrainedModel, prompt: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What towers see and hear, in the dtype of their weights."""
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in prompt.items()}


def _dtype(folder: Path) -> torch.dtype:
    config = read_object(folder / "config.json")
    config = {**(config.get("thinker_config") or {}), **config}  # where an Omni checkpoint may say it
    names = {"float32": torch.float32, "float16": torch.float16}
    return names.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
