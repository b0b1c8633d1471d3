"""The same recipe gives the same run under every launch file, and 16 bits move the weights as fp32 does.

python tests/test_one_mathematics.py        prints the table of the README
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.runs import write_recipe
from tests.warm import Warm

LAUNCHES = ("single", "cpu-2", "fsdp2", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
MODELS: tuple[ModelType, ...] = ("qwen2", "qwen3", "qwen3_moe")
NUM_STEPS = 30


def trained(warm: Warm, folder: Path, model: Path, launch: str, weights: str, *overrides: str) -> Path:
    """The folder of a finished run, of thirty steps unless the overrides say otherwise."""
    place = folder / f"{launch}-{weights}"
    place.mkdir()
    recipe = write_recipe(
        place,
        model,
        optimizer={"max_steps": NUM_STEPS, "learning_rate": 1e-4},
        batch={"micro_batch": 1},
        precision={"weights": weights},
        output={"save_every_steps": NUM_STEPS, "keep": 1},
    )
    ended = warm.train(recipe, *overrides, launch=None if launch == "single" else launch)
    assert ended.code == 0, ended.said
    return place / "run"


def metric(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def way_along(run: Path, reference: Path, base: Path) -> float:
    """How far a bf16 run has come along the way of the fp32 run, as a share of that way."""
    import torch

    begun, moved, straight = _weights(base), _weights(run / "model"), _weights(reference / "model")
    along = length = 0.0
    for name, start in begun.items():
        way = straight[name].double() - start.double()
        step = moved[name].double() - start.to(torch.bfloat16).double()
        along += float((step * way).sum())
        length += float((way * way).sum())
    return along / length


def _weights(folder: Path) -> Mapping[str, object]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def farthest(one: list[float], other: list[float]) -> float:
    """The largest relative distance of two series."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.slow if name == "qwen3" else pytest.mark.soak) for name in MODELS],
)
def test_every_launch_file_gives_the_same_run_and_bf16_goes_the_way_of_fp32(
    tmp_path: Path, warm: Warm, model_type: ModelType
) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", model_type))
    reference = trained(warm, tmp_path, model, "single", "fp32")
    for launch in LAUNCHES:
        if launch != "single":
            exact = trained(warm, tmp_path, model, launch, "fp32")
            assert farthest(metric(exact, "loss"), metric(reference, "loss")) < 1e-5, launch
            assert farthest(metric(exact, "update_ratio"), metric(reference, "update_ratio")) < 1e-3, launch
        rounded = trained(warm, tmp_path, model, launch, "bf16")
        assert way_along(rounded, reference, model) == pytest.approx(1, abs=0.03), launch
        assert farthest(metric(rounded, "update_ratio"), metric(reference, "update_ratio")) < 0.05, launch


# After each micro-batch whether a rank holds sums alone: no gradient beside them, neither sharded nor whole.
HELD = """
from torch.distributed.fsdp import FSDPModule
from qwentune import console, train
from qwentune.training.step import ExactStep
stepped = ExactStep.training_step
def looked_at(self, model, inputs, num_items_in_batch=None):
    loss = stepped(self, model, inputs, num_items_in_batch)
    trained = [x for x in model.parameters() if x.requires_grad]
    whole = [
        each
        for module in model.modules()
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None
        for each in group.fsdp_params
        if each.unsharded_accumulated_grad is not None
    ]
    assert not whole, "whole gradients wait on a rank"
    assert all(x.grad is None for x in trained)
    assert len(self.adamw.sums) == len(trained), "sums are in fp32 from the first micro-batch on"
    return loss
ExactStep.training_step = looked_at
console.main(train.train)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu-2", "fsdp2"])
def test_a_rank_holds_sums_alone_between_many_micro_batches(tmp_path: Path, warm: Warm, launch: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    sections: dict[str, Any] = {"precision": {"weights": "bf16"}, "optimizer": {"max_steps": 1}}
    recipe = write_recipe(tmp_path, model, batch={"sequences_per_step": 80, "micro_batch": 1}, **sections)
    ended = warm.train(recipe, code=HELD, launch=launch)
    assert ended.code == 0, ended.said


@pytest.mark.slow
def test_sums_of_many_micro_batches_are_the_same_on_one_rank_and_on_two(tmp_path: Path, warm: Warm) -> None:
    """Above 32 micro-batches gradients in bf16 are added up in fp32, of which each of DDP's ranks has its own.

    After each micro-batch a rank holds the sums alone, also under FSDP2, which may put off sharing gradients out.
    """
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    many = ("batch.sequences_per_step=80", "optimizer.max_steps=3")
    alone = trained(warm, tmp_path, model, "single", "bf16", *many)
    for launch in ("cpu-2", "fsdp2", "zero1"):
        together = trained(warm, tmp_path, model, launch, "bf16", *many)
        plan = json.loads((together / "plan.json").read_text())
        assert plan["choices"]["accumulation"] == 40
        for name in ("loss", "grad_norm", "update_ratio"):
            assert farthest(metric(together, name), metric(alone, name)) < 1e-3, (launch, name)


@pytest.mark.soak
def test_faster_b_matrices_are_as_fast_under_every_way_to_share(tmp_path: Path, warm: Warm) -> None:
    """LoRA+; how much it moves, one process shows in `test_lora_plus.py`."""
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    lora = ("tuning.kind=lora", "optimizer.lora_plus_ratio=16", "optimizer.max_steps=6")
    alone = trained(warm, tmp_path, model, "single", "fp32", *lora)
    for launch in ("cpu-2", "fsdp2", "zero2", "zero3"):
        together = trained(warm, tmp_path, model, launch, "fp32", *lora)
        for name, apart in (("loss", 1e-5), ("update_ratio", 1e-3), ("learning_rate", 1e-12)):
            assert farthest(metric(together, name), metric(alone, name)) < apart, (launch, name)


if __name__ == "__main__":
    warm, long = Warm(), ("optimizer.max_steps=60", "output.save_every_steps=60")
    for model_type in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = add_weights(write_checkpoint(folder / "model", model_type))
            alone = {weights: trained(warm, folder, model, "single", weights, *long) for weights in ("fp32", "bf16")}
            for launch in LAUNCHES:
                runs = alone
                if launch != "single":
                    runs = {weights: trained(warm, folder, model, launch, weights, *long) for weights in alone}
                along = way_along(runs["bf16"], alone["fp32"], model)
                apart = [
                    farthest(metric(runs[weights], "loss"), metric(alone[weights], "loss"))
                    for weights in ("fp32", "bf16")
                ]
                print(
                    f"{model_type} {launch}: along {along:.4f}, losses apart fp32 {apart[0]:.1e}, bf16 {apart[1]:.1e}"
                )
