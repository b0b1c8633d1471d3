"""The trace against real steps on a CPU, and the closed form against the trace."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwentune.facts import present
from qwentune.facts.architecture import MoeSpec
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import config_of, model_spec
from qwentune.memory import HostMemory, PlanRequest, make_plan
from qwentune.memory.closed_form import model_states
from qwentune.memory.closed_form.model_states import moving_bytes
from qwentune.memory.closed_form.phases import phases
from qwentune.memory.device_remarks import kernel_remark
from qwentune.memory.judge import kernels_beside
from qwentune.memory.settings import Overheads, Settings
from qwentune.memory.trace.cross_check import cross_checked
from qwentune.memory.trace.delta_rule import fold
from qwentune.memory.trace.live_bytes import live_bytes, peak
from qwentune.memory.trace.meta_step import (
    evaluation_of,
    meta_batch,
    meta_network,
    meta_step,
    step_of,
    traceable,
    traced_evaluation,
    traced_peak,
)
from qwentune.model import adamw, attention
from qwentune.model.attention import IMPLEMENTATIONS

NO_OVERHEADS = Overheads(context_bytes=0, workspace_bytes=0, allocator_fraction=0.0, allocator_bytes=0)
MODELS = (
    *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
)
SETTINGS = Settings(
    kind="lora",
    max_tokens=192,
    micro_batch=2,
    accumulation=1,
    gradient_checkpointing=True,
    loss="supervised",
    attention="sdpa",
    sharding="none",
    num_ranks=1,
    weights="fp32",
    adapters="fp32",
    optimizer_state="fp32",
    rank=8,
    targets="all-linear",
)


def tiny(name: str) -> Any:
    """A model of the architecture with six layers, or three periods of different ones."""
    spec = model_spec(name)
    linear = spec.linear_attention
    return replace(
        spec,
        num_layers=6 if linear is None else 12,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_rows=1024,
        moe=spec.moe and MoeSpec(4, 2, 64, 64 if spec.moe.shared_intermediate else 0),
        linear_attention=linear
        and replace(linear, num_key_heads=2, num_value_heads=4, key_head_dim=32, value_head_dim=32),
    )


def random_network(spec: Any, settings: Settings) -> Any:
    """A model with random weights in memory."""
    config = AutoConfig.for_model(**config_of(spec))
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.weights]
    network = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=IMPLEMENTATIONS[settings.attention]
    )
    network.config.use_cache = False
    return network


def measured_bytes(spec: Any, settings: Settings, network: Any = None, evaluates: bool = False) -> int:
    """The peak of a real step with real weights, the optimizer's states there; or of an evaluation in its place."""
    network = network or random_network(spec, settings)
    num_tokens = settings.forward_tokens
    batch = meta_batch(settings)
    real = {name: torch.zeros(x.shape, dtype=x.dtype) if name != "trees" else x for name, x in batch.items()}
    real["input_ids"] = torch.randint(0, spec.vocab_rows, (1, num_tokens))
    ends = [settings.max_tokens * (1 + k // settings.max_tokens) for k in range(num_tokens)]
    real["visible_until"] = torch.tensor([ends])
    real["position_ids"] = torch.arange(num_tokens)[None] % settings.max_tokens
    real["predict_from"] = torch.arange(num_tokens)
    num_recomputed = settings.num_checkpointed(spec.num_layers)
    step = step_of(network, settings, num_recomputed, real)
    step = evaluation_of(step) if evaluates else step
    return sum(peak(live_bytes(step, num_recomputed // spec.period))[1].values())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *product(["Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-8B"], ["sdpa", "eager"]),
        ("Qwen/Qwen3-30B-A3B", "eager"),  # in bf16, where the CPU's own SDPA takes a workspace more
    ],
)
@pytest.mark.parametrize("checkpointing", [True, False, 2])
def test_a_real_step_on_the_cpu_takes_what_the_trace_says(
    name: str, kind: str, attention: str, checkpointing: bool | int
) -> None:
    changes = {"kind": kind, "attention": attention, "gradient_checkpointing": checkpointing}
    settings, spec = replace(SETTINGS, **cast(Any, changes)), tiny(name)
    if spec.moe:  # grouped products run on meta in bf16 only
        settings = replace(settings, weights="bf16")
    assert traced_peak(spec, settings).allocated == pytest.approx(measured_bytes(spec, settings), rel=0.005)


HYBRIDS = ["Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-35B-A3B"]


def hybrid_cases() -> list[Any]:
    fast = {(HYBRIDS[1], "full", 4), (HYBRIDS[2], "lora", False)}
    every = product(HYBRIDS, ("lora", "full"), (True, False, 4))
    return [pytest.param(*case, marks=[] if case in fast else [pytest.mark.slow]) for case in every]


@pytest.mark.parametrize(("name", "kind", "checkpointing"), hybrid_cases())
def test_a_real_step_of_a_hybrid_takes_what_the_trace_says(name: str, kind: str, checkpointing: bool | int) -> None:
    changes = {"kind": kind, "gradient_checkpointing": checkpointing, "micro_batch": 1}
    settings, spec = replace(SETTINGS, **cast(Any, changes)), tiny(name)
    if spec.moe:
        settings = replace(settings, weights="bf16", attention="eager")
    assert traced_peak(spec, settings).allocated == pytest.approx(measured_bytes(spec, settings), rel=0.005)


def test_a_long_sequence_of_a_hybrid_may_be_folded() -> None:
    settings, spec = replace(SETTINGS, micro_batch=1, max_tokens=1100), replace(tiny("Qwen/Qwen3.5-9B"), num_layers=4)
    assert fold(1100) == (3, 367)
    assert traced_peak(spec, settings).allocated == pytest.approx(measured_bytes(spec, settings), rel=0.005)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "full"},
        {"accumulation": 2},
        {"weights": "bf16", "attention": "eager"},
        {"targets": ("q_proj", "v_proj"), "kind": "lora"},
        {"drops": True},
        {"dora": True},
        {"trains_rows": True},
        {"adapters": "bf16"},
        {"adapters": "bf16", "accumulation": 33},
        {"kind": "full", "weights": "bf16", "attention": "eager", "accumulation": 33},
        {"adapters": "bf16", "optimizer_state": "8bit", "rank": 64, "loss": "full", "micro_batch": 1},
        {"kind": "full", "optimizer_state": "8bit"},
        {"kind": "full", "weights": "bf16", "attention": "eager", "optimizer_state": "8bit"},
    ],
    ids=str,
)
def test_other_settings_agree_too(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU's own dropout keeps a mask in the input's dtype.
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: torch.native_dropout(x, self.p, self.training)[0])
    settings, spec = replace(SETTINGS, **changes), tiny("Qwen/Qwen3-8B")
    assert traced_peak(spec, settings).allocated == pytest.approx(measured_bytes(spec, settings), rel=0.005)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("changes", "evaluates"),
    [
        ({"max_tokens": 900}, False),
        ({"gradient_checkpointing": False, "kind": "full", "max_tokens": 900}, False),
        ({"gradient_checkpointing": 2, "max_tokens": 1200, "micro_batch": 1}, False),
        ({"max_tokens": 1200, "micro_batch": 1}, True),
    ],
    ids=str,
)
def test_a_real_step_of_rows_that_branch_takes_what_the_trace_says(
    changes: dict[str, Any], evaluates: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, spec = replace(SETTINGS, branches=True, on_cpu=on_cpu, **changes), tiny("Qwen/Qwen3-8B")
    if not on_cpu:  # the CPU does as a GPU does
        whole = attention.tree_by_tree
        monkeypatch.setattr(attention, "tree_by_tree", lambda *args, copies: whole(*args, copies=False))
    traced = (traced_evaluation if evaluates else traced_peak)(spec, settings).allocated
    assert traced == pytest.approx(measured_bytes(spec, settings, evaluates=evaluates), rel=0.005)
    straight = (traced_evaluation if evaluates else traced_peak)(spec, replace(settings, branches=False)).allocated
    assert traced > 1.02 * straight


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("loss", ["supervised", "full"])
def test_a_real_evaluation_on_the_cpu_takes_what_the_trace_says(kind: str, loss: str) -> None:
    settings = replace(SETTINGS, kind=kind, loss=loss, micro_batch=1, max_tokens=1500)  # type: ignore[arg-type]
    spec = tiny("Qwen/Qwen3-8B")
    measured = measured_bytes(spec, settings, evaluates=True)
    assert traced_evaluation(spec, settings).allocated == pytest.approx(measured, rel=0.005)


def test_the_plan_counts_what_the_optimizer_moves_at_a_time() -> None:
    assert (model_states.PIECE_VALUES, model_states.BLOCK_VALUES) == (adamw.PIECE_VALUES, adamw.BLOCK_VALUES)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen/Qwen3-0.6B", {"kind": "full", "weights": "bf16"}),
        ("Qwen/Qwen3-0.6B", {"kind": "full", "weights": "bf16", "optimizer_state": "8bit"}),
        ("Qwen/Qwen3-0.6B", {"kind": "full"}),
        ("Qwen/Qwen2.5-0.5B", {"adapters": "bf16"}),
        ("Qwen/Qwen3-8B", {"adapters": "bf16", "rank": 16, "weights": "bf16"}),
        ("Qwen/Qwen3-8B", {"adapters": "bf16", "rank": 16, "weights": "bf16", "optimizer_state": "8bit"}),
        ("Qwen/Qwen3-30B-A3B", {"rank": 16, "weights": "bf16", "optimizer_state": "8bit"}),
    ],
    ids=str,
)
def test_the_optimizer_of_the_whole_model_steps_beside_a_copy_of_one_layer(name: str, changes: dict[str, Any]) -> None:
    spec, settings = model_spec(name), replace(SETTINGS, max_tokens=8, micro_batch=1, **changes)
    config = AutoConfig.for_model(**config_of(spec))
    with traceable(spec, settings):
        one = live_bytes(meta_step(config, settings, 1, 0, spec.num_layers), 1)["optimizer"]
        alone = live_bytes(meta_step(config, settings, 1, 0), 1)["optimizer"]
    moving = moving_bytes(spec, settings)
    assert 0.85 * moving < one["temporaries"] < moving + 2**18
    assert {**one, "temporaries": 0} == {**alone, "temporaries": 0}, "of its tensors none is counted"


def cases(count: int) -> list[tuple[str, dict[str, Any]]]:
    """A fixed sample in which every two choices of different settings soon meet: strides without a common factor."""
    kinds, tokens, batches = ("lora", "qlora", "full"), (512, 2048, 4096, 8192, 32768), (1, 2, 4)
    checkpointing, losses = (True, False, 0.5, 0.9), ("supervised", "full")
    states, adapters = ("fp32", "8bit", "fp32"), ("bf16", "fp32")
    found: list[tuple[str, dict[str, Any]]] = []
    for k in range(count):
        kind = kinds[k % 3]
        model, fraction = MODELS[k * 5 % 13], checkpointing[k * 7 // 3 % 4]
        layers = fraction if isinstance(fraction, bool) else int(fraction * model_spec(model).num_layers)
        found.append(
            (
                model,
                {
                    "kind": kind,
                    "max_tokens": tokens[k * 3 % 5],
                    "micro_batch": batches[k // 3 % 3],
                    "gradient_checkpointing": layers,
                    "loss": losses[k // 2 % 2],
                    "optimizer_state": states[k // 4 % 3],
                    "weights": "bf16",
                    "adapters": adapters[k // 5 % 2],
                    "attention": "flex_attention",
                    "rank": 16,
                },
            )
        )
    return found


def marked(k: int, case: tuple[str, dict[str, Any]]) -> Any:
    marks = [] if k < 5 else [pytest.mark.slow] if k < 25 else [pytest.mark.soak]
    name, changes = case
    return pytest.param(name, changes, marks=marks, id="-".join([name, *map(str, changes.values())]))


@pytest.mark.parametrize(("name", "changes"), [marked(k, case) for k, case in enumerate(cases(150))])
def test_the_closed_form_agrees_with_the_trace(name: str, changes: dict[str, Any]) -> None:
    spec, settings = model_spec(name), replace(SETTINGS, **changes)
    closed = phases(spec, settings, NO_OVERHEADS, merges_here=False)["train_step"].allocated
    assert closed == pytest.approx(traced_peak(spec, settings).allocated, rel=0.03)
    evaluation = phases(spec, settings, NO_OVERHEADS, merges_here=False)["evaluate"].allocated
    assert evaluation == pytest.approx(traced_evaluation(spec, settings).allocated, rel=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "sdpa", "max_tokens": 16384, "micro_batch": 1},  # whose mask would be a fifth of all
        {"attention": "sdpa", "max_tokens": 16384, "micro_batch": 1, "weights": "bf16", "branches": True},
        {"attention": "sdpa", "max_tokens": 4096, "gradient_checkpointing": False, "branches": True, "on_cpu": True},
        {"attention": "flash_attention_2", "max_tokens": 512, "weights": "bf16"},
        {"attention": "eager", "max_tokens": 4096, "gradient_checkpointing": False, "weights": "bf16"},
        pytest.param({"attention": "eager", "max_tokens": 4096}, marks=pytest.mark.slow),
        pytest.param({"attention": "eager", "max_tokens": 512, "kind": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_closed_form_agrees_with_the_trace_whatever_attention_holds(changes: dict[str, Any]) -> None:
    test_the_closed_form_agrees_with_the_trace("Qwen/Qwen3-0.6B", changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen/Qwen3-8B", {"gradient_checkpointing": False, "drops": True}),
        ("Qwen/Qwen3-8B", {"gradient_checkpointing": False, "dora": True}),
        ("Qwen/Qwen3-8B", {"kind": "qlora", "trains_rows": True}),
        *(
            pytest.param(name, changes, marks=pytest.mark.slow)
            for name, changes in (
                ("Qwen/Qwen2.5-0.5B", {"drops": True, "attention": "sdpa", "max_tokens": 16384}),
                ("Qwen/Qwen3-8B", {"drops": True, "adapters": "bf16", "gradient_checkpointing": 7}),
                ("Qwen/Qwen3-4B", {"drops": True, "targets": ("q_proj", "v_proj"), "gradient_checkpointing": False}),
                ("Qwen/Qwen2-57B-A14B", {"drops": True, "gradient_checkpointing": False}),
                ("Qwen/Qwen3.5-9B", {"drops": True, "attention": "sdpa"}),
                ("Qwen/Qwen3-8B", {"kind": "qlora", "dora": True}),
                ("Qwen/Qwen3-8B", {"drops": True, "dora": True}),
                ("Qwen/Qwen2.5-0.5B", {"trains_rows": True, "attention": "sdpa", "max_tokens": 16384}),
                ("Qwen/Qwen3-4B", {"trains_rows": True, "loss": "full"}),
                ("Qwen/Qwen3-8B", {"targets": ("q_proj", "lm_head"), "loss": "full"}),
                ("Qwen/Qwen3-8B", {"trains_rows": True, "gradient_checkpointing": 7}),
            )
        ),
    ],
    ids=str,
)
def test_the_closed_form_agrees_with_the_trace_of_dropout_dora_and_trained_rows(
    name: str, changes: dict[str, Any]
) -> None:
    same: dict[str, Any] = {"max_tokens": 4096, "micro_batch": 1, "rank": 16, "weights": "bf16"}
    test_the_closed_form_agrees_with_the_trace(name, {**same, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen/Qwen3-0.6B", {"kind": "full", "accumulation": 33}),
        *(
            pytest.param(name, changes, marks=pytest.mark.slow)
            for name, changes in (
                ("Qwen/Qwen3-0.6B", {"kind": "full", "accumulation": 32}),
                ("Qwen/Qwen3-8B", {"adapters": "bf16", "rank": 128, "accumulation": 33}),
                ("Qwen/Qwen3-4B", {"kind": "full", "accumulation": 64, "optimizer_state": "8bit"}),
                ("Qwen/Qwen3-30B-A3B", {"kind": "full", "accumulation": 33}),
            )
        ),
    ],
    ids=str,
)
def test_the_closed_form_agrees_with_the_trace_of_sums_of_many_micro_batches(
    name: str, changes: dict[str, Any]
) -> None:
    same: dict[str, Any] = {"max_tokens": 2048, "micro_batch": 1, "rank": 16, "weights": "bf16"}
    test_the_closed_form_agrees_with_the_trace(name, {**same, **changes})


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        ("Qwen/Qwen3-235B-A22B", 2),
        *(
            pytest.param(name, accumulation, marks=pytest.mark.slow)
            for name, accumulation in (("Qwen/Qwen3-Next-80B-A3B-Instruct", 2), ("Qwen/Qwen3.5-122B-A10B", 1))
        ),
    ],
)
def test_the_closed_form_holds_the_new_gradients_of_a_layer_s_experts(name: str, accumulation: int) -> None:
    settings = replace(SETTINGS, kind="full", max_tokens=8192, micro_batch=1, accumulation=accumulation)
    settings = replace(settings, gradient_checkpointing=accumulation > 1, weights="bf16")
    spec = model_spec(name)
    closed = phases(spec, settings, NO_OVERHEADS, merges_here=False)["train_step"].allocated
    traced = traced_peak(spec, settings).allocated
    assert traced <= closed <= 1.03 * traced


def hybrid_settings(k: int) -> dict[str, Any]:
    kind = ("lora", "full", "qlora")[k % 3]
    return {
        **{"kind": kind, "micro_batch": 1, "rank": 16, "weights": "bf16", "loss": ("supervised", "full")[k // 5 % 2]},
        "max_tokens": (512, 2048, 4096, 32768)[k * 3 % 4],
        "gradient_checkpointing": (True, False, 8)[k // 2 % 3],
        "optimizer_state": ("fp32", "8bit")[k // 7 % 2],
        "adapters": ("bf16", "fp32")[k // 6 % 2],
    }


SIZES = [
    *(f"Qwen/Qwen3.5-{size}" for size in ("9B", "35B-A3B", "0.8B", "4B", "27B", "122B-A10B")),
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "Qwen/Qwen3-30B-A3B",
]


@pytest.mark.parametrize(("name", "changes"), [marked(k + 4, (SIZES[k % 8], hybrid_settings(k))) for k in range(24)])
def test_the_closed_form_agrees_with_the_trace_of_hybrids_and_mixtures(name: str, changes: dict[str, Any]) -> None:
    test_the_closed_form_agrees_with_the_trace(name, changes)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-8B"])
@pytest.mark.parametrize("adapters", ["bf16", "fp32"])
def test_the_closed_form_agrees_with_the_trace_of_adapters_beside_long_rows(name: str, adapters: str) -> None:
    same: dict[str, Any] = {"kind": "qlora", "max_tokens": 32768, "micro_batch": 1, "weights": "bf16"}
    test_the_closed_form_agrees_with_the_trace(name, {**same, "adapters": adapters, "attention": "flex_attention"})


FUSED_PACKAGES = ("fla", "causal_conv1d")
FUSED = {"fuses_delta_rule": True, "fuses_convolution": True}


def fused_cases() -> list[Any]:
    every = product(range(24), (FUSED, {**FUSED, "fuses_convolution": False}))
    cases = [(SIZES[k % 7], {**hybrid_settings(k), **fused}) for k, fused in every]
    return [marked(k + 4 if k == 0 else k + 17, case) for k, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "changes"), fused_cases())
def test_the_closed_form_agrees_with_the_trace_with_fused_kernels(name: str, changes: dict[str, Any]) -> None:
    test_the_closed_form_agrees_with_the_trace(name, changes)


def test_what_a_fused_delta_rule_keeps_is_what_its_source_saves() -> None:
    """Per token, in bf16: fla-core 0.6.0's `save_for_backward` and causal-conv1d's, against the same layer in torch."""
    spec, settings = replace(model_spec("Qwen/Qwen3.5-9B"), num_layers=8), replace(SETTINGS, weights="bf16")
    settings = replace(settings, micro_batch=1, max_tokens=4096, gradient_checkpointing=False)
    config = AutoConfig.for_model(**config_of(spec))
    kept: dict[str, list[torch.Tensor]] = {}
    for name in ("rule", "convolution"):
        kept[name] = saved = []

        def keep(x: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(x)
            return x

        fused = replace(settings, fuses_delta_rule=name == "rule", fuses_convolution=name == "convolution")
        with traceable(spec, fused):
            layer = meta_network(config, fused, 4).model.layers[0].linear_attn
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                layer(torch.empty((1, 4096, 4096), dtype=torch.bfloat16, device="meta", requires_grad=True))
    shapes = [(tuple(x.shape), x.dtype) for x in kept["rule"]]
    half, full = torch.bfloat16, torch.float32
    at = shapes.index(((1, 4096, 16, 128), half))
    assert shapes[at : at + 8] == [
        *[((1, 4096, 16, 128), half), ((1, 4096, 16), full)] * 2,
        ((1, 4096, 32, 128), half),
        *[((1, 4096, 32), full), ((1, 4096, 32), half), ((1, 4096, 32, 64), half)],
    ]
    assert sum(x.shape == (1, 8192, 4096) for x in kept["convolution"]) == 1


def test_fused_kernels_are_traced_where_they_are_installed_and_a_gpu_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, card = model_spec("Qwen/Qwen3.5-9B"), gpu_spec("h200")
    request = PlanRequest("lora", 12288, 16, kernels=frozenset(FUSED_PACKAGES))
    plain, fused = (make_plan(spec, card, asked) for asked in (replace(request, kernels=frozenset()), request))
    assert fused.choices.gradient_checkpointing < plain.choices.gradient_checkpointing
    said: list[str] = []
    checked = cross_checked(spec, card, request, fused, said.append)
    assert checked.fits
    assert not any("bug" in line for line in said)
    assert kernels_beside(card) == frozenset()
    assert "by torch, which is slower" in kernel_remark(spec, card)
    monkeypatch.setattr(present, "find_spec", lambda name: name in FUSED_PACKAGES or None)
    assert kernels_beside(card) == frozenset(FUSED_PACKAGES)
    assert "by flash-linear-attention; its convolution by causal-conv1d" in kernel_remark(spec, card)
    assert kernels_beside(HostMemory(2**36)) == frozenset()
    assert kernel_remark(spec, HostMemory(2**36)) == kernel_remark(model_spec("Qwen/Qwen3-8B"), card) == ""
