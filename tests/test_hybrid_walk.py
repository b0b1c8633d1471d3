"""The whole walk of a hybrid: a tiny Qwen3.5 with a vision tower is tuned, killed, resumed, merged and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwentune.exporting.changes import PREFIX, place
from qwentune.facts.weight_files import read_adapter, read_weights
from tests import qwen3_5
from tests.checkpoints import SMALL_NUM_RANKS, template_text, token_ids
from tests.runs import ENVIRONMENT, KILL_AT, KILLED, final_weights, loss_history, write_recipe
from tests.test_adapters import EXPORT
from tests.test_facts import HYBRID_CONFIG, VISION
from tests.test_walk import LORA
from tests.warm import Warm

# Runs in a process that has never seen qwentune: the merged decoder against the adapter on the base's.
COMPARE = """
import sys, torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
base, adapter, merged = sys.argv[1:]
whole = AutoConfig.from_pretrained(base)
text = whole.get_text_config()
text.tie_word_embeddings = whole.tie_word_embeddings  # which transformers looks for in the decoder's part alone
untuned = AutoModelForCausalLM.from_pretrained(base, config=text, dtype=torch.float32).eval()
result = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(merged)
text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello! " * 40}], tokenize=False)
ids = torch.tensor([tokenizer(text)["input_ids"]])
with torch.no_grad():
    before = untuned(ids).logits.clone()
    tuned = PeftModel.from_pretrained(untuned, adapter).eval()
    print(float((tuned(ids).logits - result(ids).logits).abs().max()), float((before - result(ids).logits).abs().max()))
"""


def write_hybrid(folder: Path) -> Path:
    """A checkpoint as Qwen3.5 is published: own tokenizer and template, decoder and vision tower, random weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    qwen3_5.write_tokenizer(folder, SMALL_NUM_RANKS)
    (folder / "chat_template.jinja").write_text(template_text("qwen3_5_think"), encoding="utf-8")
    ids = token_ids(folder)
    text = {key: value for key, value in HYBRID_CONFIG.items() if key not in ("model_type", "tie_word_embeddings")}
    text |= {"vocab_size": -(-(max(ids.values()) + 1) // 64) * 64, "max_position_embeddings": 4096}
    text |= {"eos_token_id": ids["<|im_end|>"]}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=VISION, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_hybrid_is_tuned_resumed_merged_and_loaded_again(tmp_path: Path, warm: Warm) -> None:
    model = write_hybrid(tmp_path / "model")
    recipe = write_recipe(
        tmp_path,
        model,
        tuning=LORA,
        data={"packing": False, "max_tokens": 256},
        batch={"sequences_per_step": 2},
        optimizer={"max_steps": 6, "learning_rate": 5e-3},
        output={"save_every_steps": 2},
    )
    run = tmp_path / "run"
    straight = warm.train(recipe)
    assert straight.code == 0, straight.said
    undisturbed = loss_history(run), final_weights(run)
    run.rename(tmp_path / "undisturbed")

    assert warm.train(recipe, code=KILL_AT, given=["5"]).code == KILLED
    resumed = warm.train(recipe)
    assert resumed.code == 0, resumed.said
    assert "from step 4" in resumed.said
    assert (loss_history(run), final_weights(run)) == undisturbed

    exported = warm.train(run, "--merge", "--verify", code=EXPORT)
    assert exported.code == 0, exported.said
    assert "verified" in exported.said
    base, merged = ({place(name): name for name in read_weights(each)} for each in (model, run / "merged"))
    assert merged == base, "the whole model that it came from, under its own names"
    assert "model.visual.patch_embed.proj.weight" in merged.values()
    assert json.loads((run / "merged" / "config.json").read_text())["architectures"] == [
        "Qwen3_5ForConditionalGeneration"
    ]
    adapter = warm.train(run, "--verify", code=EXPORT)
    assert adapter.code == 0, adapter.said
    modules = {name.removeprefix(PREFIX).split(".lora_")[0] + ".weight" for name in read_adapter(run / "export")}
    assert modules <= set(base.values()), "an adapter names modules of the class that a server loads"
    folders = [str(folder) for folder in (model, run / "adapter", run / "merged")]
    compared = subprocess.run(
        [sys.executable, "-c", COMPARE, *folders], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert compared.returncode == 0, compared.stderr
    difference, learnt = map(float, compared.stdout.split())
    assert difference <= 1e-5
    assert learnt > 1e-3, "the adapter changed nothing, so equality would prove nothing"

    text = warm.train(run, "--merge", "--text-only", "--verify", "-o", str(tmp_path / "text"), code=EXPORT)
    assert text.code == 0, text.said
    assert "verified: largest difference" in text.said
    alone = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (alone["architectures"], alone["model_type"]) == (["Qwen3_5ForCausalLM"], "qwen3_5_text")
    names = {name.replace("model.language_model.", "model.") for name in base.values() if "visual" not in name}
    assert {*read_weights(tmp_path / "text")} == names - ({"lm_head.weight"} if alone["tie_word_embeddings"] else set())
    refused = warm.train(run, "--text-only", "-o", str(tmp_path / "adapter"), code=EXPORT)
    assert (refused.code, "Add --merge" in refused.said) == (2, True), refused.said

    losses: list[list[tuple[float, ...]]] = []
    for number, start in enumerate((run / "adapter", run / "export")):  # named for the part, and for the whole
        folder = tmp_path / f"continued-{number}"
        folder.mkdir()
        continued = write_recipe(
            folder,
            model,
            tuning={"kind": "lora", "start_from": str(start)},
            data={"packing": False, "max_tokens": 256},
            batch={"sequences_per_step": 2},
            optimizer={"max_steps": 2},
        )
        done = warm.train(continued)
        assert done.code == 0, done.said
        losses.append(loss_history(folder / "run"))
    assert losses[0] == losses[1]
