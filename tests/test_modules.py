"""The names of adaptable modules: those of transformers' classes, met by PEFT as the recipe means them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qwentune import plan, preview, supervise, train
from qwentune.errors import UsageError, UserError
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.models import MODELS, config_of
from qwentune.facts.modules import adaptable_modules, adapted_modules, unknown_targets
from qwentune.memory import HostMemory, PlanRequest, make_plan
from qwentune.training.command_line import Request
from tests.test_mistakes import GOOD_ROW

DENSE = MODELS["Qwen/Qwen3-0.6B"]
EVERY_KIND = (
    *("Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen3-30B-A3B"),
    *("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-35B-A3B"),
)


def hollow(spec: ModelSpec) -> PreTrainedModel:
    """The model's own class with the fewest layers that repeat it, on the meta device."""
    sizes = config_of(spec) | {"num_hidden_layers": spec.period}
    if spec.moe is not None:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def of_kind(names: object) -> set[str]:
    """Names without the numbers of layers, and without layers where all are meant."""
    return {re.sub(r"model\.layers\.\d+\.(?=mlp\.(experts\.|gate$))|(?<=layers\.)\d+", "", str(name)) for name in names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", EVERY_KIND)
def test_the_table_names_every_linear_module_of_the_class(model: str) -> None:
    spec = MODELS[model]
    found = {name for name, module in hollow(spec).named_modules() if isinstance(module, torch.nn.Linear)}
    listed = of_kind(adaptable_modules(spec))
    fused = {name for name in listed if name.startswith("mlp.")}
    shared = {name for name in of_kind(found) if "shared_expert." in name} if fused else set()
    assert listed - fused - {"model.embed_tokens"} == of_kind(found) - shared


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen3-Next-80B-A3B-Instruct"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "self_attn.o_proj"]])
def test_peft_adapts_what_the_table_says(model: str, targets: str | list[str]) -> None:
    spec = MODELS[model]
    with torch.device("meta"):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
        adapted = get_peft_model(hollow(spec), config, autocast_adapter_dtype=False)
    names = {
        name.split(".lora_A")[0].split("base_model.model.")[1] for name in adapted.state_dict() if "lora_A" in name
    }
    listed = of_kind(adapted_modules(spec, targets))
    experts = {name for name in listed if name.startswith("mlp.experts.")}
    # Gate and up are one tensor, around which stands the adapter of down.
    assert bool(experts) == any(name.endswith("mlp.experts") for name in names)
    assert listed - experts == {name for name in of_kind(names) if "experts" not in name or "shared" in name}


@pytest.mark.parametrize(
    ("model", "target", "nearest"),
    [
        ("Qwen/Qwen3-0.6B", "qproj", "q_proj"),
        ("Qwen/Qwen3-0.6B", "Q_PROJ", "q_proj"),
        ("Qwen/Qwen3-0.6B", "down_projj", "down_proj"),
        ("Qwen/Qwen3-0.6B", "self_atn.q_proj", "self_attn.q_proj"),
        ("Qwen/Qwen3-0.6B", "linear_fc1x", ""),
        ("Qwen/Qwen3-0.6B", "in_proj_qkv", "down_proj"),  # of hybrids
        ("Qwen/Qwen3-0.6B", "layers.28.mlp.up_proj", "layers.8.mlp.up_proj"),  # counted from 0
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "in_proj_qkv", "in_proj_qkvz"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "shared_expert.up_proj", "experts.up_proj"),  # PEFT takes it for these
        ("Qwen/Qwen3.5-9B", "experts.up_proj", "mlp.up_proj"),
    ],
)
def test_a_target_that_no_module_has_is_named_with_the_nearest(model: str, target: str, nearest: str) -> None:
    (problem,) = unknown_targets(MODELS[model], ["q_proj", target])
    assert problem.where == "tuning.targets.1"
    assert f"'{target}'" in problem.what
    assert (f"Did you mean '{nearest}'?" in problem.what) if nearest else ("Did you mean" not in problem.what)


@pytest.mark.parametrize("target", ["q_proj", "mlp.up_proj", "layers.27.self_attn.v_proj", "lm_head", "embed_tokens"])
def test_a_target_that_a_module_has_is_taken(target: str) -> None:
    assert unknown_targets(DENSE, [target]) == []


def test_every_wrong_target_has_its_place(tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{GOOD_ROW}\n")
    Path("recipe.yaml").write_text(
        f"model: {qwen3_folder}\n"
        "tuning:\n  kind: lora\n  targets:\n    - qproj\n    - k_proj\n    - down_projj\n"
        "data: {train: rows.jsonl}\n"
    )
    commands: list[Callable[[], int]] = [
        lambda: plan.run("recipe.yaml", ["hardware.gpu=cpu"], None, None, as_json=False, trace=False),
        lambda: preview.run("recipe.yaml", [], None, None, None, as_json=False, strict=False),
        lambda: supervise.run(Request("recipe.yaml", ("hardware.gpu=cpu",))),
        lambda: train.run(Request("recipe.yaml", ("hardware.gpu=cpu",))),
    ]
    for command in commands:
        with pytest.raises(UserError) as caught:
            command()
        assert caught.value.exit_code == 2
        assert [(problem.where, problem.what) for problem in caught.value.problems] == [
            (f"recipe.yaml:{line}:7", f"tuning.targets.{n}: no module of {qwen3_folder} is called '{name}'.{nearest}")
            for line, n, name, nearest in (
                (5, 0, "qproj", " Did you mean 'q_proj'?"),
                (7, 2, "down_projj", " Did you mean 'down_proj'?"),
            )
        ]
    assert not Path("runs").exists()


def test_a_plan_names_wrong_targets_too() -> None:
    with pytest.raises(UsageError, match="in_proj_z"):
        make_plan(DENSE, HostMemory(2**36), PlanRequest("lora", 512, 4, targets=("q_proj", "in_proj_z")))
