"""What is exported says the same to readers that did not write it, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from qwentune.exporting.merge import merge
from qwentune.exporting.package import keep_config, write_package
from qwentune.exporting.tensors import read_rows
from qwentune.exporting.whole import is_part, name_as_part, put_back
from qwentune.facts.towers import LOADED_ALONE
from qwentune.facts.weight_files import read_weights
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from qwentune.training.trainer import save_weights
from tests.families import SIZES, WRAPPED, write_family
from tests.runs import ENVIRONMENT
from tests.test_merge import tune

TEXT = "On shelf 1 stands a clock."
OLD_READER = ("transformers==4.55.4", "tokenizers==0.21.4", "huggingface_hub==0.36.2")
KNOWN_TO_IT = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_5_vl", "qwen2_audio")
# The class that config.json names reads each folder; its tokenizer the text.
READ = """
import json, sys
import torch, transformers
text, *folders = sys.argv[1:]
for folder in folders:
    config = json.load(open(f"{folder}/config.json"))
    (name,) = config["architectures"]
    kind = getattr(transformers, name)
    model, info = kind.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], (folder, info)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save((ids, model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits), f"{folder}/read.pt")
"""


@dataclass(frozen=True)
class Exported:
    """A folder as it is exported, and what the tuned model itself computes of the text."""

    folder: Path
    ids: Tensor
    logits: Tensor


def export(root: Path, model_type: str, kind: str) -> Exported:
    """A checkpoint with another `rope_theta` than libraries assume, tuned at random and exported whole."""
    from qwentune.data.tokenizing.tokenizer import load_tokenizer

    base, target = write_family(root / "base", model_type), root / f"{model_type}-{kind}"
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 50000.0'))
    has_media = model_type in WRAPPED and model_type not in LOADED_ALONE
    target.mkdir()
    tuned: Any
    if kind == "lora":
        adapter = tune(base, root / "adapter", Tuning(kind="lora", rank=4, alpha=1), [])
        merge(base, adapter, target)
        decoder = load_model(base, dtype="fp32", has_media=has_media)
        tuned = PeftModel.from_pretrained(decoder, str(adapter), autocast_adapter_dtype=False)
    else:
        tuned = load_model(base, dtype="fp32", has_media=has_media)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        save_weights(tuned, target)
        name_as_part(target)
    keep_config(target, base)
    tokenizer = load_tokenizer(base)
    template = (base / "chat_template.jinja").read_text()
    stop = tokenizer.control_ids["<|im_end|>"]
    write_package(target, base, chat_template=template, stop_token_ids=[stop], end_of_text_id=tokenizer.end_of_text_id)
    if kind == "full" and is_part(target, base):
        put_back(base, target)
    ids = torch.tensor(tokenizer.encode([TEXT]))
    with torch.no_grad():
        logits, untuned = (model.eval()(input_ids=ids).logits for model in (tuned, load_model(base, dtype="fp32")))
    assert float((logits - untuned).abs().max()) > 1e-3, "equality of what was not tuned would prove nothing"
    return Exported(target, ids, logits)


def read_elsewhere(exported: Sequence[Exported], **environment: str) -> None:
    """Asserts that another process reads from each folder what the tuned model is."""
    command = [sys.executable, "-c", READ, TEXT, *(str(each.folder) for each in exported)]
    read = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr[-3000:]
    for each in exported:
        ids, logits = torch.load(each.folder / "read.pt")
        assert torch.equal(ids, each.ids), each.folder
        difference = float((logits - each.logits).abs().max())
        assert difference <= 1e-5 * max(1.0, float(each.logits.abs().max())), (each.folder, difference)


def exports(root: Path, families: Sequence[str]) -> list[Exported]:
    """Every family with merged adapters and tuned whole."""
    found: list[Exported] = []
    for model_type in families:
        for kind in ("lora", "full"):
            folder = root / f"{model_type}-{kind}"
            folder.mkdir()
            found.append(export(folder, model_type, kind))
    return found


@pytest.mark.slow
def test_the_class_that_the_folder_declares_reads_the_tuned_model(tmp_path: Path) -> None:
    read_elsewhere(exports(tmp_path, (*SIZES, *WRAPPED)))


@pytest.mark.soak
def test_an_older_transformers_reads_the_tuned_model(tmp_path: Path) -> None:
    older = tmp_path / "older"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(older), *OLD_READER]
    subprocess.run(install, check=True)
    path = f"{older}:{ENVIRONMENT.get('PYTHONPATH', '')}".rstrip(":")
    read_elsewhere(exports(tmp_path, KNOWN_TO_IT), PYTHONPATH=path)


def forward(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a Qwen3 by the formulas of its paper, from the files alone; `rope_theta` where older readers look."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: read_rows(tensor).float() for name, tensor in read_weights(folder).items()}
    heads, kv, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width, count = config.get("head_dim", config["hidden_size"] // heads), ids.shape[1]
    angles = torch.outer(torch.arange(count), config["rope_theta"] ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[name]

    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    x = weights["model.embed_tokens.weight"][ids[0]]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        a = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (a @ weights[f"{at}self_attn.{name}_proj.weight"].T).view(count, -1, width).transpose(0, 1)
            for name in "qkv"
        )
        q, k = turned(norm(q, at + "self_attn.q_norm.weight")), turned(norm(k, at + "self_attn.k_norm.weight"))
        k, v = (each.repeat_interleave(heads // kv, 0) for each in (k, v))
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1) @ weights[at + "self_attn.o_proj.weight"].T
        a = norm(x, at + "post_attention_layernorm.weight")
        gate, up, down = (weights[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (functional.silu(a @ gate.T) * (a @ up.T)) @ down.T
    return norm(x, "model.norm.weight") @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reader_of_a_few_lines_computes_the_same(tmp_path: Path, kind: str) -> None:
    exported = export(tmp_path, "qwen3", kind)
    read = forward(exported.folder, exported.ids)
    torch.testing.assert_close(read[None], exported.logits, atol=1e-5, rtol=1e-5)
