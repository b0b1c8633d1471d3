"""Find a model's facts: by hub id, by `builtin:` name, or from a local checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from qwentune.errors import Problem, UsageError, nearest
from qwentune.facts.architecture import Kind, LinearAttentionSpec, ModelSpec, MoeSpec
from qwentune.facts.config_file import ConfigFile
from qwentune.facts.documents import LARGEST_TEMPLATE_BYTES, LARGEST_TOKENIZER_BYTES, read_object, read_text
from qwentune.facts.generation_config import read_generation_config
from qwentune.facts.packing import packing_problems
from qwentune.facts.published_media import MODELS, NOT_TAKEN
from qwentune.facts.quantised import quantised_config, quantised_name
from qwentune.facts.tower_config import read_tower, tower_sections
from qwentune.facts.towers import DECODERS, training_problems

__all__ = [
    "MODELS",
    "LinearAttentionSpec",
    "ModelSpec",
    "MoeSpec",
    "config_of",
    "model_spec",
    "previewed_spec",
    "refuse_untrainable",
    "whole_config_of",
]

_ENDOFTEXT = "<|endoftext|>"
_ENDOFTEXT_ID = 151643
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
_MODEL_TYPES = ("qwen2", "qwen3", *_MIXTURES, "qwen3_5_text", *DECODERS)
_ONE_AXIS = ("qwen2_audio", "qwen3_asr")  # whose positions are those of text
_DTYPES = ("float32", "bfloat16", "float16")
_ROTARY_SHARE = 0.25  # of a head, in hybrids
# What published files leave to the defaults of transformers' configuration classes.
_LEFT_OUT: Mapping[str, Mapping[str, object]] = {
    "qwen2_audio": {
        **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        **{"rope_theta": 1e4, "max_position_embeddings": 32768},
    }
}


def model_spec(model: str, *, packing: bool = False) -> ModelSpec:
    """The facts of a hub id (in any case), a `builtin:` name or a local folder.

    Raises:
        UsageError: an unknown name (names the nearest), or a folder whose config.json cannot be used; with `packing`
            also a model that cannot be given packed rows.
    """
    if (spec := _listed(model)) is not None:
        if packing and (problems := packing_problems(spec.checkpoint_type)):
            raise UsageError(problems)
        return spec
    if Path(model).is_dir():
        return _from_folder(Path(model), packing)
    if model.startswith(("/", ".", "~")):
        raise UsageError(Problem(model, "There is no such folder.", "Give a folder that holds a config.json."))
    if problem := quantised_name(model, MODELS) or _not_taken(model):
        raise UsageError(problem)
    what = f"'{model}' is not a known model.{_did_you_mean(model)}"
    raise UsageError(Problem("model", what, "`qwentune models` lists all."))


def previewed_spec(model: str, *, packing: bool) -> ModelSpec | None:
    """As `model_spec`, for what needs no weights: None of a folder that says nothing of a model that can be planned."""
    path = Path(model) / "config.json"
    if _listed(model) is not None or not Path(model).is_dir():
        return model_spec(model, packing=packing)
    values = read_object(path, optional=True)
    model_type = str(values.get("model_type"))
    if DECODERS.get(model_type, model_type) in _MODEL_TYPES:
        return model_spec(model, packing=packing)
    problem = quantised_config(str(path), values, None, MODELS)
    if problems := [*(packing_problems(model_type) if packing else []), *([problem] if problem else [])]:
        raise UsageError(problems)
    return None


def refuse_untrainable(spec: ModelSpec) -> None:
    """Raises UsageError where the model can be planned but not trained."""
    if problems := training_problems(spec):
        raise UsageError(problems)


def length_remark(spec: ModelSpec, max_tokens: int, where: str) -> str:
    """That `data.max_tokens`, said at `where`, is more than the model's positions, in words; empty where it is not."""
    if max_tokens <= spec.max_positions:
        return ""
    what = (
        f"data.max_tokens: {max_tokens}, but {spec.id} has {spec.max_positions} positions; what an example has beyond"
    )
    what += " them is read at positions that the model never saw"
    fix = f"Use data.max_tokens={spec.max_positions}, or a copy of the checkpoint whose config.json has rope_scaling."
    return str(Problem(where, what, fix))


def config_of(spec: ModelSpec) -> dict[str, object]:
    """The dimensions of a decoder as its config.json has them."""
    config: dict[str, object] = {
        "model_type": spec.model_type,
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_rows,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
    }
    if spec.model_type.startswith("qwen3"):
        config["head_dim"] = spec.head_dim
        config["attention_bias"] = spec.qkv_bias
    else:
        config["qkv_bias"] = spec.qkv_bias
    if (moe := spec.moe) is not None:
        config |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_intermediate,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if moe.shared_intermediate:
            config["shared_expert_intermediate_size"] = moe.shared_intermediate
    if (linear := spec.linear_attention) is not None:
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": _ROTARY_SHARE,
        }
        config |= {
            "full_attention_interval": linear.period,
            "linear_num_key_heads": linear.num_key_heads,
            "linear_num_value_heads": linear.num_value_heads,
            "linear_key_head_dim": linear.key_head_dim,
            "linear_value_head_dim": linear.value_head_dim,
            "linear_conv_kernel_dim": linear.conv_kernel,
        }
    return config


def whole_config_of(spec: ModelSpec) -> dict[str, object]:
    """The dimensions of decoder and towers as the config.json of the model has them, of an omni model its thinker."""
    if spec.tower is None:
        return config_of(spec)
    text = config_of(spec)
    tied = text.pop("tie_word_embeddings")
    del text["model_type"]  # each class has a decoder's class of its own
    model_type = spec.checkpoint_type
    if spec.checkpoint_type not in _ONE_AXIS:
        rope = cast("dict[str, object]", text["rope_parameters"])
        half = int(spec.head_dim * cast(float, rope.get("partial_rotary_factor", 1))) // 2
        section = [half - 2 * (half // 3), half // 3, half // 3]  # how the axes share a head changes no size
        text["rope_parameters"] = {**rope, "mrope_section": section}
    model_type += "_thinker" if model_type.endswith(("omni", "omni_moe")) else ""
    return {"model_type": model_type, "tie_word_embeddings": tied, "text_config": text, **tower_sections(spec)}


def _listed(model: str) -> ModelSpec | None:
    by_lower_case = {name.lower(): spec for name, spec in MODELS.items()}
    return by_lower_case.get(model.lower())


def _not_taken(model: str) -> Problem | None:
    found = next((name for name in NOT_TAKEN if name.lower() == model.lower()), None)
    if found is None:
        return None
    what, _, fix = NOT_TAKEN[found].partition(". ")
    return Problem("model", f"'{found}' {what}", fix)


def _did_you_mean(model: str) -> str:
    if f"qwen/{model.lower()}" in {name.lower() for name in MODELS}:
        model = f"Qwen/{model}"
    by_lower_case = {name.lower(): name for name in MODELS}
    sentence = nearest(model.lower(), by_lower_case)
    _, quote, name = sentence.removesuffix("'?").partition("'")
    return f" Did you mean '{by_lower_case[name]}'?" if quote else ""


def _from_folder(folder: Path, packing: bool) -> ModelSpec:
    gguf = None if (folder / "config.json").exists() else next(folder.glob("*.gguf"), None)
    if gguf is not None and (problem := quantised_name(str(gguf), MODELS)):
        raise UsageError(problem)
    file = ConfigFile(folder / "config.json")
    tower_of = str(file.values.get("model_type"))
    model_type = DECODERS.get(tower_of, tower_of)
    thinker = file.section("thinker_config") if "thinker_config" in file.values else file
    config = _decoder_of(tower_of, thinker)
    if packing:
        config.problems += packing_problems(tower_of)
    if model_type not in _MODEL_TYPES:
        unknown = Problem(
            f"{config.path}: model_type",
            f"'{model_type}' is not a model type that qwentune can plan.{nearest(model_type, _MODEL_TYPES)}",
            f"It knows {', '.join(_MODEL_TYPES)}.",
        )
        raise UsageError([unknown, *config.problems])
    is_qwen3, is_hybrid = model_type.startswith("qwen3"), model_type in _HYBRIDS
    has_mlp = model_type != "qwen3_5_moe_text"
    hidden_size, num_heads = config.number("hidden_size"), config.number("num_attention_heads")
    moe = None
    if model_type in _MIXTURES:
        moe = MoeSpec(
            num_experts=config.number("num_local_experts" if "num_local_experts" in config.values else "num_experts"),
            top_k=config.number("num_experts_per_tok"),
            expert_intermediate=config.number("moe_intermediate_size"),
            shared_intermediate=0 if model_type == "qwen3_moe" else config.number("shared_expert_intermediate_size"),
        )
        if config.values.get("mlp_only_layers") or config.number("decoder_sparse_step", 1) != 1:
            config.problems.append(
                Problem(
                    f"{config.path}: decoder_sparse_step, mlp_only_layers",
                    "some layers are dense and some are experts; no Qwen checkpoint mixes them.",
                    "Use decoder_sparse_step 1 and an empty mlp_only_layers.",
                )
            )
    spec = ModelSpec(
        id=str(folder),
        model_type=model_type,
        num_layers=config.number("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=config.number("intermediate_size") if has_mlp else 0,
        num_heads=num_heads,
        num_kv_heads=config.number("num_key_value_heads", num_heads),
        head_dim=config.number("head_dim", max(1, hidden_size // num_heads)),
        vocab_rows=config.number("vocab_size"),
        tied=config.flag("tie_word_embeddings", False),
        max_positions=config.max_positions,
        rope_theta=config.rope_theta,
        qkv_bias=config.flag("attention_bias" if is_qwen3 else "qkv_bias", not is_qwen3),
        qk_norm=is_qwen3,
        kind=_kind(folder),
        moe=moe,
        licence="not stated",
        source=str(config.path),
        linear_attention=_linear_attention(config) if is_hybrid else None,
        tower_of=tower_of if tower_of in DECODERS else None,
        tower=read_tower(tower_of, thinker, hidden_size),
    )
    if problem := quantised_config(str(config.path), file.values, None if config.problems else spec, MODELS):
        config.problems.append(problem)
    for key in ("dtype", "torch_dtype"):
        if config.values.get(key) not in (None, *_DTYPES):
            config.refuse(key, config.values[key], f"one of {', '.join(_DTYPES)} is needed")
    config.positive("rms_norm_eps", 1e-6)
    if spec.num_heads % spec.num_kv_heads:
        what = f"{spec.num_heads} heads cannot share {spec.num_kv_heads} of keys and values evenly."
        config.problems.append(Problem(f"{config.path}: num_key_value_heads", what))
    if moe is not None and moe.top_k > moe.num_experts:
        what = f"a token cannot take {moe.top_k} of {moe.num_experts} experts."
        config.problems.append(Problem(f"{config.path}: num_experts_per_tok", what))
    if config.problems:
        raise UsageError(config.problems)
    return spec


def _decoder_of(tower_of: str, file: ConfigFile) -> ConfigFile:
    """The values of the text decoder in the file of a model that may see or hear too."""
    if tower_of not in DECODERS or not isinstance(file.values.get("text_config"), dict):
        return file
    text = file.nested("text_config")
    # Older checkpoints have the decoder's sizes at the top; whether the head is tied is said there in all.
    tied = {key: file.values[key] for key in ("tie_word_embeddings",) if key in file.values}
    found = ConfigFile(file.path, values={**_LEFT_OUT.get(tower_of, {}), **file.values, **text, **tied})
    found.problems = file.problems
    return found


def _linear_attention(config: ConfigFile) -> LinearAttentionSpec:
    num_layers, period = config.number("num_hidden_layers"), config.number("full_attention_interval", 4)
    types = config.values.get("layer_types")
    if isinstance(types, list) and "full_attention" in types:
        period = cast("list[object]", types).index("full_attention") + 1
    pattern = ["linear_attention"] * (period - 1) + ["full_attention"]
    if num_layers % period or (isinstance(types, list) and types != pattern * (num_layers // period)):
        what = "full attention does not stand in every so manieth layer and in the last, as in Qwen's checkpoints."
        config.problems.append(Problem(f"{config.path}: num_hidden_layers, layer_types", what))
    return LinearAttentionSpec(
        num_key_heads=config.number("linear_num_key_heads"),
        num_value_heads=config.number("linear_num_value_heads"),
        key_head_dim=config.number("linear_key_head_dim"),
        value_head_dim=config.number("linear_value_head_dim"),
        conv_kernel=config.number("linear_conv_kernel_dim"),
        period=period,
    )


def _kind(folder: Path) -> Kind:
    """How the checkpoint answers, read from its stop token and its chat template."""
    tokenizer = read_object(folder / "tokenizer_config.json", optional=True, largest_bytes=LARGEST_TOKENIZER_BYTES)
    template_file = folder / "chat_template.jinja"
    template = tokenizer.get("chat_template")
    if template_file.exists():
        template = read_text(template_file, LARGEST_TEMPLATE_BYTES)
    if not template or _stops_at_end_of_text(folder, tokenizer):
        return "base"
    text = template if isinstance(template, str) else json.dumps(template)
    if "enable_thinking" in text:
        return "hybrid"
    prompt = text.rpartition("add_generation_prompt")[2]
    return "thinking" if "<think>" in prompt else "chat"


def _stops_at_end_of_text(folder: Path, tokenizer: Mapping[str, object]) -> bool:
    eos = tokenizer.get("eos_token")
    if isinstance(eos, dict):
        eos = cast("dict[str, object]", eos).get("content")
    if eos is not None:
        return eos == _ENDOFTEXT
    return read_generation_config(folder).get("eos_token_id") in (_ENDOFTEXT_ID, [_ENDOFTEXT_ID])
