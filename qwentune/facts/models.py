"""Find a model's facts: by hub id, by `builtin:` name, or from a local checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from qwentune.errors import Problem, UsageError, nearest
from qwentune.facts.architecture import Kind, LinearAttentionSpec, ModelSpec, MoeSpec
from qwentune.facts.documents import LARGEST_TEMPLATE_BYTES, LARGEST_TOKENIZER_BYTES, read_object, read_text, shown
from qwentune.facts.generation_config import read_generation_config
from qwentune.facts.packing import packing_problems
from qwentune.facts.published import MODELS
from qwentune.facts.quantised import quantised_config, quantised_name
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
]

_ENDOFTEXT = "<|endoftext|>"
_ENDOFTEXT_ID = 151643
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
_MODEL_TYPES = ("qwen2", "qwen3", *_MIXTURES, "qwen3_5_text", *DECODERS)
_DTYPES = ("float32", "bfloat16", "float16")
_ROTARY_SHARE = 0.25  # of a head, in hybrids
_LARGEST = 2**24  # of any size in a config.json but those below; vocabularies have some 2**18 rows
_LARGEST_OF = {
    **{"num_hidden_layers": 2**10, "num_experts": 2**14, "num_local_experts": 2**14},
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 2**30),
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
    if problem := quantised_name(model, MODELS):
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


def _listed(model: str) -> ModelSpec | None:
    by_lower_case = {name.lower(): spec for name, spec in MODELS.items()}
    return by_lower_case.get(model.lower())


def _did_you_mean(model: str) -> str:
    if f"qwen/{model.lower()}" in {name.lower() for name in MODELS}:
        model = f"Qwen/{model}"
    by_lower_case = {name.lower(): name for name in MODELS}
    sentence = nearest(model.lower(), by_lower_case)
    _, quote, name = sentence.removesuffix("'?").partition("'")
    return f" Did you mean '{by_lower_case[name]}'?" if quote else ""


class _Config:
    """Reads typed values out of a config.json and gathers every problem on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.file = read_object(path)
        self.values = self.file
        self.tower_of = str(self.values.get("model_type"))
        self.model_type = DECODERS.get(self.tower_of, self.tower_of)
        text = self.values.get("text_config")
        if self.tower_of in DECODERS and isinstance(text, dict):
            # Older checkpoints have the tower's sizes at the top; whether the head is tied is said there in all.
            tied = {key: self.values[key] for key in ("tie_word_embeddings",) if key in self.values}
            self.values = {**self.values, **cast("dict[str, object]", text), **tied}

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        most = _LARGEST_OF.get(key, _LARGEST)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            return value
        is_large = isinstance(value, int) and value > most
        self.refuse(key, value, f"a whole number {f'from 1 to {most}' if is_large else '>= 1'} is needed")
        return 1

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.refuse(key, value, "true or false is needed")
        return default

    def positive(self, key: str, default: float, section: str = "") -> float:
        """A number above 0, of a section of the file where one is named."""
        value = (self.nested(section) if section else self.values).get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST**2:
            return float(value)
        self.refuse(f"{section}.{key}" if section else key, value, "a number > 0 is needed")
        return default

    def nested(self, key: str) -> dict[str, object]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, value, "an object is needed")
        return cast("dict[str, object]", value) if isinstance(value, dict) else {}

    @property
    def max_positions(self) -> int:
        known = self.number("max_position_embeddings")
        stretched = known
        for section in ("rope_parameters", "rope_scaling"):
            factor = self.positive("factor", 0.0, section)
            original = self.positive("original_max_position_embeddings", known, section)
            stretched = max(stretched, int(factor * original))  # YaRN and its like stretch what was trained
        return stretched

    @property
    def rope_theta(self) -> float:
        # transformers 5 writes rope_parameters, older versions rope_theta.
        return self.positive("rope_theta", self.positive("rope_theta", 1e4), "rope_parameters")

    def refuse(self, key: str, value: object, needed: str) -> None:
        """Notes a value of another kind than is needed."""
        found = "is missing" if value is None else f"is {shown(value)}"
        problem = Problem(f"{self.path}: {key}", f"{key} {found}; {needed}.")
        if problem not in self.problems:
            self.problems.append(problem)


def _from_folder(folder: Path, packing: bool) -> ModelSpec:
    file = None if (folder / "config.json").exists() else next(folder.glob("*.gguf"), None)
    if file is not None and (problem := quantised_name(str(file), MODELS)):
        raise UsageError(problem)
    config = _Config(folder / "config.json")
    model_type = config.model_type
    if packing:
        config.problems += packing_problems(config.tower_of)
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
        tower_of=config.tower_of if config.tower_of in DECODERS else None,
    )
    if problem := quantised_config(str(config.path), config.file, None if config.problems else spec, MODELS):
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


def _linear_attention(config: _Config) -> LinearAttentionSpec:
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
