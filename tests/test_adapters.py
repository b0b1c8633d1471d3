"""Adapters: what they train, and that a base model learns the tokens that it is to stop with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwentune.errors import RecipeError
from qwentune.exporting.merge import load_tuned, merge
from qwentune.model.adapters import add_adapters, load_adapters
from qwentune.model.load import load_model
from qwentune.recipe import Tuning
from tests.checkpoints import add_weights, token_ids, write_checkpoint
from tests.runs import train, write_recipe
from tests.test_walk import run_command

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def test_a_target_that_names_no_module_is_refused(tmp_path: Path) -> None:
    model = load_model(add_weights(write_checkpoint(tmp_path, "qwen3")), dtype="fp32")
    with pytest.raises(RecipeError, match="c_attn"):
        add_adapters(model, Tuning(kind="lora", targets=["q_proj", "c_attn"]), "fp32")


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

        merge(base, tmp_path / "adapter", tmp_path / "merged")
        merged = load_tuned(tmp_path / "merged", None)
        # Beside 1e-5 a share of the value: three steps at this rate put logits near 8, and kernels round otherwise
        # from one processor to the next.
        torch.testing.assert_close(merged(input_ids=ids).logits, after, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes())["tie_word_embeddings"] is tied


@pytest.mark.slow
@pytest.mark.parametrize(("eos", "learns"), [("<|endoftext|>", True), ("<|im_end|>", False)])
def test_a_base_checkpoint_learns_its_stop_token_and_a_chat_checkpoint_knows_it(
    tmp_path: Path, eos: str, learns: bool
) -> None:
    base = add_weights(write_checkpoint(tmp_path / "base", "qwen2", eos=eos))
    recipe = write_recipe(tmp_path, base, tuning=LORA, optimizer={"max_steps": 3})
    trained = train(recipe)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "run"
    rows = [name for name in load_file(run / "adapter" / "adapter_model.safetensors") if "token_adapter" in name]
    assert bool(rows) is learns
    generation = json.loads((run / "adapter" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == token_ids(base)["<|im_end|>"]
    if not learns:
        return
    exported = run_command("export", str(run), "--merge", "--verify")
    assert exported.returncode == 0, exported.stderr
