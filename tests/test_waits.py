"""Between two log points nothing is read from the device, for which a host would wait, and no module tree is walked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qwentune.memory.settings import Settings
from qwentune.memory.trace.meta_step import meta_batch
from qwentune.memory.trace.stand_ins import no_autocast
from qwentune.model.adapters import add_adapters
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.head import LossHead
from qwentune.recipe import Tuning
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import write_recipe
from tests.warm import Warm

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
# Eager attention, since what sdpa does on a CPU alone would count; on meta tensors it is tried below.
COUNT = """
import json, sys, traceback
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from qwentune import console, train
from qwentune.training.trainer import SftTrainer

found, walks, speaks, file = [], [], [0], Path(sys.argv.pop(1))
named_modules = torch.nn.Module.named_modules

def walked(self, memo=None, *args, **kwargs):
    if memo is None and len(steps) > 1 and not speaks[0]:  # the first step may look for what never changes
        walks.append("".join(traceback.format_stack(limit=6)))
    return named_modules(self, memo, *args, **kwargs)

torch.nn.Module.named_modules = walked

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        if reads and steps and not speaks[0]:  # before, the loader draws its seed, on the CPU
            found.append(str(func) + "".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))

step, log, begin = SftTrainer.training_step, SftTrainer._maybe_log_save_evaluate, SftTrainer._run_epoch
steps = []

def logged(self, *args, **kwargs):
    speaks[0] += self.control.should_log
    log(self, *args, **kwargs)
    speaks[0] = 0

def stepped(self, *args, **kwargs):
    steps.append(self.state.global_step)
    return step(self, *args, **kwargs)

def begun(self, *args, **kwargs):
    with Counting():
        begin(self, *args, **kwargs)

SftTrainer._maybe_log_save_evaluate, SftTrainer.training_step, SftTrainer._run_epoch = logged, stepped, begun
try:
    console.main(train.train)
finally:
    file.write_text(json.dumps({"found": found, "steps": steps, "walks": walks}))
"""


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize(
    ("tuning", "precision"),
    [
        ({}, {}),
        ({}, {"weights": "bf16", "optimizer_state": "8bit"}),
        (LORA, {"weights": "bf16", "adapters": "bf16"}),
    ],
    ids=["fp32", "8bit", "adapters"],
)
def test_a_run_reads_nothing_between_two_log_points(
    tmp_path: Path, warm: Warm, tuning: dict[str, Any], precision: dict[str, str], eos: str
) -> None:
    """A base model's adapters train the rows of its stop tokens too."""
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3", eos=eos))
    recipe = write_recipe(
        tmp_path,
        model,
        tuning=tuning,
        precision=precision,
        memory={"attention": "eager"},
        batch={"micro_batch": 2},
        optimizer={"max_steps": 6},
        output={"log_every_steps": 3, "save_every_steps": 6},
    )
    counted = tmp_path / "counted.json"
    run = warm.train(recipe, code=COUNT, given=[str(counted)])
    assert run.code == 0, run.said
    counts = json.loads(counted.read_text())
    assert counts["steps"] == [step for step in range(6) for _ in range(2)]
    assert counts["found"] == []
    assert counts["walks"] == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(0 < row["update_ratio"] < 0.1 for row in rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [(), (3, 7)])
def test_forward_and_backward_run_without_a_value(qwen3_folder: Path, attention: str, rows: tuple[int, ...]) -> None:
    """Meta tensors have none, so that reading one raises."""
    from transformers import AutoModelForCausalLM

    settings = Settings(
        "lora", 64, 2, 1, False, "supervised", "sdpa", "none", 1, "bf16", "bf16", "fp32", 4, "all-linear", branches=True
    )
    implementation = IMPLEMENTATIONS[attention]
    config = AutoConfig.from_pretrained(qwen3_folder)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=implementation)
        network.config.use_cache = False
        adapted = add_adapters(network, Tuning.model_validate(LORA), "bf16", rows).train()
    with no_autocast():
        LossHead(adapted, "supervised").loss(adapted, meta_batch(settings)).backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
