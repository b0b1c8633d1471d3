"""Weights are taken only where every tensor is the model's: name, shape, dtype; in training, chat, merge, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qwentune.errors import ResumeError, UsageError
from qwentune.exporting.finished import open_run
from qwentune.exporting.merge import load_tuned, merge
from qwentune.facts.models import model_spec
from qwentune.facts.weight_files import read_header, read_weights
from qwentune.model.adapters import add_adapters, load_adapters
from qwentune.model.hollow import refuse_other_weights
from qwentune.model.loading import load_model, weights_folder
from qwentune.recipe import Tuning
from qwentune.training.trainer import save_weights
from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.runs import write_recipe
from tests.test_facts import HYBRID_CONFIG, VISION
from tests.warm import Warm

Tensors = dict[str, torch.Tensor]
LORA = Tuning(kind="lora", rank=2)


def base(folder: Path, model_type: ModelType = "qwen3", **options: Any) -> Path:
    return add_weights(write_checkpoint(folder / "base", model_type, **options))


def adapter(folder: Path, model: Path, tuning: Tuning = LORA, tokens: tuple[int, ...] = ()) -> Path:
    save_weights(add_adapters(load_model(model, dtype="fp32"), tuning, "fp32", tokens), folder / "adapter")
    return folder / "adapter"


def change(file: Path, how: Callable[[Tensors], object]) -> None:
    """Writes the file's tensors anew, after something was done to them."""
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, {"format": "pt"})


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def missing(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(first(tensors, part))


def extra(tensors: Tensors) -> None:
    tensors["model.layers.9.self_attn.q_proj.weight"] = torch.zeros(2, 2)


def misshapen(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({first(tensors, part): torch.zeros(3, 3)})


# --- adapters


@pytest.mark.fault("L85", "a tensor of an adapter that is missing, extra or of another shape is named with the file")
@pytest.mark.parametrize(
    ("how", "what"),
    [
        (missing("lora_B"), "1 tensors are missing: base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"),
        (extra, "1 tensors have no place in the model: model.layers.9.self_attn.q_proj.weight"),
        (misshapen("lora_A"), "1 tensors are of another shape: .*lora_A.weight \\[3, 3\\] for \\[2, 128\\]"),
    ],
)
def test_an_adapter_of_other_tensors_is_refused_everywhere(
    tmp_path: Path, how: Callable[[Tensors], object], what: str
) -> None:
    model = base(tmp_path)
    broken = adapter(tmp_path, model)
    change(broken / "adapter_model.safetensors", how)
    for reads in (
        lambda: refuse_other_weights(model, broken),  # before a run begins
        lambda: load_adapters(load_model(model, dtype="fp32"), broken, "fp32"),  # training
        lambda: load_tuned(model, broken),  # chat, verify
        lambda: merge(model, broken, tmp_path / "merged"),
    ):
        with pytest.raises(ResumeError, match=what) as caught:
            reads()
        assert str(broken / "adapter_model.safetensors") in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("model_type", "tuning", "tokens"),
    [
        ("qwen2", LORA, (1001, 1002)),
        ("qwen3", Tuning(kind="lora", rank=2, variant="dora", targets=["q_proj"]), ()),
        ("qwen3", Tuning(kind="lora", rank=2, targets=["lm_head"]), ()),
        ("qwen3_moe", LORA, (1001,)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_is_what_is_expected(
    tmp_path: Path, model_type: ModelType, tuning: Tuning, tokens: tuple[int, ...], tied: bool
) -> None:
    model = base(tmp_path, model_type, tied=tied)
    refuse_other_weights(model, adapter(tmp_path, model, tuning, tokens))


@pytest.mark.fault("L85", "an adapter of another base: its tensors are named, with the shapes of both; exit 5")
def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "qwen3")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 128, "num_hidden_layers": 3}))
    with pytest.raises(ResumeError, match="14 tensors are of another shape"):
        refuse_other_weights(add_weights(other), adapter(tmp_path, base(tmp_path)))


def test_an_adapter_that_trains_a_row_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    model = base(tmp_path)
    folder = adapter(tmp_path, model, tokens=(1001,))
    config = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps(config).replace("1001", "100001")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ResumeError, match="trains the row of token 100001"):
        refuse_other_weights(model, folder)


def test_what_is_saved_of_an_adapter_does_not_depend_on_the_order_of_a_set(tmp_path: Path) -> None:
    """PEFT holds the names of modules in a set, whose order changes with every process."""
    folder = adapter(tmp_path, base(tmp_path))
    names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 3
    assert names == sorted(names)
    again = load_adapters(load_model(tmp_path / "base", dtype="fp32"), folder, "fp32")
    save_weights(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"] == names


# --- bases


@pytest.mark.fault("L85", "a tensor of a base that is missing, extra, of another shape or dtype is named with the file")
@pytest.mark.parametrize(
    ("model_type", "how", "what"),
    [
        ("qwen3", missing("q_norm"), "1 tensors are missing: model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", extra, "1 tensors have no place in the model: model.layers.9"),
        ("qwen2", misshapen("k_proj.weight"), "1 tensors are of another shape: .*k_proj.weight"),
        ("qwen3", lambda t: t.update({first(t, "up_proj"): t[first(t, "up_proj")].to(torch.int8)}), "up_proj.* is I8"),
        (
            "qwen3_moe",
            missing("experts.3.up_proj"),
            "1 tensors are missing: model.layers.0.mlp.experts.3.up_proj.weight",
        ),
        (
            "qwen3_moe",
            misshapen("experts.3.up_proj"),
            "of another shape than other experts': model.layers.0.mlp.experts",
        ),
        (
            "qwen3_moe",
            lambda t: t.update(
                {name.replace("experts.1.", "experts.7."): t.pop(name) for name in [*t] if ".1.up" in name}
            ),
            "are missing: model.layers.0.mlp.experts.1.up_proj.weight",
        ),
    ],
)
def test_a_base_of_other_tensors_is_refused_everywhere(
    tmp_path: Path, model_type: ModelType, how: Callable[[Tensors], object], what: str
) -> None:
    model = base(tmp_path, model_type)
    change(model / "model.safetensors", how)
    for reads in (lambda: refuse_other_weights(model), lambda: load_tuned(model, None)):
        with pytest.raises(ResumeError, match=what) as caught:
            reads()
        assert str(model) in str(caught.value)


def test_weights_of_another_size_than_the_config_says_are_refused(tmp_path: Path) -> None:
    model = base(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ResumeError, match="11 tensors have no place in the model"):
        load_model(model, dtype="fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_a_base(tmp_path: Path, dtype: torch.dtype) -> None:
    model = base(tmp_path)
    change(model / "model.safetensors", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    refuse_other_weights(model)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_tied_head_may_stand_in_the_file_or_not(tmp_path: Path, has_head: bool) -> None:
    model = base(tmp_path, tied=True)
    if has_head:
        name = "model.embed_tokens.weight"
        change(model / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    refuse_other_weights(model)


def test_of_a_model_with_a_vision_tower_that_tower_alone_is_left_out(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    text = {key: value for key, value in HYBRID_CONFIG.items() if key != "model_type"}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=VISION, tie_word_embeddings=True)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", lambda tensors: tensors.update({"mtp.fc.weight": torch.zeros(2)}))
    refuse_other_weights(tmp_path)
    change(tmp_path / "model.safetensors", extra)
    with pytest.raises(ResumeError, match="1 tensors have no place in the model"):
        refuse_other_weights(tmp_path)


@pytest.mark.fault("L85", "weights that are quantised already are refused by name, with the ways out, exit 2")
def test_a_quantised_base_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3")
    config = json.loads((model / "config.json").read_text())
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UsageError, match=r"quantised \(FP8\)[^\n]*\n[^\n]*16-bit checkpoint.*tuning.kind=qlora"):
        model_spec(str(model))


def test_a_folder_with_an_adapter_is_no_base(tmp_path: Path) -> None:
    """transformers would load the model that the adapter names."""
    model = base(tmp_path)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(UsageError, match=r"holds an adapter.*\n.*tuning.start_from"):
        weights_folder(str(model))


# --- files


@pytest.mark.fault("L85", "a file that is cut, empty or no safetensors file is an error with its name, exit 5")
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda whole: b"", "is empty or cut"),
        (lambda whole: whole[:4], "is empty or cut"),
        (lambda whole: whole[:-1], "is cut, or longer"),
        (lambda whole: whole + b"\0", "is cut, or longer"),
        (lambda whole: whole[:20], "is cut, or no safetensors file"),
        (lambda whole: b"\xff" * len(whole), "is cut, or no safetensors file"),
        (lambda whole: (40).to_bytes(8, "little") + bytes(100), "broken header"),
        (lambda whole: whole.replace(b'"F32"', b'"Q32"', 1), "of an unknown kind, Q32"),
        (lambda whole: whole.replace(b'"F32"', b'"F16"', 1), "in bytes"),
        (lambda whole: whole.replace(b"[64,64]", b"[64,-6]", 1), "has no dtype, shape and place"),
        (lambda whole: whole.replace(b'"dtype"', b'"btype"', 1), "has no dtype, shape and place"),
        (lambda whole: whole.replace(b"layers.1.", b"layers.0."), "broken header: no JSON"),  # names stand twice
        (lambda whole: whole.replace(b'"format"', b'"\\ud800"', 1), "broken header: no JSON"),  # half a character
    ],
)
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, content: Callable[[bytes], bytes], what: str) -> None:
    file = base(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    assert read_header(file).keys() == load_file(file).keys()
    file.write_bytes(content(whole))
    with pytest.raises(ResumeError, match=what) as caught:
        read_weights(file.parent)
    assert caught.value.problems[0].where == str(file)


def shards(folder: Path) -> Path:
    model = base(folder)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="100KB")
    (model / "model.safetensors").unlink()
    return model


def index_of(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.fault("L85", "shards and their index: a shard that is missing or cut, a tensor in another than is said")
def test_shards_are_what_their_index_says(tmp_path: Path) -> None:
    model = shards(tmp_path)
    files = sorted(model.glob("model-*.safetensors"))
    assert len(files) > 2
    refuse_other_weights(model)
    index_of(model, lambda names: names.update({"model.norm.weight": "../secret.safetensors"}))
    with pytest.raises(ResumeError, match="no file of this folder"):
        read_weights(model)
    index_of(model, lambda names: names.update({"model.norm.weight": files[0].name}))
    with pytest.raises(ResumeError, match="for which the index names"):
        read_weights(model)
    index_of(model, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(ResumeError, match="index names no file"):
        read_weights(model)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ResumeError) as caught:
        read_weights(model)
    assert {str(files[0]), str(files[1])} <= {problem.where for problem in caught.value.problems}
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(ResumeError, match=r"index\.json:1:17"):
        read_weights(model)


# --- whole runs


@pytest.mark.slow
@pytest.mark.fault("L85", "a damaged base or adapter ends a `--fresh` start before the old run is moved aside, exit 5")
def test_nothing_is_moved_aside_for_a_run_that_cannot_begin(tmp_path: Path, warm: Warm) -> None:
    model = base(tmp_path)
    recipe = write_recipe(tmp_path, model, tuning={"kind": "lora", "rank": 2}, optimizer={"max_steps": 2})
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    before = {path for path in tmp_path.rglob("*") if "stderr" not in path.name}
    broken = tmp_path / "run" / "adapter"
    whole = (broken / "adapter_model.safetensors").read_bytes()
    for how, what in ((missing("lora_A"), "are missing"), (misshapen("lora_B"), "of another shape")):
        change(broken / "adapter_model.safetensors", how)
        refused = warm.train(recipe, f"tuning.start_from={broken}", "--fresh")
        assert (refused.code, what in refused.said) == (5, True), refused.said
        assert "Traceback" not in refused.said
        (broken / "adapter_model.safetensors").write_bytes(whole)
    (broken / "adapter_model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ResumeError, match=r"adapter_model\.safetensors  is cut"):
        open_run(tmp_path / "run")  # chat and export
    change(model / "model.safetensors", extra)
    refused = warm.train(recipe, "--fresh")
    assert (refused.code, "no place in the model" in refused.said) == (5, True), refused.said
    assert {path for path in tmp_path.rglob("*") if "stderr" not in path.name} == before


@pytest.mark.slow
@pytest.mark.fault("L85", "a base of other shapes under a checkpoint's adapter, its change allowed: refused, exit 5")
def test_a_changed_base_may_be_allowed_and_still_not_fit(tmp_path: Path, warm: Warm) -> None:
    model = base(tmp_path)
    recipe = write_recipe(tmp_path, model, tuning={"kind": "lora", "rank": 2}, optimizer={"max_steps": 2})
    assert warm.train(recipe).code == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    add_weights(model)
    allowed = [word for key in ("base", "optimizer", "plan") for word in ("--allow-change", key)]
    refused = warm.train(recipe, "optimizer.max_steps=3", *allowed)
    assert (refused.code, "of another shape" in refused.said) == (5, True), refused.said
    assert "Traceback" not in refused.said


@pytest.mark.slow
@pytest.mark.fault("E33", "two runs of one recipe publish the same bytes, the adapter's configuration too")
def test_two_runs_publish_the_same_bytes(tmp_path: Path) -> None:
    from tests.runs import ENVIRONMENT, train

    model = base(tmp_path)
    recipe = write_recipe(tmp_path, model, tuning={"kind": "lora", "rank": 2}, optimizer={"max_steps": 2})
    published: list[dict[str, bytes]] = []
    for seed in ("1", "2"):
        ENVIRONMENT["PYTHONHASHSEED"] = seed
        try:
            trained = train(recipe, "--fresh")
        finally:
            del ENVIRONMENT["PYTHONHASHSEED"]
        assert trained.returncode == 0, trained.stderr
        published.append({path.name: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()})
    assert published[0] == published[1]
