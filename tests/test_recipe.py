"""A recipe loads to a frozen, settled `Recipe`, or names every problem at once with its place and mend."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwentune.errors import RecipeError
from qwentune.recipe import LoadedRecipe, describe_keys, load_recipe, render_keys, resolved_yaml
from qwentune.recipe.schema import MOST_TOKENS
from qwentune.shipped import shipped, shipped_files

MINIMAL = "model: Qwen/Qwen3-8B\ntuning: {kind: lora}\ndata: {train: rows.jsonl}\n"
FULL = MINIMAL.replace("lora", "full")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> LoadedRecipe:
    Path("r.yaml").write_text(text, encoding="utf-8")
    return load_recipe("r.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    """The problems of a recipe, each as `where  what` without its mend."""
    with pytest.raises(RecipeError) as raised:
        load(text, *overrides)
    return [f"{problem.where}  {problem.what}" for problem in raised.value.problems]


def fixes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load(text, *overrides)
    return [problem.fix for problem in raised.value.problems]


def test_the_example_of_the_contract_loads_as_written() -> None:
    recipe = load(
        """\
model: Qwen/Qwen3-8B            # hub id
tuning:
  kind: qlora
  rank: 32
  alpha: 64
  dropout: 0.0
  targets: all-linear
objective:
  kind: sft
data:
  train:
    - {path: data_templates/chat.jsonl, format: chat}
    - {path: data_templates/tool_call.jsonl, format: chat, repeat: 0.5}
  eval_fraction: 0.02
  max_tokens: 4096
  too_long: drop
  packing: true
batch:
  sequences_per_step: 16
  micro_batch: auto
optimizer: {kind: adamw, learning_rate: 2.0e-4, min_learning_rate: 0.0, schedule: cosine,
            warmup_fraction: 0.03, weight_decay: 0.0, betas: [0.9, 0.999], max_grad_norm: 1.0, epochs: 3}
precision: {weights: auto, adapters: auto, optimizer_state: auto}
hardware: {gpu: auto, count: auto, launch: auto}
memory: {gradient_checkpointing: auto, loss: auto, attention: auto, headroom: 0.03}
output: {dir: runs/qwen3-8b-qlora, save_every_steps: 100, save_every_minutes: null, keep: 3,
         eval_every_steps: 100, log_every_steps: 1, best: null, early_stopping: null, samples: 0,
         report_to: []}
seed: 17
"""
    ).recipe
    assert (recipe.tuning.rank, recipe.tuning.alpha, recipe.data.train[1].repeat) == (32, 64, 0.5)
    assert (recipe.optimizer.betas, recipe.optimizer.epochs) == ((0.9, 0.999), 3)


def test_only_three_keys_are_required() -> None:
    recipe = load(MINIMAL).recipe
    assert [source.path for source in recipe.data.train] == ["rows.jsonl"]
    required = [key.name for key in describe_keys() if key.default == "required" and "[]" not in key.name]
    assert required == ["model", "tuning.kind", "data.train"]


def test_a_missing_required_key_points_at_the_section_that_lacks_it() -> None:
    assert problems("model: m\ntuning: {rank: 4}\nseed: 1\n") == [
        "r.yaml:1:1  data.train is missing",
        "r.yaml:2:9  tuning.kind is missing",
    ]
    assert len(problems("")) == 3
    assert len(problems("# only a comment\n")) == 3


def test_an_unknown_key_a_wrong_type_and_a_duplicate_key_are_all_reported() -> None:
    text = "model: m\ntuning:\n  kind: lora\n  rnak: 8\n  alpha: 32x\n  kind: qlora\ndata: {train: a.jsonl}\n"
    with pytest.raises(RecipeError) as raised:
        load(text)
    assert raised.value.exit_code == 2
    assert str(raised.value) == (
        "r.yaml:4:3  tuning.rnak: 'rnak' is not a key of tuning. Did you mean 'rank'?\n"
        "r.yaml:5:10  tuning.alpha: the text '32x' is given; a whole number >= 1 and <= 1,048,576 is needed\n"
        "r.yaml:6:3  the key 'kind' stands here again; it was given first at r.yaml:3:3\n"
        "    Keep one of the two.\n"
        "3 problems. Nothing was loaded."
    )


def test_duplicate_keys_are_found_at_every_level() -> None:
    text = MINIMAL + "optimizer: {betas: [0.9, 0.9], betas: [0.8, 0.8]}\ndata: {train: [{path: a, path: b}]}\n"
    assert problems(text) == [
        "r.yaml:4:32  the key 'betas' stands here again; it was given first at r.yaml:4:13",
        "r.yaml:5:1  the key 'data' stands here again; it was given first at r.yaml:3:1",
        "r.yaml:5:26  the key 'path' stands here again; it was given first at r.yaml:5:17",
    ]


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    assert fixes(MINIMAL + "learning_rate: 1e-4\n") == ["Is it optimizer.learning_rate?"]


def test_the_attribute_name_of_eval_is_no_key() -> None:
    assert problems(MINIMAL, "data.evaluation=[a.jsonl]") == [
        "override 'data.evaluation=[a.jsonl]'  data.evaluation: 'evaluation' is not a key of data."
        " Did you mean 'eval_fraction'?"
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [("2e-4", 2e-4), ("1E-3", 1e-3), ("1.5e+0", 1.5), (".5", 0.5), ("1", 1.0), ("+2.0", 2.0)],
)
def test_numbers_are_numbers_in_every_notation(text: str, number: float) -> None:
    assert load(MINIMAL + f"optimizer: {{learning_rate: {text}}}\n").recipe.optimizer.learning_rate == number


def test_a_whole_number_may_have_an_exponent() -> None:
    assert load(MINIMAL, "optimizer.max_steps=1E5").recipe.optimizer.max_steps == 100_000


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "True", "FALSE", "12:30:45", "2026-01-02", "0x10", "1_000"])
def test_words_stay_words(word: str) -> None:
    assert load(MINIMAL + f"revision: {word}\n").recipe.revision == word


def test_off_is_a_word_for_thinking() -> None:
    assert load(MINIMAL, "data.thinking=off").recipe.data.thinking == "off"


@pytest.mark.fault("I67", "all mistakes at once, each with file, line and column, exit 2")
@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("data.packing", "yes", "the text 'yes' is given; true or false is needed"),
        ("data.packing", "1", "the number 1 is given; true or false is needed"),
        ("data.max_tokens", "true", "true is given; a whole number >= 1 and <= 4,194,304 is needed"),
        ("data.max_tokens", "0", "the number 0 is given; a whole number >= 1 and <= 4,194,304 is needed"),
        ("data.max_tokens", "12.5", "the number 12.5 is given; a whole number >= 1 and <= 4,194,304 is needed"),
        ("data.max_tokens", "[1]", "a list of 1 is given; a whole number >= 1 and <= 4,194,304 is needed"),
        ("data.eval_fraction", "1.0", "the number 1.0 is given; a number >= 0 and < 1 is needed"),
        (
            "data.train",
            "[]",
            "a list of 0 is given; a list of {path, format, repeat, max_rows, columns, tags} is needed",
        ),
        ("data.train", "''", "an empty text is given; text is needed"),
        ("data.system", "5", "the number 5 is given; text or null is needed"),
        ("optimizer.learning_rate", "'2e-4'", "the text '2e-4' is given; a number > 0 and <= 10 is needed"),
        ("optimizer.learning_rate", ".inf", "the text '.inf' is given; a number > 0 and <= 10 is needed"),
        ("optimizer.learning_rate", "1e999", "the number inf is given; a number > 0 and <= 10 is needed"),
        (
            "optimizer.betas",
            "[0.9]",
            "a list of 1 is given; a list of 2, each a number >= 0 and < 1 is needed",
        ),
        ("batch.micro_batch", "all", "the text 'all' is given; auto or a whole number >= 1 and <= 65,536 is needed"),
        ("tuning.targets", "[q_proj, 5]", "a list of 2 is given; all-linear or a list of text is needed"),
        (
            "memory",
            "3",
            "the number 3 is given; {gradient_checkpointing, loss, attention, headroom} is needed",
        ),
        (
            "memory.gradient_checkpointing",
            "-1",
            "the number -1 is given; auto, true, false or a whole number >= 0 and <= 1,000 is needed",
        ),
        (
            "data.template_args",
            "{a: [1]}",
            "a list of 1 is given; true, false, a whole number, a number or text is needed",
        ),
    ],
)
def test_a_wrong_value_gets_one_clear_message(key: str, value: str, complaint: str) -> None:
    (found,) = problems(MINIMAL, f"{key}={value}")
    assert found.startswith(f"override '{key}={value}'  {key}")
    assert found.endswith(complaint)


def test_a_misspelt_choice_names_the_nearest_one() -> None:
    assert fixes(MINIMAL, "memory.attention=flash_attention_3") == ["Did you mean 'flash_attention_2'?"]


def test_moments_in_bf16_are_refused_with_the_reason() -> None:
    text = MINIMAL + "precision: {optimizer_state: bf16}\n"
    assert problems(text) == [
        "r.yaml:4:30  precision.optimizer_state: the text 'bf16' is given; auto, fp32 or 8bit is needed"
    ]
    assert "it would never fall" in fixes(text)[0]
    assert "8bit" in fixes(text)[0]
    assert len(problems(text + "sead: 1\n")) == 2, "beside all others"


def test_quotes_around_a_number_are_named() -> None:
    assert fixes(MINIMAL + "seed: '17'\n") == ["Remove the quotes."]
    assert fixes(MINIMAL + "revision: 1234567\n") == ["In quotes it is text."]


def test_syntax_errors_point_into_the_file() -> None:
    assert problems("model: [a\ntuning: {kind: lora}\n")[0].startswith("r.yaml:2:7  this is not YAML: ")


def test_every_line_indented_by_a_tab_is_reported() -> None:
    assert problems("model: m\ntuning:\n\tkind: lora\ndata:\n  \ttrain: a\n") == [
        "r.yaml:3:1  a tab stands where YAML takes only spaces",
        "r.yaml:5:3  a tab stands where YAML takes only spaces",
    ]


@pytest.mark.fault("J71", "tags, anchors and merge keys are refused with their place; nothing is interpolated")
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "seed: !!python/object/apply:os.getcwd []",
            "r.yaml:4:7  the tag '!!python/object/apply:os.getcwd' is not read",
        ),
        ("seed: !!int 3", "r.yaml:4:7  the tag '!!int' is not read"),
        ("output: &a {keep: 1}", "r.yaml:4:9  the anchor '&a' is not read"),
        ("output: {<<: {keep: 1}}", "r.yaml:4:10  '<<': merge keys are not read"),
        ("? [a, b]\n: 1", "r.yaml:4:3  a key must be a word"),
        ("---\nmodel: n", "r.yaml:4:1  a second document starts here"),
    ],
)
def test_yaml_beyond_plain_values_is_refused(line: str, complaint: str) -> None:
    assert any(found.startswith(complaint) for found in problems(MINIMAL + line + "\n"))


@pytest.mark.fault("I67", "half a character, which no file can hold, is refused with its place")
@pytest.mark.parametrize("half", ['"\\U0000d800"', '{a: "\\U0000dfff"}', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused_with_its_place(half: str) -> None:
    (found,) = (one for one in problems(f"{MINIMAL}name: {half}\n") if "half a character (U+D" in one)
    assert found.startswith("r.yaml:4:")
    for override in (f"model={half}", "model=caf\udce9", "model\udce9=1"):
        found = "\n".join(problems(MINIMAL, override))
        assert found.encode("utf-8").startswith(b"override 'model"), "said as text that every screen and file takes"


@pytest.mark.fault("I67", "anchors, huge and deep files are refused unread")
def test_an_alias_bomb_is_refused_without_being_expanded() -> None:
    bomb = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi"))
    found = problems(MINIMAL + bomb)
    assert sum("the alias" in line for line in found) == 8 * 9


def test_deep_nesting_is_refused() -> None:
    assert problems(MINIMAL + "seed: " + "[" * 5000) == ["r.yaml:4:27  this is nested more than 20 levels deep"]


def test_a_huge_file_is_refused_unread() -> None:
    with open("r.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError, match=r"r\.yaml  1,099,511,627,776 bytes are too many"):
        load_recipe("r.yaml")


def test_bytes_that_are_no_text_are_named_with_their_place() -> None:
    Path("r.yaml").write_bytes(b"model: m\nseed: \xff\n")
    with pytest.raises(RecipeError, match=r"^r\.yaml:2:7  the byte 0xff is not UTF-8"):
        load_recipe("r.yaml")
    assert problems("model: \x07\n") == ["r.yaml:1:8  the character U+0007 is not allowed in YAML"]


def test_something_else_than_a_mapping_is_no_recipe() -> None:
    assert problems("- model\n")[0].startswith("r.yaml:1:1  a recipe is a mapping of keys")


def test_a_missing_file_names_the_nearest_shipped_recipe() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'recipes/quickstart\.yaml'"):
        load_recipe("recipes/quickstrat.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(".")


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        (
            MINIMAL,
            ["optimizer.epochs=2", "optimizer.max_steps=5"],
            "optimizer.max_steps: optimizer.epochs is given too",
        ),
        (
            MINIMAL,
            ["data.eval=e.jsonl", "data.eval_fraction=0.1"],
            "data.eval_fraction: data.eval is given too",
        ),
        (
            MINIMAL,
            ["optimizer.min_learning_rate=1e-3"],
            "0.001 is more than optimizer.learning_rate, which is 0.0002",
        ),
        (
            FULL,
            ["optimizer.min_learning_rate=1e-4"],
            "0.0001 is more than optimizer.learning_rate, which is 1e-05",
        ),
        (
            MINIMAL,
            ["optimizer.min_learning_rate=1e-5", "optimizer.schedule=constant"],
            "optimizer.min_learning_rate: the schedule constant does not use it",
        ),
        (
            MINIMAL,
            ["optimizer.warmup_fraction=0.1", "optimizer.warmup_steps=0"],
            "optimizer.warmup_steps: optimizer.warmup_fraction is given too",
        ),
        (
            MINIMAL,
            ["output.save_every_steps=10", "output.save_every_epochs=0.5"],
            "output.save_every_epochs: output.save_every_steps is given too",
        ),
        (
            MINIMAL,
            ["output.eval_every_steps=10", "output.eval_every_epochs=0.5"],
            "output.eval_every_epochs: output.eval_every_steps is given too",
        ),
        (
            MINIMAL,
            ["optimizer.max_steps=20", "optimizer.warmup_steps=20"],
            "optimizer.warmup_steps: 20 steps are not fewer than optimizer.max_steps, which is 20",
        ),
        (MINIMAL, ["optimizer.decay_fraction=0.2"], "optimizer.decay_fraction: only the schedule wsd uses it"),
        (
            MINIMAL,
            ["optimizer.schedule=wsd", "optimizer.warmup_fraction=0.4", "optimizer.decay_fraction=0.7"],
            "0.7 and optimizer.warmup_fraction, 0.4, are more than the run",
        ),
        (FULL, ["optimizer.lora_plus_ratio=16"], "optimizer.lora_plus_ratio: tuning.kind is full, which has no"),
        (MINIMAL, ["output.project=mine"], "output.project: output.report_to names no tracker that shows it"),
        (
            MINIMAL,
            ["output.report_to=[tensorboard]", "output.run_name=first"],
            "output.run_name: output.report_to names no tracker that shows it",
        ),
        (FULL, ["tuning.rank=8"], "tuning.rank: tuning.kind is full, which has no adapters"),
        (
            MINIMAL,
            ["batch.micro_batch=3"],
            "batch.micro_batch: 3 does not divide batch.sequences_per_step (16)",
        ),
        (MINIMAL, ["output.best=loss"], "output.best: nothing is evaluated"),
        (MINIMAL, ["output.early_stopping=3"], "output.early_stopping: nothing is evaluated"),
        (MINIMAL, ["output.samples=3"], "output.samples: nothing is evaluated"),
        (MINIMAL, ["data.template_args={enable_thinking: true}"], "data.thinking decides this"),
    ],
)
def test_contradictory_keys_are_refused(text: str, overrides: list[str], complaint: str) -> None:
    (found,) = problems(text, *overrides)
    assert complaint in found
    assert found.startswith(
        f"override '{overrides[0] if len(overrides) == 1 or 'min' in overrides[0] else overrides[-1]}'"
    )


def test_contradictions_are_reported_beside_other_problems() -> None:
    found = problems(FULL.replace("full", "full, rank: 8, alpha: 16") + "sed: 1\n")
    assert [line.split("  ")[0] for line in found] == ["r.yaml:2:22", "r.yaml:2:31", "r.yaml:4:1"]


def test_keys_that_do_not_contradict_are_accepted() -> None:
    load(MINIMAL, "data.eval=e.jsonl", "data.eval_fraction=0.0", "output.best=loss")
    load(MINIMAL, "optimizer.max_steps=5", "optimizer.epochs=null")
    for schedule in ("linear", "wsd"):
        load(MINIMAL, "optimizer.min_learning_rate=1e-5", f"optimizer.schedule={schedule}")
    load(MINIMAL, "optimizer.schedule=wsd", "optimizer.decay_fraction=0.97", "optimizer.lora_plus_ratio=16")
    load(MINIMAL, "output.report_to=[wandb]", "output.project=mine", "output.run_name=first")


def test_defaults_that_depend_on_other_keys_are_settled() -> None:
    lora, full = load(MINIMAL).recipe, load(FULL).recipe
    assert (lora.optimizer.learning_rate, full.optimizer.learning_rate) == (2e-4, 1e-5)
    assert load(FULL, "optimizer.learning_rate=3e-3").recipe.optimizer.learning_rate == 3e-3
    assert (lora.optimizer.epochs, lora.output.dir) == (3, "runs/r")
    stepped = load(MINIMAL, "optimizer.max_steps=7").recipe.optimizer
    assert (stepped.epochs, stepped.max_steps) == (None, 7)
    warmed = load(MINIMAL, "optimizer.warmup_steps=7", "optimizer.schedule=wsd").recipe.optimizer
    assert (warmed.warmup_fraction, warmed.warmup_steps, warmed.decay_fraction) == (None, 7, 0.1)
    assert load(MINIMAL, "optimizer.warmup_fraction=null").recipe == lora
    by_epoch = load(MINIMAL, "output.save_every_epochs=1").recipe.output
    assert (by_epoch.save_every_steps, by_epoch.eval_every_steps) == (None, 100)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(MINIMAL).recipe.seed = 1


def test_overrides_reach_sections_lists_and_flow_values() -> None:
    loaded = load(
        MINIMAL,
        "data.train.0.path=other.jsonl",
        "data.system=You are: a # bot",
        "optimizer.betas=[0.8, 0.9]",
        "tuning={kind: qlora, targets: [q_proj]}",
        "data.eval=[{path: e.jsonl, format: text}, f.jsonl]",
    ).recipe
    assert loaded.data.train[0].path == "other.jsonl"
    assert loaded.data.system == "You are: a # bot"
    assert loaded.optimizer.betas == (0.8, 0.9)
    assert (loaded.tuning.kind, loaded.tuning.targets) == ("qlora", ["q_proj"])
    assert loaded.data.evaluation is not None
    assert [source.path for source in loaded.data.evaluation] == ["e.jsonl", "f.jsonl"]


def test_null_takes_a_key_back_to_its_default() -> None:
    text = MINIMAL.replace("lora", "lora, rank: 8")
    assert load(text, "tuning.rank=null").recipe == load(MINIMAL).recipe
    assert load(text, "tuning.rank=null", "tuning.kind=full").recipe == load(FULL).recipe


def test_the_last_override_of_a_key_counts() -> None:
    assert load(MINIMAL, "seed=1", "seed=2").recipe.seed == 2


@pytest.mark.fault("I68", "the override is quoted with what is wrong, exit 2")
@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("~seed", "'~' before a key has no meaning here"),
        ("+seed=1", "'+' before a key has no meaning here"),
        ("seed", "this is no override"),
        ("=1", "this is no override"),
        ("data..train=1", "this is no override"),
        ("seed=", "seed gets no value"),
        ("data.train.3.path=x", "data.train has no item '3'; its 1 items are counted from 0"),
        ("model.size=8", "model is a single value: there is no 'size' in it"),
        ("optimzer.max_steps=8", "optimzer: 'optimzer' is not a key of a recipe. Did you mean 'optimizer'?"),
        ("data.max_token=8", "data.max_token: 'max_token' is not a key of data. Did you mean 'max_tokens'?"),
        ("data.train=[{path: a, path: b}]", "the key 'path' stands here again"),
        ("data.train=[", "this is not YAML"),
        ("data.train=[!!python/none x]", "the tag '!!python/none' is not read"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, complaint: str) -> None:
    (found,) = problems(MINIMAL, override)
    assert found.startswith(f"override '{override}'  {complaint}")


def test_an_override_does_not_hide_a_duplicate_key() -> None:
    assert problems(MINIMAL + "seed: 1\nseed: 2\n", "seed=3") == [
        "r.yaml:5:1  the key 'seed' stands here again; it was given first at r.yaml:4:1"
    ]


def test_every_value_knows_its_origin() -> None:
    text = MINIMAL + "output:\n  keep: 2\noptimizer: {epochs: null}\n"
    origins = load(text, "data.train.0.repeat=2.0").origins
    assert origins["data.train.0.path"] == "r.yaml:3"
    assert origins["data.train.0.repeat"] == "override"
    assert origins["data.train.0.format"] == "default"
    assert (origins["output.keep"], origins["optimizer.epochs"]) == ("r.yaml:5", "default")
    assert origins["optimizer.betas"] == "default"


def reload(loaded: LoadedRecipe) -> LoadedRecipe:
    Path("resolved.yaml").write_text(resolved_yaml(loaded.recipe, loaded.origins), encoding="utf-8")
    return load_recipe("resolved.yaml")


@pytest.mark.parametrize("text", [MINIMAL, FULL])
@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "optimizer={max_steps: 9, warmup_steps: 2, schedule: wsd}",
        "data.template_args={a: 1, 'b c': 2.0}",
        "output={save_every_epochs: 1, eval_every_epochs: 0.5, report_to: [wandb], project: p, run_name: r}",
    ],
)
def test_the_resolved_recipe_loads_to_an_equal_one(text: str, override: str) -> None:
    loaded = load(text, override)
    assert reload(loaded).recipe == loaded.recipe


@pytest.mark.fault("I68", "recipe.resolved.yaml says where each value came from")
def test_each_value_of_the_resolved_recipe_carries_its_origin() -> None:
    loaded = load(MINIMAL, "seed=3")
    lines = resolved_yaml(loaded.recipe, loaded.origins).splitlines()
    assert "seed: 3  # override" in lines
    assert "    - path: rows.jsonl  # r.yaml:3" in lines
    assert all("  # " in line for line in lines if not line.endswith(":"))
    assert sum("  # " in line for line in lines) == len(loaded.origins)


@settings(max_examples=60)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    number=st.floats(1e-300, 10),
    count=st.integers(1, MOST_TOKENS),
)
def test_any_text_and_number_survives_the_resolved_recipe(text: str, number: float, count: int) -> None:
    recipe = load(MINIMAL).recipe
    data = recipe.data.model_copy(
        update={"system": text, "max_tokens": count, "template_args": {"x": text, "y": number}}
    )
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": number})
    changed = recipe.model_copy(update={"data": data, "optimizer": optimizer})
    origins = {**load(MINIMAL).origins, "data.template_args.x": "default", "data.template_args.y": "default"}
    assert reload(LoadedRecipe(changed, origins, {}, "r.yaml", "")).recipe == changed


YAML_PIECES = [*"abc:-[]{},#&*!|>'\"%@`~?\n\t 01.e", "\n  ", ": ", "data", "tuning", "seed"]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(YAML_PIECES), max_size=60).map("".join))
def test_no_file_ends_in_another_error_than_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load(text)
    assert all(problem.where.startswith("r.yaml:") for problem in raised.value.problems)


def test_every_key_is_described() -> None:
    keys = describe_keys()
    assert all(key.description for key in keys)
    assert len({key.name for key in keys}) == len(keys)
    listed = {key.name.partition("[]")[0] for key in keys}
    origins = {name.partition(".0")[0] for name in load(MINIMAL).origins}
    assert listed == origins
    assert "optimizer.betas: a list of 2, each a number >= 0 and < 1 (default [0.9, 0.999])" in render_keys(keys)


def test_shipped_files_are_found_from_any_folder_unless_there_is_an_own_one() -> None:
    assert "recipes/quickstart.yaml" in shipped_files("recipes")
    assert shipped("recipes/quickstart.yaml").is_file()
    assert shipped("quickstart.yaml") == Path("quickstart.yaml")
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text(MINIMAL, encoding="utf-8")
    assert shipped("recipes/quickstart.yaml") == Path("recipes/quickstart.yaml")
    assert load_recipe("recipes/quickstart.yaml").recipe.model == "Qwen/Qwen3-8B"


def test_loading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from qwentune.recipe import load_recipe; load_recipe('recipes/quickstart.yaml');"
        "print(*sorted({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == ""
