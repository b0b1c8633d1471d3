"""The folder of a run as training leaves it, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.exporting.package import copy_weights, write_package
from qwentune.exporting.processors import is_whole, write_processors
from qwentune.recipe import MediaOptions
from qwentune.training.trainer import save_weights


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


def finished_run(run: Path, model: Path, *, data: dict[str, Any], lora: bool = False) -> Path:
    """A run on a model that ends with the model's own weights, or with adapters of random numbers."""
    target = run / ("adapter" if lora else "model")
    target.mkdir(parents=True)
    if lora:
        network = AutoModelForCausalLM.from_pretrained(model)
        rows = {"embed_tokens": [7, 8], "lm_head": [7, 8]}
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", trainable_token_indices=rows)
        adapted = get_peft_model(network, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.1)
        save_weights(adapted, target)
    else:
        copy_weights(model, target)
    tokenizer = load_tokenizer(model)
    end = tokenizer.end_of_text_id
    write_package(target, model, chat_template=tokenizer.chat_template, stop_token_ids=[end], end_of_text_id=end)
    if is_whole(target):
        write_processors(target, model, MediaOptions())
    kind = "lora" if lora else "full"
    recipe = {"model": str(model), "tuning": {"kind": kind}, "data": {"max_tokens": 512, **data}}
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    report = {"template": None, "modes": {}, "stop_tokens": {}}
    (run / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    return run
