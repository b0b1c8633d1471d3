"""The optimizer alone: exact fp32 values behind 16 bits, moments in fp32 or 8 bits, steps left out, no waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qwentune.model import adamw
from qwentune.model.adamw import AdamW, joined, split
from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.warm import Warm

OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
SHAPES = [(40, 70), (64,), (5000,), (257, 33), (1,)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that parameters are cut, and some stand together in one."""
    monkeypatch.setattr(adamw, "PIECE_VALUES", 4096)


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).mul(0.02).bfloat16().to(dtype)) for s in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator).mul(1e-3).bfloat16() for shape in SHAPES]


def walk(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one.double() - other.double()).norm() / other.double().norm())


# Rounding.


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_every_fp32_value_is_its_rounding_and_16_bits(bits: list[int]) -> None:
    exact = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    exact = exact[exact.abs() < 3.38e38]  # what is finite as bf16 too
    rounded, rest = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty_like(exact, dtype=torch.int16)
    split(exact.clone(), [rounded], [rest])
    assert torch.equal(joined([rounded], [rest]).view(torch.int32), exact.view(torch.int32))
    nearest = exact.bfloat16()
    is_tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(rounded[~is_tie], nearest[~is_tie])
    assert (rounded[is_tie].float().abs() > exact[is_tie].abs()).all()  # away from zero


# Steps.


def test_masters_and_moments_are_those_of_an_fp32_adamw() -> None:
    ours, theirs = parameters(torch.bfloat16), parameters(torch.float32)
    one, other = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    walk(one, ours, range(200))
    walk(other, theirs, range(200))
    for weight, reference in zip(ours, theirs, strict=True):
        exact = one.exact(weight)
        assert distance(exact, reference) < 1e-6
        for name in ("exp_avg", "exp_avg_sq"):
            assert distance(one.state[weight][name], other.state[reference][name]) < 1e-6
        is_tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(weight[~is_tie], exact.bfloat16()[~is_tie])  # the weight is its master's rounding
        assert int(one.state[weight]["step"]) == 200


def test_fp32_parameters_beside_bf16_ones_are_moved_as_torch_does() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    beside = parameters(torch.bfloat16, seed=1)
    one, other = AdamW([*ours[:2], *beside, *ours[2:]], **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(20):
        for weight, gradient in zip(beside, gradients(step), strict=True):
            weight.grad = gradient
        walk(one, ours, range(step, step + 1))
    walk(other, theirs, range(20))
    for weight, reference in zip(ours, theirs, strict=True):
        assert distance(weight, reference) < 1e-6
        assert "remainder" not in one.state[weight]


@pytest.mark.parametrize("kind", ["tied", "rows"])
def test_tied_embeddings_and_trained_rows_are_moved_as_in_fp32(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    from qwentune.model.adapters import add_adapters
    from qwentune.recipe import Tuning

    folder = add_weights(write_checkpoint(tmp_path / "model", "qwen2", tied=kind == "tied"))
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2)]
    if kind == "rows":
        tuning = Tuning.model_validate({"kind": "lora", "rank": 4})
        models = [add_adapters(model, tuning, "bf16", [3, 5]) for model in models]
        models[1].load_state_dict(models[0].state_dict())
    ours, theirs = ([x for x in model.parameters() if x.requires_grad] for model in models)
    reference = [nn.Parameter(x.detach().float()) for x in theirs]
    one, other = AdamW(ours, lr=1e-4), torch.optim.AdamW(reference, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(0, 300, (1, 8), generator=generator)
        models[0](input_ids=ids, labels=ids).loss.backward()
        for weight, exact in zip(ours, reference, strict=True):
            exact.grad = weight.grad.float()
        one.step()
        other.step()
        models[0].zero_grad()
    for weight, exact in zip(ours, reference, strict=True):
        assert distance(one.exact(weight), exact) < 1e-6
        assert distance(one.state[weight]["exp_avg"], other.state[exact]["exp_avg"]) < 1e-6


SHARDS = "import sys; from tests.sharded import prove_steps; prove_steps(int(sys.argv[1]))"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shards_are_moved_like_their_rows_of_the_whole(tmp_path: Path, warm: Warm, num_ranks: int) -> None:
    run = warm.train(tmp_path / "none", code=SHARDS, given=[str(num_ranks)])
    assert run.code == 0, run.said


def test_a_plain_bf16_adamw_would_learn_a_fraction_of_it() -> None:
    """What this optimizer is there for: at a usual learning rate most updates are below a bf16 weight's last place."""
    way = {}
    for dtype, kind in (
        (torch.float32, torch.optim.AdamW),
        (torch.bfloat16, torch.optim.AdamW),
        (torch.bfloat16, AdamW),
    ):
        weights = parameters(dtype)
        optimizer = kind(weights, lr=1e-6)
        walk(optimizer, weights, range(100))
        exact = [optimizer.exact(x) if isinstance(optimizer, AdamW) else x.detach().float() for x in weights]
        way[kind, dtype] = torch.cat(
            [(x - y.detach().float()).flatten() for x, y in zip(exact, parameters(dtype), strict=True)]
        )
    straight = way[torch.optim.AdamW, torch.float32]
    along = {key: float(moved @ straight / (straight @ straight)) for key, moved in way.items()}
    assert along[AdamW, torch.bfloat16] == pytest.approx(1, abs=1e-3)
    assert along[torch.optim.AdamW, torch.bfloat16] < 0.5


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_leaves_every_bit(dtype: torch.dtype, eight_bit: bool) -> None:
    weights = parameters(dtype)
    optimizer = AdamW(weights, **OPTIONS, eight_bit=eight_bit)
    optimizer.found_inf = torch.zeros(())
    walk(optimizer, weights, range(3))
    before = copy.deepcopy(([x.detach() for x in weights], [optimizer.state[x] for x in weights]))
    optimizer.moved.clear()
    optimizer.found_inf = torch.ones(())
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.step()
    assert float(optimizer.moved[torch.device("cpu")][0]) == 0
    for weight, old, state in zip(weights, *before, strict=True):
        assert torch.equal(weight, old)
        assert state.keys() == optimizer.state[weight].keys()
        assert all(torch.equal(value, optimizer.state[weight][name]) for name, value in state.items())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_state_that_was_saved_goes_on_bit_for_bit(eight_bit: bool) -> None:
    straight, stopped = parameters(torch.bfloat16), parameters(torch.bfloat16)
    whole = AdamW(straight, **OPTIONS, eight_bit=eight_bit)
    walk(whole, straight, range(8))
    first = AdamW(stopped, **OPTIONS, eight_bit=eight_bit)
    walk(first, stopped, range(5))
    second = AdamW(stopped, **OPTIONS, eight_bit=eight_bit)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(second, stopped, range(5, 8))
    for one, other in zip(straight, stopped, strict=True):
        assert torch.equal(one, other)
        for name, value in whole.state[one].items():
            assert torch.equal(value, second.state[other][name])
            assert value.dtype == second.state[other][name].dtype


def test_a_state_of_bf16_parameters_gives_fp32_ones_their_exact_values() -> None:
    rounded = parameters(torch.bfloat16)
    first = AdamW(rounded, **OPTIONS)
    walk(first, rounded, range(5))
    saved = copy.deepcopy(first.state_dict())
    wide = [nn.Parameter(x.detach().float()) for x in rounded]
    second = AdamW(wide, **OPTIONS)
    second.load_state_dict(saved)
    assert all(torch.equal(x, first.exact(y)) for x, y in zip(wide, rounded, strict=True))
    walk(first, rounded, range(5, 7))
    walk(second, wide, range(5, 7))
    assert all(torch.equal(x, first.exact(y)) for x, y in zip(wide, rounded, strict=True))
    back = AdamW(rounded, **OPTIONS)
    back.load_state_dict(copy.deepcopy(second.state_dict()))
    walk(back, rounded, range(7, 9))
    assert all(back.state[x]["remainder"].any() for x in rounded)


def test_what_is_measured_is_the_step_and_the_weights_after_it() -> None:
    weights = parameters(torch.bfloat16)
    optimizer = AdamW(weights, **OPTIONS)
    walk(optimizer, weights, range(2))
    before = [optimizer.exact(x) for x in weights]
    optimizer.moved.clear()
    walk(optimizer, weights, range(2, 3))
    after = [optimizer.exact(x) for x in weights]
    step, length = optimizer.moved[torch.device("cpu")].tolist()
    assert step == pytest.approx(
        sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)), rel=1e-4
    )
    assert length == pytest.approx(sum(float(a.square().sum()) for a in after), rel=1e-5)


def test_gradients_are_divided_as_they_are_read() -> None:
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, other = AdamW(ours, **OPTIONS), AdamW(theirs, **OPTIONS)
    one.grad_scale = torch.tensor(4.0)
    walk(one, ours, range(1))
    for weight, gradient in zip(theirs, gradients(0), strict=True):
        weight.grad = gradient / 4  # a power of two loses nothing
    other.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_sums_of_many_micro_batches_are_in_fp32() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = AdamW(ours, **OPTIONS)
    total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for micro_batch in range(64):
        for weight, gradient, whole in zip(ours, gradients(micro_batch), total, strict=True):
            weight.grad = gradient
            whole += gradient.double()
        optimizer.add_up()
        assert all(weight.grad is None for weight in ours)
    for gradient, whole in zip(optimizer.gradients(), total, strict=True):
        assert gradient.dtype == torch.float32
        assert distance(gradient, whole) < 1e-6
    optimizer.step()
    assert not optimizer.sums
    assert not optimizer.gradients()


# Eight bits.


def test_8_bit_moments_are_as_good_as_bitsandbytes_on_gradients_of_many_sizes() -> None:
    """Each element's gradient has a scale of its own, lognormal with a standard deviation of 2."""
    import bitsandbytes

    shape, steps = (256, 256), 100
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(shape, generator=generator).mul(2).exp() * 1e-4
    drift = torch.randn(shape, generator=generator)
    start = torch.randn(shape, generator=generator) * 0.02

    def moved(make: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = nn.Parameter(start.to(dtype, copy=True))
        optimizer = make([weight])
        noise = torch.Generator().manual_seed(1)
        for _ in range(steps):
            gradient = scale * (drift + torch.randn(shape, generator=noise))
            weight.grad = gradient.to(dtype)
            optimizer.step()
        exact = optimizer.exact(weight) if isinstance(optimizer, AdamW) else weight.detach()
        return (exact - start.to(dtype).float()).flatten().double()

    straight = moved(lambda x: torch.optim.AdamW(x, lr=1e-4, weight_decay=0.0))
    ours = moved(lambda x: AdamW(x, lr=1e-4, eight_bit=True))
    theirs = moved(lambda x: bitsandbytes.optim.AdamW8bit(x, lr=1e-4, weight_decay=0.0))
    ours_along, theirs_along = (float(way @ straight / (straight @ straight)) for way in (ours, theirs))
    assert abs(ours_along - 1) <= abs(theirs_along - 1) + 1e-3
    assert distance(ours, straight) <= distance(theirs, straight) * 1.01


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_8_bit_moments_go_the_way_of_fp32_on_the_gradients_of_a_run(tmp_path: Path, model_type: ModelType) -> None:
    """Sixty steps of a tiny model, moments of embeddings in 32 bits as the trainer has them."""
    from transformers import AutoModelForCausalLM

    folder = add_weights(write_checkpoint(tmp_path / "model", model_type))
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]
    reference, ours = ([x for x in model.parameters() if x.requires_grad] for model in models)
    start = [x.detach().clone() for x in reference]
    wide = {id(module.weight) for module in models[1].modules() if isinstance(module, nn.Embedding)}
    other = torch.optim.AdamW(reference, lr=1e-4, weight_decay=0.0)
    groups = [
        {"params": [x for x in ours if (id(x) in wide) == is_wide], "eight_bit": not is_wide}
        for is_wide in (True, False)
    ]
    one = AdamW(groups, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(0, 300, (2, 64), generator=generator).sort(dim=1).values  # something to learn
        models[0](input_ids=ids, labels=ids).loss.backward()
        for weight, source in zip(ours, reference, strict=True):
            weight.grad = source.grad.clone()
        other.step()
        other.zero_grad()
        one.step()
    straight, moved = (
        torch.cat([(x.detach() - begun).flatten().double() for x, begun in zip(weights, start, strict=True)])
        for weights in (reference, ours)
    )
    assert float(moved @ straight / (straight @ straight)) == pytest.approx(1, abs=0.03)


def test_small_parameters_keep_fp32_moments() -> None:
    weights = parameters(torch.bfloat16)
    optimizer = AdamW(weights, eight_bit=True)
    walk(optimizer, weights, range(1))
    dtypes = [optimizer.state[x]["exp_avg"].dtype for x in weights]
    assert dtypes == [torch.float32, torch.float32, torch.uint8, torch.uint8, torch.float32]
    assert [len(optimizer.state[x].get("exp_avg_scale", ())) for x in weights] == [0, 0, 20, 34, 0]


# Waits.


@contextmanager
def counted() -> Iterator[list[str]]:
    """The operators that would make a GPU's host wait."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    waits: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, given = str(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            out = func(*args, **(kwargs or {}))
            if "_local_scalar_dense" in name or "nonzero" in name:
                waits.append(name)
            copies = "_to_copy" in name or "copy_" in name
            if copies and any(x.is_cuda for x in given) and isinstance(out, Tensor) and not out.is_cuda:
                waits.append(name)
            return out

    with Counting():
        yield waits


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_waits_for_nothing(dtype: torch.dtype, eight_bit: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    AdamW(parameters(dtype), eight_bit=eight_bit)
    with FakeTensorMode():
        weights = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in SHAPES]
        optimizer = AdamW(weights, eight_bit=eight_bit)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
        with counted() as waits:
            for _ in range(2):
                for weight in weights:
                    weight.grad = torch.zeros_like(weight)
                optimizer.step()
    assert waits == []


@pytest.mark.parametrize("sums", [False, True])
def test_what_the_trainer_does_around_a_step_waits_for_nothing(sums: bool) -> None:
    """The norm of the gradients, clipping, the flag of a step that is not finite, sums of many micro-batches."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode

    from qwentune.training.step import ExactStep

    class Around(ExactStep):
        is_deepspeed_enabled = is_fsdp_enabled = False

        def __init__(self, optimizer: AdamW, device: torch.device) -> None:
            self.adamw, self.fp32_sums = optimizer, sums
            self.args = SimpleNamespace(max_grad_norm=1.0, device=device, world_size=1)
            self.state = SimpleNamespace(global_step=0)

    with FakeTensorMode():
        weights = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device="cuda")) for shape in SHAPES]
        optimizer = AdamW(weights)
        around: Any = Around(optimizer, torch.device("cuda"))
        with counted() as waits:
            for _ in range(2):
                for weight in weights:
                    weight.grad = torch.zeros_like(weight)
                if sums:
                    optimizer.add_up()
                    assert len(optimizer.sums) == len(weights)
                around._get_grad_norm(None, around._clip_grad_norm(None))
                optimizer.step()
    assert waits == []
