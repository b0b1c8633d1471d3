"""Merging streams the base's files: bit for bit what PEFT's merge gives, under the base's names, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwentune.exporting.changes import place
from qwentune.exporting.merge import merge
from qwentune.exporting.tensors import read_rows
from qwentune.facts.weight_files import read_weights
from qwentune.model.adapters import add_adapters
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from qwentune.training.trainer import save_weights
from tests.checkpoints import token_ids
from tests.families import write_family

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def tune(base: Path, target: Path, tuning: Tuning, tokens: list[int]) -> Path:
    """An adapter whose every tensor is random, as if it had been trained."""
    adapted = add_adapters(load_model(base, dtype="fp32"), tuning, "fp32", tokens)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_weights(adapted, target)
    return target


def by_peft(base: Path, adapter: Path, target: Path) -> dict[str, torch.Tensor]:
    """The merged tensors by place, as PEFT makes them of a whole model in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).merge_and_unload(True)
    merged.save_pretrained(target)
    return {place(name): read_rows(tensor) for name, tensor in read_weights(target).items()}


@pytest.mark.parametrize(
    ("model_type", "dtype", "tuning", "has_tokens", "tied"),
    [
        ("qwen2", "bfloat16", {}, True, True),
        ("qwen3", "bfloat16", {"variant": "dora"}, True, False),
        ("qwen3", "float32", {"variant": "rslora", "targets": ["embed_tokens", "lm_head", "q_proj"]}, False, False),
        ("qwen3", "float16", {"variant": "dora", "targets": ["v_proj", "lm_head"]}, False, False),
        ("qwen3_moe", "bfloat16", {"targets": [*FEED_FORWARD, "gate", "q_proj"]}, True, True),
        ("qwen3_next", "bfloat16", {}, False, False),
        ("qwen3_5_text", "float32", {}, False, True),
        ("qwen3_5_moe_text", "bfloat16", {}, False, False),
    ],
)
def test_merged_weights_are_those_of_peft_under_the_names_of_the_base(
    tmp_path: Path, model_type: str, dtype: str, tuning: dict[str, Any], has_tokens: bool, tied: bool
) -> None:
    base = write_family(tmp_path / "base", model_type, dtype=dtype, tied=tied)
    tokens = [*token_ids(base).values()][-3:] if has_tokens else []
    adapter = tune(base, tmp_path / "adapter", Tuning(kind="lora", rank=4, **tuning), tokens)
    (tmp_path / "merged").mkdir()
    merge(base, adapter, tmp_path / "merged")
    stored, merged = read_weights(base), read_weights(tmp_path / "merged")
    assert {n: (t.dtype, t.shape, t.file.name) for n, t in stored.items()} == {
        n: (t.dtype, t.shape, t.file.name) for n, t in merged.items()
    }
    expected = by_peft(base, adapter, tmp_path / "peft")
    changed = 0
    for name, tensor in merged.items():
        rows = read_rows(tensor)
        assert torch.equal(rows, expected[place(name)].to(rows.dtype)), name
        changed += not torch.equal(rows, read_rows(stored[name]))
    assert changed >= 2 + has_tokens
