"""FlashAttention is told where the examples of a row begin, so that no layer waits for the GPU to find out."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config
from transformers import modeling_flash_attention_utils as flash

from qwentune.data.layout.batch import Batch, collate
from qwentune.data.layout.trie import lay_out
from qwentune.model.attention import attention_arguments
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model, recompute_layers
from tests.test_hybrid_walk import write_hybrid
from tests.test_pack import example


def packed(*lengths: int) -> Batch:
    return collate([lay_out([[example(length, 1, length)] for length in lengths])], 1.0)


def test_flash_attention_is_told_where_examples_begin() -> None:
    arguments = attention_arguments("flash_attention_2", packed(37, 20, 50))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert arguments.pop(name).tolist() == [0, 37, 57, 107]
    assert arguments == {"max_length_q": 50, "max_length_k": 50}
    assert all(type(length) is int for length in arguments.values())
    two_rows = collate([lay_out([[example(9, 1, 9)]]), lay_out([[example(4, 1, 4)]])], 1.0)
    starts = attention_arguments("flash_attention_2", two_rows)["cu_seq_lens_q"]
    assert (starts.tolist(), starts.dtype) == ([0, 9, 13], torch.int32)
    assert attention_arguments("flash_attention_2", packed(9))["cu_seq_lens_q"].tolist() == [0, 9]


def test_where_examples_begin_reaches_every_layer_through_peft_and_recomputation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **named: Any) -> Any:
        assert mask is None
        seen.append({"layer": module.layer_idx, **named})
        return q.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config._attn_implementation = "flash_attention_2"
    recompute_layers(model, True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).train()
    batch = packed(37, 20)
    arguments = attention_arguments("flash_attention_2", batch)
    names = ("input_ids", "position_ids")
    adapted(**{n: batch[n] for n in names}, use_cache=False, **arguments).logits.sum().backward()
    assert sorted(each["layer"] for each in seen) == [0, 0, 1, 1], "forward, and again backward"
    for each in seen:
        assert each["cu_seq_lens_q"] is arguments["cu_seq_lens_q"]
        assert {name: each[name] for name in arguments} == arguments


def test_transformers_takes_these_names() -> None:
    arguments = attention_arguments("flash_attention_2", packed(37, 20))
    assert arguments.keys() <= flash.FlashAttentionKwargs.__annotations__.keys()
    assert arguments.keys() <= signature(flash._flash_attention_forward).parameters.keys()


def test_hybrids_are_told_nothing(tmp_path: Path) -> None:
    """Their rows are one example each, and linear attention in torch refuses to be told where it begins."""
    network = load_model(write_hybrid(tmp_path / "model"), dtype="fp32")
    network.config._attn_implementation = "flash_attention_2"
    assert attention_arguments(LossHead(network, "supervised").attention, packed(9)) == {}
