"""Merging streams the base's files: bit for bit what PEFT's merge gives, under the base's names, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwentune.errors import ResumeError
from qwentune.exporting.changes import place
from qwentune.exporting.config_keys import kept_part_config
from qwentune.exporting.merge import largest_logit_difference, merge
from qwentune.exporting.package import keep_config
from qwentune.exporting.tensors import read_rows
from qwentune.exporting.whole import name_as_part, put_back
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_weights
from qwentune.model.adapters import add_adapters
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from qwentune.training.trainer import save_weights
from tests.checkpoints import add_weights, token_ids, write_checkpoint
from tests.families import write_family
from tests.runs import ENVIRONMENT

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def tune(base: Path, target: Path, tuning: Tuning, tokens: list[int]) -> Path:
    """An adapter whose every tensor is random, as if it had been trained."""
    adapted = add_adapters(load_model(base, dtype="fp32"), tuning, "fp32", tokens)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_weights(adapted, target)
    return target


def by_peft(base: Path, adapter: Path, target: Path) -> dict[str, torch.Tensor]:
    """The merged tensors by place, as PEFT makes them of a whole model in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).merge_and_unload(True)
    merged.save_pretrained(target)
    return {place(name): read_rows(tensor) for name, tensor in read_weights(target).items()}


@pytest.mark.parametrize(
    ("model_type", "dtype", "tuning", "has_tokens", "tied"),
    [
        ("qwen2", "bfloat16", {}, True, True),
        ("qwen3", "bfloat16", {"variant": "dora"}, True, False),
        ("qwen3", "float32", {"variant": "rslora", "targets": ["embed_tokens", "lm_head", "q_proj"]}, False, False),
        pytest.param(
            "qwen3",
            "float16",
            {"variant": "dora", "targets": ["v_proj", "lm_head"]},
            False,
            False,
            marks=pytest.mark.slow,
        ),
        ("qwen3_moe", "bfloat16", {"targets": [*FEED_FORWARD, "gate", "q_proj"]}, True, True),
        pytest.param("qwen3_next", "bfloat16", {}, False, False, marks=pytest.mark.slow),
        ("qwen3_5_text", "float32", {}, False, True),
        ("qwen3_5_moe_text", "bfloat16", {}, False, False),
    ],
)
def test_merged_weights_are_those_of_peft_under_the_names_of_the_base(
    tmp_path: Path, model_type: str, dtype: str, tuning: dict[str, Any], has_tokens: bool, tied: bool
) -> None:
    base = write_family(tmp_path / "base", model_type, dtype=dtype, tied=tied)
    tokens = [*token_ids(base).values()][-3:] if has_tokens else []
    adapter = tune(base, tmp_path / "adapter", Tuning(kind="lora", rank=4, **tuning), tokens)
    (tmp_path / "merged").mkdir()
    merge(base, adapter, tmp_path / "merged")
    stored, merged = read_weights(base), read_weights(tmp_path / "merged")
    assert {n: (t.dtype, t.shape, t.file.name) for n, t in stored.items()} == {
        n: (t.dtype, t.shape, t.file.name) for n, t in merged.items()
    }
    expected = by_peft(base, adapter, tmp_path / "peft")
    changed = 0
    for name, tensor in merged.items():
        rows = read_rows(tensor)
        assert torch.equal(rows, expected[place(name)].to(rows.dtype)), name
        changed += not torch.equal(rows, read_rows(stored[name]))
    assert changed >= 2 + has_tokens


def test_an_adapter_of_a_head_that_is_the_embedding_is_not_merged(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "qwen2", tied=True)
    adapter = tune(base, tmp_path / "adapter", Tuning(kind="lora", rank=2, targets=["lm_head"]), [])
    with pytest.raises(ResumeError, match="merging would change both"):
        merge(base, adapter, tmp_path)


def test_weights_that_would_not_be_finite_are_not_merged(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "qwen2")
    adapter = tune(base, tmp_path / "adapter", Tuning(kind="lora", rank=2), [])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("inf")
    save_file(tensors, adapter / ADAPTER_WEIGHTS, {"format": "pt"})
    (tmp_path / "merged").mkdir()
    with pytest.raises(ResumeError, match="no number"):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_a_decoder_tuned_alone_goes_back_under_the_names_of_the_whole(tmp_path: Path, model_type: str) -> None:
    base = write_family(tmp_path / "base", model_type)
    decoder = load_model(base, dtype="fp32")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(1.0)
    save_weights(decoder, tmp_path / "tuned")
    name_as_part(tmp_path / "tuned")
    of_the_decoder = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    assert all(name.startswith(of_the_decoder) for name in read_weights(tmp_path / "tuned"))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), again.parameters(), strict=True))
    put_back(base, tmp_path / "tuned")
    before, after = read_weights(base), read_weights(tmp_path / "tuned")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {name for name in before if not torch.equal(read_rows(before[name]), read_rows(after[name]))}
    assert changed == {name for name in before if ".visual." not in name}


def test_config_keeps_the_keys_of_the_base_and_what_became_of_them(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "qwen2")
    old: dict[str, Any] = json.loads((base / "config.json").read_text()) | {"rope_theta": 543210.0}
    old["rope_scaling"] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    (base / "config.json").write_text(json.dumps(old))
    AutoConfig.from_pretrained(base).save_pretrained(tmp_path / "full")
    assert "rope_theta" not in json.loads((tmp_path / "full" / "config.json").read_text()), "what is to be mended"
    (tmp_path / "merged").mkdir()
    for folder in (tmp_path / "full", tmp_path / "merged"):
        keep_config(folder, base)
        new = json.loads((folder / "config.json").read_text())
        assert new.items() >= old.items()
        assert new["rope_parameters"] == {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "rope_theta": 543210.0,
        }
        assert new["dtype"] == new["torch_dtype"] == "float32"
        assert AutoConfig.from_pretrained(folder).rope_parameters == AutoConfig.from_pretrained(base).rope_parameters


def test_config_of_a_part_keeps_the_keys_of_its_section() -> None:
    section = {"model_type": "qwen3_5_text", "rope_theta": 7.0, "torch_dtype": "float16", "hidden_size": 8}
    saved = {"model_type": "qwen3_5_text", "architectures": ["A"], "hidden_size": 8, "dtype": "float16"}
    kept = kept_part_config({"model_type": "qwen3_5", "text_config": section}, saved)
    assert kept.items() >= section.items()
    assert kept["architectures"] == ["A"]
    assert kept["rope_parameters"] == {"rope_type": "default", "rope_theta": 7.0}


MEASURE = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from qwentune.exporting.gguf_file import write_gguf
from qwentune.exporting.merge import merge, tuned_tensors
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.facts.documents import read_object
from qwentune.facts.models import model_spec
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, adapter, target = map(Path, sys.argv[1:])
tokenizer, start = load_tokenizer(base), peak()
merge(base, adapter, target)
merged = peak()
write_gguf(target / "x.gguf", "q8_0", tuned_tensors(base, adapter), spec=model_spec(str(base)),
           config=read_object(base / "config.json"), tokenizer=tokenizer, chat_template=None, stops=[1])
print(merged - start, peak() - start)
"""


@pytest.mark.slow
def test_merging_and_gguf_take_less_memory_than_two_and_a_half_of_the_largest_tensor(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "qwen2", tied=True)
    config = json.loads((base / "config.json").read_text()) | {"hidden_size": 1024, "vocab_size": 2**16}
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    add_weights(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    largest = 2 * 2**16 * 1024
    assert max(tensor.num_bytes for tensor in read_weights(base).values()) == largest
    tuning = Tuning(kind="lora", rank=8, targets=["embed_tokens", "q_proj", "up_proj"])
    adapter = tune(base, tmp_path / "adapter", tuning, [])
    (tmp_path / "merged").mkdir()
    paths = [str(path) for path in (base, adapter, tmp_path / "merged")]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert measured.returncode == 0, measured.stderr
    merging, writing = map(int, measured.stdout.split())
    assert max(merging, writing) <= 2.5 * largest


def test_models_on_two_devices_are_compared_on_neither() -> None:
    """As the 4-bit model of a run on a card and what is exported on the host."""

    class Elsewhere:
        dtype = torch.float32

        def __init__(self, device: str) -> None:
            self.device, self.given = torch.device(device), list[torch.device]()

        def __call__(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> Any:
            self.given += [input_ids.device, pixel_values.device]
            return SimpleNamespace(logits=torch.ones(1, 3, 5, dtype=torch.bfloat16))

    here, there = Elsewhere("cpu"), Elsewhere("meta")
    prompt = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "pixel_values": torch.zeros(2, 2)}
    assert largest_logit_difference(here, there, [prompt]) == (0.0, 1.0)  # type: ignore[arg-type]
    assert {*here.given} == {here.device}
    assert {*there.given} == {there.device}
