"""On a GPU: FlexAttention trains as the reference does, and a run is killed and resumed bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwentune.data.layout.batch import collate
from qwentune.facts.gpus import gpu_spec
from qwentune.memory.settings import device_overheads
from qwentune.memory.trace.allocator import LARGE_PAGE_BYTES, CardIsFullError
from qwentune.memory.trace.meta_step import recorded_step
from qwentune.memory.trace.replay import replay
from qwentune.model.adamw import AdamW, split
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from tests.bench.memory_grid import GPU, Case, measured, traced_bytes
from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.dialogues import random_rows
from tests.runs import KILLED, final_weights, loss_history, train, write_recipe
from tests.test_trie import rendered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_flex_attention_has_the_loss_and_gradients_of_the_reference(tmp_path: Path, model_type: ModelType) -> None:
    folder = add_weights(write_checkpoint(tmp_path / "model", model_type))
    rows = random_rows(11, 6, reasoning=model_type != "qwen2")
    train_rows = rendered(folder, tmp_path, rows, max_tokens=8192).train
    results = []
    for attention in ("sdpa", "flex_attention"):
        model = load_model(
            folder, dtype="fp32", attention=IMPLEMENTATIONS[attention], device=torch.device("cuda")
        ).train()
        head = LossHead(model, "supervised")
        losses = []
        for k in range(len(train_rows)):  # rows of several lengths, through one compiled kernel
            batch = collate([train_rows[k]], 1 / sum(train_rows.trained_weights))
            batch = {name: tensor if name == "trees" else tensor.cuda() for name, tensor in batch.items()}
            loss = head.loss(model, batch)
            loss.backward()
            losses.append(loss.detach())
        results.append((sum(losses), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (flex_loss, flex_grads) = results
    torch.testing.assert_close(flex_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert torch.linalg.norm(flex_grads[name] - grad) <= 1e-3 * torch.linalg.norm(grad), name


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_run_killed_on_a_gpu_ends_as_the_undisturbed_one(tmp_path: Path, kind: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    options = {
        "tuning": {"kind": kind},
        "optimizer": {"max_steps": 8},
        "output": {"save_every_steps": 3},
    }
    recipe = write_recipe(tmp_path, model, **options)
    undisturbed = train(recipe)
    assert undisturbed.returncode == 0, undisturbed.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["choices"]["attention"] == "flex_attention"
    assert plan["choices"]["weights"] == "bf16"
    assert plan["choices"]["adapters"] == "bf16"
    assert plan["choices"]["optimizer_state"] == "fp32"
    weights, losses = final_weights(tmp_path / "run"), loss_history(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    assert train(recipe, kill_at=5).returncode == KILLED
    resumed = train(recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 3" in resumed.stderr
    assert final_weights(tmp_path / "run") == weights
    assert loss_history(tmp_path / "run") == losses


@pytest.mark.parametrize("eight_bit", [False, True])
def test_exact_values_are_moved_on_a_gpu_as_on_a_cpu_and_nothing_waits(eight_bit: bool) -> None:
    devices = ("cpu", "cuda")
    moved: list[torch.Tensor] = []
    for device in devices:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn((300, 70), generator=generator).mul(0.02).bfloat16()
        weight = torch.nn.Parameter(start.to(device))
        optimizer = AdamW([weight], lr=1e-4, weight_decay=0.01, eight_bit=eight_bit)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
        gradients = [torch.randn((300, 70), generator=generator).bfloat16().to(device) for _ in range(50)]
        for step, gradient in enumerate(gradients):
            weight.grad = gradient
            if device == "cuda" and step:  # the first sends what 8 bits stand for
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        moved.append(optimizer.exact(weight).cpu() - start.float())
        rounded = torch.empty_like(start)
        split(optimizer.exact(weight).cpu().view(-1).clone(), [rounded.view(-1)], [torch.empty(21000).short()])
        assert torch.equal(weight.cpu(), rounded)
    assert torch.linalg.norm(moved[1] - moved[0]) <= (1e-2 if eight_bit else 1e-5) * torch.linalg.norm(moved[0])


def test_the_allocator_grows_its_segments() -> None:
    program = (
        "from qwentune.training.ranks import expand_segments; expand_segments(); import torch;"
        "torch.zeros(1, device='cuda');"
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert seen.stdout.strip() == "True", seen.stderr


@pytest.mark.parametrize(
    "case",
    [
        Case("Qwen/Qwen3-0.6B", "full", 2048, checkpointing=False),
        Case("Qwen/Qwen3-1.7B", "lora", 4096),
        Case("Qwen/Qwen3-0.6B", "qlora", 4096, loss="full"),
    ],
    ids=lambda case: case.kind,
)
def test_the_verdict_holds_on_both_sides_of_a_smaller_card(case: Case) -> None:
    """A card with the least that the replay fits into trains; one with 3 % less than the tensors does not."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # as runs are launched
    card = torch.cuda.get_device_properties(0).total_memory
    tensors, _ = traced_bytes(case)
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(least_capacity(case) / card)
        measured(case, "cuda")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.97 * tensors / card)
        with pytest.raises(torch.OutOfMemoryError):
            measured(case, "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def least_capacity(case: Case) -> int:
    """The smallest card, to a page, that holds the replayed steps."""
    recording, layers = recorded_step(case.spec, case.settings)
    libraries = [device_overheads(gpu_spec(GPU)).workspace_bytes]
    too_little, enough = traced_bytes(case)
    while enough - too_little > LARGE_PAGE_BYTES:
        between = (too_little + enough) // 2
        try:
            replay(recording, layers, libraries, between)
            enough = between
        except CardIsFullError:
            too_little = between
    return enough
