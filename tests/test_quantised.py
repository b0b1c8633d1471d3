"""Checkpoints published in fewer than 16 bits: told by name or config.json, answered with the 16-bit one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwentune.errors import UsageError
from qwentune.facts.models import MODELS, config_of, model_spec, previewed_spec
from tests.checkpoints import template_text


@pytest.mark.parametrize(
    ("name", "method", "plain"),
    [
        ("Qwen/Qwen3-8B-FP8", "FP8", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b-fp8", "FP8", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "FP8", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "GPTQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen3-0.6B-GGUF", "GGUF", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-4B-MLX-4bit", "MLX", "Qwen/Qwen3-4B"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "BNB", "Qwen/Qwen3-8B"),
        ("mlx-community/Qwen3-8B-4bit", "4BIT", "Qwen/Qwen3-8B"),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", "QUANTIZED", "Qwen/Qwen3-8B"),
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M", "Qwen/Qwen3-8B"),
        ("someone/Other-7B-AWQ", "AWQ", None),
    ],
)
def test_a_quantised_checkpoint_is_told_by_its_name(name: str, method: str, plain: str | None) -> None:
    for find in (model_spec, lambda model: previewed_spec(model, packing=False)):
        with pytest.raises(UsageError) as caught:
            find(name)
        (problem,) = caught.value.problems
        assert problem.where == "model"
        assert f"quantised weights ({method})" in problem.what
        assert (f"model: {plain}. With tuning.kind=qlora" if plain else "that it was made of. With") in problem.fix


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8", "Qwen/Qwen3-8B-Bass", "Qwen/Qwen3-8B-2507"])
def test_a_misspelt_name_is_no_quantised_one(name: str) -> None:
    with pytest.raises(UsageError, match="is not a known model"):
        model_spec(name)


def test_no_listed_checkpoint_looks_quantised() -> None:
    assert all(model_spec(name) is spec for name, spec in MODELS.items())


@pytest.mark.parametrize(
    ("like", "config", "named", "plain"),
    [
        ("Qwen/Qwen3-0.6B", {"quantization_config": {"quant_method": "fp8"}}, "(FP8)", "Qwen/Qwen3-0.6B"),
        (
            "Qwen/Qwen3-8B",
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "(AWQ, 4 bits)",
            "Qwen/Qwen3-8B",
        ),
        ("Qwen/Qwen3-8B", {"quantization_config": {"load_in_4bit": True}}, "4 bits)", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-4B", {"quantization": {"bits": 8, "group_size": 64}}, "(MLX, 8 bits)", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-8B", {"quantization_config": "odd"}, "(ODD)", "Qwen/Qwen3-8B"),
        (
            "Qwen/Qwen2.5-7B-Instruct",
            {
                "quantization_config": {"quant_method": "gptq", "bits": 4},
                "_name_or_path": "x/Qwen2.5-Coder-7B-Instruct-GPTQ",
            },
            "(GPTQ, 4 bits)",
            "Qwen/Qwen2.5-Coder-7B-Instruct",
        ),
    ],
)
def test_a_quantised_folder_is_told_by_its_config(
    tmp_path: Path, like: str, config: dict[str, Any], named: str, plain: str
) -> None:
    spec = MODELS[like]
    (tmp_path / "config.json").write_text(json.dumps(config_of(spec) | config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    template = "qwen3" if spec.model_type == "qwen3" else "qwen2_5"
    (tmp_path / "chat_template.jinja").write_text(template_text(template))
    for find in (model_spec, lambda model: previewed_spec(model, packing=True)):
        with pytest.raises(UsageError) as caught:
            find(str(tmp_path))
        (problem,) = caught.value.problems
        assert problem.where == f"{tmp_path / 'config.json'}: {next(iter(config))}"
        assert f"quantised {named}" in problem.what or named in problem.what
        assert f"model: {plain}. " in problem.fix


def test_null_says_that_nothing_is_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(config_of(MODELS["Qwen/Qwen3-8B"]) | {"quantization_config": None})
    )
    assert model_spec(str(tmp_path)).num_layers == 36


def test_a_folder_of_gguf_files_alone_is_told_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "Qwen3-8B-Q4_K_M.gguf").touch()
    with pytest.raises(UsageError, match=r"quantised weights \(Q4_K_M\)[^\n]*\n.*model: Qwen/Qwen3-8B\."):
        model_spec(str(tmp_path))
