"""A recipe that starts from an adapter: what it leaves open is the adapter's; what it says counts or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwentune.errors import RecipeError, ResumeError
from qwentune.facts.continued import continued
from qwentune.facts.models import MODELS
from qwentune.recipe import LoadedRecipe, parse_recipe, resolved_yaml

SPEC, MIXTURE = MODELS["Qwen/Qwen3-0.6B"], MODELS["Qwen/Qwen3-30B-A3B"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTER = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ALL, "use_rslora": True}


def loaded(folder: Path, adapter: dict[str, Any], **tuning: Any) -> LoadedRecipe:
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    tuning = {"kind": "lora", "start_from": str(folder), **tuning}
    recipe = {"model": SPEC.id, "tuning": tuning, "data": {"train": "rows.jsonl"}}
    return parse_recipe(json.dumps(recipe, indent=1), "r.yaml")


def test_what_the_recipe_leaves_open_is_the_adapter_s_and_is_said(tmp_path: Path) -> None:
    found, said = continued(loaded(tmp_path, ADAPTER), SPEC)
    tuning = found.recipe.tuning
    assert (tuning.rank, tuning.alpha, tuning.dropout) == (4, 8, 0.1)
    assert (tuning.targets, tuning.variant) == ("all-linear", "rslora")
    resolved = resolved_yaml(found.recipe, found.origins)
    assert f"rank: 4  # {tmp_path / 'adapter_config.json'}\n" in resolved
    assert parse_recipe(resolved, "again.yaml").recipe == found.recipe
    assert len(said) == 1
    assert all(words in said[0] for words in ("rank: 4", "alpha: 8", "dropout: 0.1", "variant: rslora"))
    assert "targets" not in said[0], "they are what the recipe would have taken"


def test_a_shape_that_is_not_the_adapter_s_is_refused_key_by_key(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, ADAPTER, rank=8, alpha=8, targets=["q_proj"], variant="dora")
    with pytest.raises(RecipeError) as caught, recipe.located():
        continued(recipe, SPEC)
    said = [str(problem) for problem in caught.value.problems]
    assert [words.partition("  ")[2].partition(",")[0] for words in said] == [
        "tuning.rank: 8",
        "tuning.targets: [q_proj]",
        "tuning.variant: dora",
    ]
    assert all(words.startswith("r.yaml:") for words in said)
    assert f"but the adapter {tmp_path} has 4" in said[0]


def test_alpha_and_dropout_of_the_recipe_count_and_that_is_said(tmp_path: Path) -> None:
    found, said = continued(loaded(tmp_path, ADAPTER, rank=4, alpha=32, dropout=0.0, variant="rslora"), SPEC)
    assert (found.recipe.tuning.alpha, found.recipe.tuning.dropout) == (32, 0.0)
    assert said == [
        "tuning.alpha: 32 from the first step on; the adapter was trained with 8",
        "tuning.dropout: 0 from the first step on; the adapter was trained with 0.1",
    ]


@pytest.mark.parametrize(
    ("targets", "parameters", "asked"),
    [
        (ALL, None, "all-linear"),
        ([f"model.layers.{i}.self_attn.q_proj" for i in range(28)], None, ["q_proj"]),
        (r".*\.(q|v)_proj", None, ["q_proj", "v_proj"]),
        (["layers.3.mlp.up_proj"], None, ["model.layers.3.mlp.up_proj"]),
        ("all-linear", None, ALL),
    ],
)
def test_the_same_modules_under_other_names_are_the_same(
    tmp_path: Path, targets: Any, parameters: list[str] | None, asked: Any
) -> None:
    adapter = {**ADAPTER, "target_modules": targets, "target_parameters": parameters}
    given, _ = continued(loaded(tmp_path, adapter, targets=asked), SPEC)
    assert given.recipe.tuning.targets == asked
    taken, _ = continued(loaded(tmp_path, adapter), SPEC)
    continued(loaded(tmp_path, adapter, targets=taken.recipe.tuning.targets), SPEC)


def test_experts_are_adapted_as_parameters(tmp_path: Path) -> None:
    """The configuration that PEFT 0.21 saves of `all-linear` on Qwen3-MoE, and of attention and experts."""
    adapter = {
        **ADAPTER,
        "target_modules": ATTENTION,
        "target_parameters": ["gate.weight", "down_proj", "gate_up_proj"],
    }
    assert continued(loaded(tmp_path, adapter), MIXTURE)[0].recipe.tuning.targets == "all-linear"
    adapter["target_parameters"] = ["down_proj", "gate_up_proj"]
    assert set(continued(loaded(tmp_path, adapter), MIXTURE)[0].recipe.tuning.targets) == set(ALL)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"lora_alpha": 12.5}, RecipeError, "has 12.5"),
        ({"target_modules": ["c_attn"]}, RecipeError, "stands around no module"),
        ({"target_modules": "(a"}, ResumeError, "no regular expression"),
        ({"r": 0}, ResumeError, "r is 0"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused(
    tmp_path: Path, changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        continued(loaded(tmp_path, {**ADAPTER, **changed}), SPEC)


def test_an_adapter_that_is_not_there_yet_leaves_the_recipe_as_it_is(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, ADAPTER, start_from=str(tmp_path / "later"))
    found, said = continued(recipe, SPEC)
    assert found is recipe
    assert "there is no" in said[0]
