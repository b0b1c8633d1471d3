"""The tables: dimensions give the published parameter counts, and a model is found or its nearest named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwentune.errors import UsageError
from qwentune.facts.models import MODELS, config_of, length_remark, model_spec, whole_config_of
from qwentune.facts.towers import tower_remark, training_problems
from qwentune.model.loading import load_model

# Counts of the model classes of transformers 5.23 on the meta device; those of Qwen2.5 and Qwen3 up to 72B and the MoE
# equal the exact counts of keras-team/keras-hub@71453d08.
PARAMETERS = {
    "Qwen1.5-0.5B": 463_987_712,
    "Qwen1.5-1.8B": 1_836_828_672,
    "Qwen1.5-4B": 3_950_369_280,
    "Qwen1.5-7B": 7_721_324_544,
    "Qwen1.5-14B": 14_167_290_880,
    "Qwen1.5-32B": 32_512_218_112,
    "Qwen1.5-72B": 72_287_920_128,
    "Qwen1.5-110B": 111_209_914_368,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "CodeQwen1.5-7B": 7_250_284_544,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen2-57B-A14B": 57_408_658_944,
    "QwQ-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "Qwen3-Next-80B-A3B-Thinking": 79_674_391_296,
    "Qwen3.5-35B-A3B": 34_660_610_688,  # without the vision tower, as keras-hub has Qwen-AgentWorld-35B-A3B
}

QWEN3_CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1026,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}


HYBRID_CONFIG = QWEN3_CONFIG | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}


def write_folder(folder: Path, config: object, template: str = "", eos: str = "<|im_end|>") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_dimensions_give_the_published_parameter_count(name: str, count: int) -> None:
    assert model_spec(f"Qwen/{name}").parameters == count


def test_every_checkpoint_of_a_shape_family_has_its_own_id_and_a_source() -> None:
    for wanted in ("Qwen2.5-Coder-3B", "Qwen2.5-Math-72B-Instruct", "Qwen2.5-7B-Instruct-1M", "Qwen3-4B-Base"):
        assert f"Qwen/{wanted}" in MODELS
    assert all(spec.source and spec.licence for spec in MODELS.values())
    sizes = re.compile(r"(\d+(?:\.\d+)?)B(?!-Preview)")
    for name, spec in MODELS.items():
        if match := sizes.search(name):
            # Names round; the smallest count fewer or more of the embedding, omni models the decoder alone. An MoE also
            # names its active part.
            counts = (spec.parameters, spec.all_parameters)
            assert any(0.8 < count / 1e9 / float(match[1]) < 1.25 for count in counts) or spec.moe, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen3-8B", "hybrid"),
        ("Qwen3-8B-Base", "base"),
        ("Qwen3-30B-A3B-Thinking-2507", "thinking"),
        ("Qwen3-4B-Instruct-2507", "chat"),
        ("Qwen2.5-7B", "base"),
        ("Qwen1.5-MoE-A2.7B-Chat", "chat"),
        ("QwQ-32B", "thinking"),
        ("Qwen3-Next-80B-A3B-Instruct", "chat"),
        ("Qwen3.8-27B", "hybrid"),
    ],
)
def test_the_kind_follows_the_suffix(name: str, kind: str) -> None:
    assert model_spec(f"Qwen/{name}").kind == kind


def test_the_tiny_model_is_built_in() -> None:
    spec = model_spec("builtin:tiny-qwen3")
    assert (spec.num_layers, spec.hidden_size, spec.vocab_rows, spec.tied) == (2, 128, 151936, True)


def test_ids_are_found_in_any_case() -> None:
    assert model_spec("qwen/qwen3-8b").id == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("Qwen3-8B", "Qwen/Qwen3-8B"), ("qwen3-8b", "Qwen/Qwen3-8B"), ("Qwen/Qwen3-8BB", "Qwen/Qwen3-8B")],
)
def test_an_unknown_model_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"Did you mean '{right}'?")):
        model_spec(wrong)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        model_spec(str(tmp_path / "nowhere"))


def test_a_local_folder_is_read_from_its_config(tmp_path: Path) -> None:
    spec = model_spec(write_folder(tmp_path / "m", QWEN3_CONFIG, "{% if add_generation_prompt %}x{% endif %}"))
    assert (spec.num_layers, spec.head_dim, spec.tied, spec.rope_theta) == (3, 16, True, 5000.0)
    assert (spec.qk_norm, spec.qkv_bias, spec.kind) == (True, False, "chat")


def test_older_configs_give_rope_theta_and_no_head_dim(tmp_path: Path) -> None:
    config = QWEN3_CONFIG | {"model_type": "qwen2", "rope_theta": 1e6}
    del config["rope_parameters"], config["head_dim"]
    spec = model_spec(write_folder(tmp_path / "m", config))
    assert (spec.rope_theta, spec.head_dim, spec.qkv_bias) == (1e6, 16, True)


def test_a_mixture_of_experts_is_read_with_its_shared_expert(tmp_path: Path) -> None:
    config = QWEN3_CONFIG | EXPERTS | {"model_type": "qwen2_moe"}
    moe = model_spec(write_folder(tmp_path / "m", config)).moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.expert_intermediate, moe.shared_intermediate) == (4, 2, 64, 96)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_a_hybrid_counts_as_transformers_builds_it(tmp_path: Path, model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = HYBRID_CONFIG | (EXPERTS if model_type != "qwen3_5_text" else {}) | {"model_type": model_type}
    spec = model_spec(write_folder(tmp_path / "m", config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(spec)))  # pyright: ignore
    linear = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert spec.parameters == model.num_parameters()
    assert spec.linear_parameters == sum(module.weight.numel() for module in linear)
    assert (spec.num_layers, spec.num_attention_layers, spec.period) == (4, 1, 4)


def test_layers_of_full_attention_that_do_not_repeat_are_refused(tmp_path: Path) -> None:
    config = HYBRID_CONFIG | {"layer_types": ["full_attention", *["linear_attention"] * 3]}
    with pytest.raises(UsageError, match="layer_types"):
        model_spec(write_folder(tmp_path / "m", config))


@pytest.mark.parametrize(
    ("model_type", "decoder"),
    [
        ("qwen2_vl", QWEN3_CONFIG),
        ("qwen2_5_vl", QWEN3_CONFIG),
        ("qwen3_vl", QWEN3_CONFIG),
        ("qwen3_vl_moe", QWEN3_CONFIG | EXPERTS),
        ("qwen3_5", HYBRID_CONFIG),
        ("qwen3_5_moe", HYBRID_CONFIG | EXPERTS),
    ],
)
def test_a_checkpoint_with_a_vision_tower_is_described_by_its_text_tower(
    tmp_path: Path, model_type: str, decoder: dict[str, object]
) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text = {key: value for key, value in decoder.items() if key not in ("model_type", "tie_word_embeddings")}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [2, 3, 3]}}
    if model_type.startswith("qwen2"):
        text["num_attention_heads"] = 64 // 16  # heads of qwen2 share the hidden size
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=VISION, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    spec = model_spec(write_folder(tmp_path / "m", config.to_dict()))
    assert (spec.tower_of, spec.tied) == (model_type, True)
    assert spec.parameters == model.model.language_model.num_parameters()
    assert bool(tower_remark(spec)) is model_type.startswith("qwen3_5")
    assert training_problems(spec) == []


def test_a_head_that_a_checkpoint_with_a_vision_tower_ties_is_loaded_tied(tmp_path: Path) -> None:
    """transformers reads it in the text tower's part, where it may be missing, and would train a new head."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text = {key: value for key, value in HYBRID_CONFIG.items() if key not in ("model_type", "tie_word_embeddings")}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=VISION, tie_word_embeddings=True)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="fp32")
    assert model.num_parameters() == model_spec(str(tmp_path)).parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.equal(whole.lm_head.weight)


@pytest.mark.parametrize(
    ("template", "eos", "kind"),
    [
        ("", "<|im_end|>", "base"),
        ("{% if enable_thinking %}", "<|endoftext|>", "base"),
        ("{% if add_generation_prompt %}{% if enable_thinking is false %}<think>", "<|im_end|>", "hybrid"),
        ("{% if add_generation_prompt %}<|im_start|>assistant\\n<think>\\n", "<|im_end|>", "thinking"),
        ("<think>{% if add_generation_prompt %}<|im_start|>assistant\\n", "<|im_end|>", "chat"),
    ],
)
def test_the_kind_of_a_folder_follows_its_stop_token_and_template(
    tmp_path: Path, template: str, eos: str, kind: str
) -> None:
    assert model_spec(write_folder(tmp_path / "m", QWEN3_CONFIG, template, eos)).kind == kind


def test_every_fault_of_a_config_is_reported_at_once(tmp_path: Path) -> None:
    config = QWEN3_CONFIG | {"hidden_size": "64", "num_hidden_layers": None, "vocab_size": 0}
    with pytest.raises(UsageError) as caught:
        model_spec(write_folder(tmp_path / "m", config))
    assert len(caught.value.problems) == 3
    assert all(key in str(caught.value) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))


@pytest.mark.fault("I69", "a model that is no Qwen text model is refused by name before a weight is read")
@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_is_no_qwen_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        model_spec(str(tmp_path))


def test_facts_and_the_plan_are_free_of_torch() -> None:
    code = "import sys, qwentune.facts.models, qwentune.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_configuration_of_a_model_is_read_back_as_the_same_model(tmp_path: Path, model: str) -> None:
    spec = MODELS[model]
    (tmp_path / "config.json").write_text(json.dumps(whole_config_of(spec)))
    read = model_spec(str(tmp_path))
    # What stands beside the configuration tells these; of an omni model the configuration is its thinker's.
    beside = {name: getattr(spec, name) for name in ("id", "kind", "licence", "source", "tower_of")}
    assert replace(read, **beside) == spec


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1e6}}, 8192),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 4096),
    ],
)
def test_a_length_beyond_the_model_s_positions_is_said(tmp_path: Path, rope: dict[str, object], positions: int) -> None:
    spec = model_spec(write_folder(tmp_path / "m", {**QWEN3_CONFIG, "max_position_embeddings": 4096, **rope}))
    assert spec.max_positions == positions
    assert not length_remark(spec, positions, "recipe.yaml:7")
    said = length_remark(spec, positions + 1, "recipe.yaml:7")
    assert said.startswith(f"recipe.yaml:7  data.max_tokens: {positions + 1}, but {tmp_path / 'm'} has {positions} ")
    assert f"Use data.max_tokens={positions}," in said
