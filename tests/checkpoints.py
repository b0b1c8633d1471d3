"""Tiny checkpoint folders for tests: configuration, tokenizer, template, and random weights if asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Literal, TypeAlias

from qwentune.data.tokenizing.vocabulary import Family, write_tokenizer

ModelType: TypeAlias = Literal["qwen2", "qwen3", "qwen3_moe"]

SMALL_NUM_RANKS = 1000
ROWS_MULTIPLE = 64  # as in the published models, some embedding rows belong to no token

ARCHITECTURES: dict[ModelType, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def family_of(model_type: ModelType) -> Family:
    """The tokenizer family that the published models of this type use."""
    return "qwen2.5" if model_type == "qwen2" else "qwen3"


def template_text(name: str) -> str:
    """A published chat template as TRL ships it: `qwen2_5`, `qwen3`, `qwen3_instruct_2507`, `qwen3_8` …"""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError('the tests take chat templates from trl: pip install "qwentune[test]"')
    return Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text("utf-8")


def write_checkpoint(
    folder: Path,
    model_type: ModelType,
    *,
    template: str | None = None,
    num_ranks: int | None = SMALL_NUM_RANKS,
    tied: bool = False,
    eos: str = "<|im_end|>",
    tokenizer_from: Path | None = None,
) -> Path:
    """Write config.json, the tokenizer and chat_template.jinja, and return the folder.

    Args:
        template: Name of a template of TRL's; None takes the one of the model type.
        num_ranks: Size of the vocabulary before control tokens; None builds the real one, in seconds.
        tied: The head shares the rows of the embedding.
        tokenizer_from: A folder whose two tokenizer files are copied instead of built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_from is None:
        write_tokenizer(folder, family_of(model_type), num_ranks, eos)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    name = template or ("qwen2_5" if model_type == "qwen2" else "qwen3")
    (folder / "chat_template.jinja").write_text(template_text(name), encoding="utf-8")
    config = model_config(model_type, token_ids(folder), tied, eos)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def token_ids(folder: Path) -> dict[str, int]:
    """The ids of the control tokens of a written tokenizer."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return {token["content"]: int(token_id) for token_id, token in config["added_tokens_decoder"].items()}


def model_config(model_type: ModelType, ids: dict[str, int], tied: bool, eos: str) -> dict[str, object]:
    """The content of config.json; every width is a multiple of 64, the block of 4-bit quantisation."""
    num_rows = -(-(max(ids.values()) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    dense: dict[str, object] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids[eos],
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": num_rows,
    }
    if model_type == "qwen2":
        return {key: value for key, value in dense.items() if key != "head_dim"}
    if model_type == "qwen3":
        return dense | {"attention_bias": False}
    return dense | {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def add_weights(folder: Path, seed: int = 0) -> Path:
    """Save random fp32 weights and generation_config.json into a written checkpoint, and return the folder.

    The caller's random state is left as it was; the same seed gives the same weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    ids = token_ids(folder)
    is_base = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["eos_token"] == "<|endoftext|>"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"] if is_base else [ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    config = (folder / "config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)  # as published, not as the installed transformers writes it
    return folder
