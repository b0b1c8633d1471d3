"""Adapters: what they train, and that a base model learns the tokens that it is to stop with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwentune.exporting.merge import load_tuned, merge
from qwentune.model.adapters import add_adapters, load_adapters
from qwentune.model.loading import load_model
from qwentune.recipe import Tuning
from tests.checkpoints import add_weights, token_ids, write_checkpoint
from tests.runs import ENVIRONMENT, write_recipe
from tests.test_walk import CHAT_ROWS, ROOT
from tests.warm import Warm

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
EXPORT = "from qwentune import console, export; console.main(export.export)"
# Runs in a process that has never seen qwentune: greedy answers as a server gives them, at most 64 tokens each.
ANSWER = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
base, adapter, merged, *questions = sys.argv[1:]
for folder in (adapter, merged):
    model = AutoModelForCausalLM.from_pretrained(merged if folder == merged else base)
    if folder == adapter:
        model = PeftModel.from_pretrained(model, adapter)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1]:]
        print(json.dumps([folder, question, tokenizer.decode(ids)]))
"""


def test_the_experts_of_a_mixture_are_adapted_by_the_names_of_the_feed_forward_block(tmp_path: Path) -> None:
    model = load_model(add_weights(write_checkpoint(tmp_path, "qwen3_moe")), dtype="fp32")
    adapted = add_adapters(model, Tuning(kind="lora", targets=["gate_proj", "up_proj", "down_proj"]), "fp32")
    assert {name.split(".mlp.")[1].split(".")[0] for name, x in adapted.named_parameters() if x.requires_grad} == {
        "experts"
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_untaught_tokens_are_trained_saved_and_merged(tmp_path: Path, tied: bool) -> None:
    base = add_weights(write_checkpoint(tmp_path / "base", "qwen3", tied=tied, eos="<|endoftext|>"))
    token = token_ids(base)["<|im_end|>"]
    adapted = add_adapters(load_model(base, dtype="fp32"), Tuning(kind="lora"), "fp32", [token])
    ids = torch.tensor([[5, token, 9]])
    rows = {name: row for name, row in adapted.named_parameters() if "trainable_tokens_delta" in name}
    before = {name: row.detach().clone() for name, row in rows.items()}
    assert len(rows) == (1 if tied else 2)  # of the embedding and, where it has its own, of the head
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        logits = adapted(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[0], torch.tensor([token] * 3)).backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        after = adapted(input_ids=ids).logits
        assert not any(torch.equal(row, before[name]) for name, row in rows.items())
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        reloaded = load_adapters(load_model(base, dtype="fp32"), tmp_path / "adapter", "fp32").eval()
        assert torch.equal(reloaded(input_ids=ids).logits, after)

        (tmp_path / "merged").mkdir()
        shutil.copyfile(base / "config.json", tmp_path / "merged" / "config.json")
        merge(base, tmp_path / "adapter", tmp_path / "merged")
        merged = load_tuned(tmp_path / "merged", None)
        # Beside 1e-5 a share of the value: three steps at this rate put logits near 8, and kernels round otherwise
        # from one processor to the next.
        torch.testing.assert_close(merged(input_ids=ids).logits, after, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes())["tie_word_embeddings"] is tied


def test_adapters_finer_than_their_base_are_read_as_they_were_saved(tmp_path: Path) -> None:
    base = add_weights(write_checkpoint(tmp_path / "base", "qwen3"))
    adapted = add_adapters(load_model(base, dtype="bf16"), Tuning(kind="lora", variant="dora"), "fp32")
    trained = {name: x for name, x in adapted.named_parameters() if x.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter.data)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    read = dict(load_adapters(load_model(base, dtype="bf16"), tmp_path / "adapter", "fp32").named_parameters())
    assert all(torch.equal(read[name], parameter) for name, parameter in trained.items())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("eos", "learns"), [("<|endoftext|>", True), ("<|im_end|>", False)])
def test_a_base_checkpoint_learns_its_stop_token_and_a_chat_checkpoint_knows_it(
    tmp_path: Path, warm: Warm, eos: str, learns: bool
) -> None:
    base = add_weights(write_checkpoint(tmp_path / "base", "qwen2", eos=eos))
    recipe = write_recipe(tmp_path, base, tuning=LORA, optimizer={"max_steps": 3})
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    run = tmp_path / "run"
    rows = [name for name in load_file(run / "adapter" / "adapter_model.safetensors") if "token_adapter" in name]
    assert bool(rows) is learns
    generation = json.loads((run / "adapter" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == token_ids(base)["<|im_end|>"]
    if not learns:
        return
    exported = warm.train(run, "--merge", "--verify", code=EXPORT)
    assert exported.code == 0, exported.said


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_tuned_base_model_stops_by_itself(tmp_path: Path, tied: bool, warm: Warm) -> None:
    base = base_model(tmp_path / "base", tied)
    recipe = write_recipe(
        tmp_path,
        base,
        tuning={"kind": "lora", "rank": 32, "alpha": 64},
        data={"train": str(ROOT / "data_templates" / "chat.jsonl"), "packing": False},
        batch={"sequences_per_step": 12},
        optimizer={"max_steps": 100, "learning_rate": 3e-3},
        output={"save_every_steps": 1000},
    )
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    run = tmp_path / "run"
    for options in ([], ["--merge"]):
        exported = warm.train(run, *options, code=EXPORT)
        assert exported.code == 0, exported.said
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in CHAT_ROWS[:4]}
    folders = [str(run / "export"), str(run / "merged")]
    command = [sys.executable, "-c", ANSWER, str(base), *folders, *answers]
    served = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in served.stdout.splitlines()]
    assert said == [[folder, q, f"{a}<|im_end|>"] for folder in folders for q, a in answers.items()]


def base_model(folder: Path, tied: bool) -> Path:
    """A base checkpoint as published: it stops at the end of a text, and its chat tokens are all alike, untaught."""
    base = add_weights(write_checkpoint(folder, "qwen2", tied=tied, eos="<|endoftext|>"))
    weights = load_file(base / "model.safetensors")
    untaught = [token for name, token in token_ids(base).items() if name != "<|endoftext|>"]
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        weights[name][untaught] = weights[name][untaught[0]].clone()
    weights["model.norm.weight"] *= 10  # a frozen head of small random rows is never sure of a token
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base
