"""A tiny checkpoint with weights of every decoder that is trained, named and laid out as the hub has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import qwen3_5
from tests.checkpoints import SMALL_NUM_RANKS, template_text, token_ids, write_checkpoint
from tests.media.checkpoints import MediaType, add_media_weights, write_media_checkpoint

LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "head_dim": 32,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 96}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}}
MROPE = {"rope_parameters": ROPE["rope_parameters"] | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": SHARED | {"norm_topk_prob": False},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": LINEAR | SHARED | ROPE,
    "qwen3_5_text": LINEAR | MROPE,
    "qwen3_5_moe_text": LINEAR | SHARED | MROPE,
}
WRAPPED: tuple[MediaType, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2_audio")


def write_family(folder: Path, model_type: str, *, dtype: str = "float32", tied: bool = False) -> Path:
    """Tokenizer, template, config.json and random weights, of norms and decays too, of one type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type in WRAPPED:
        return add_media_weights(write_media_checkpoint(folder, model_type))
    is_qwen2 = model_type.startswith("qwen2")
    write_checkpoint(folder, "qwen2" if is_qwen2 else "qwen3", tied=tied)
    if model_type.startswith("qwen3_5"):
        qwen3_5.write_tokenizer(folder, SMALL_NUM_RANKS)
        (folder / "chat_template.jinja").write_text(template_text("qwen3_5_think"), encoding="utf-8")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()) | SIZES[model_type]
    config |= {"model_type": model_type, "torch_dtype": dtype, "eos_token_id": token_ids(folder)["<|im_end|>"]}
    if "rope_parameters" in config:
        del config["rope_theta"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        loaded = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(loaded, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.05 if name.endswith(("norm.weight", "bias", "A_log")) else 0.08
                parameter.add_(torch.randn_like(parameter) * scale)
    config["architectures"] = [type(model).__name__]
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="300KB")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
