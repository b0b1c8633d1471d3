"""Peak memory of real training steps on one GPU beside what the plan, the trace and the replay say of them.

    python tests/bench/memory_grid.py predict FILE            on any machine, before the run
    python tests/bench/memory_grid.py measure FILE [SECONDS]  on a GPU; goes on where it was stopped
    python tests/bench/memory_grid.py show FILE               the table, in Markdown

Random weights of the true shapes, qwentune's own adapters, attention, loss head and optimizer; four optimizer steps of
full rows, every token trained. Measured are torch's `max_memory_allocated`, beside the closed form (predicted) and the
trace, and `max_memory_reserved`, beside the replay. FILE is a CSV with a row for each case.
"""

from __future__ import annotations

import csv
import gc
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import config_of, model_spec
from qwentune.memory.closed_form.phases import phases
from qwentune.memory.settings import GIB, Settings, device_overheads
from qwentune.memory.trace.meta_step import recorded_step, traced_peak
from qwentune.memory.trace.replay import replay

GPU = "h100-80gb"
FIELDS = (
    "case",
    "predicted_bytes",
    "traced_bytes",
    "replayed_bytes",
    "measured_bytes",
    "reserved_bytes",
    "seconds_per_step",
    "tokens_per_second",
    "device",
    "versions",
)


@dataclass(frozen=True)
class Case:
    """One training step; `num_layers` cuts a model too deep for the card."""

    model: str
    kind: str
    tokens: int
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool | int = True
    loss: str = "supervised"
    attention: str = "flex_attention"
    num_layers: int | None = None

    @property
    def name(self) -> str:
        """What tells it from the others, in one word without commas."""
        layers = "" if self.num_layers is None else f"/{self.num_layers}layers"
        recomputed = {True: "recomputed", False: "saved"}.get(self.checkpointing, f"recomputed{self.checkpointing}")
        shape = f"{self.tokens}x{self.micro_batch}x{self.accumulation}"
        return f"{self.model.split('/')[-1]}{layers}:{self.kind}:{shape}:{recomputed}:{self.loss}:{self.attention}"

    @property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        spec = model_spec(self.model)
        return spec if self.num_layers is None else replace(spec, num_layers=self.num_layers)

    @property
    def settings(self) -> Settings:
        """The step as the plan knows it."""
        return Settings(
            kind=self.kind,  # type: ignore[arg-type]
            max_tokens=self.tokens,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            loss=self.loss,  # type: ignore[arg-type]
            attention=self.attention,  # type: ignore[arg-type]
            sharding="none",
            num_ranks=1,
            weights="bf16",
            adapters="bf16",
            optimizer_state="fp32",
            rank=16,
            targets="all-linear",
        )


CASES = (
    Case("Qwen/Qwen3-0.6B", "full", 4096, checkpointing=False),
    Case("Qwen/Qwen3-8B", "lora", 4096),
    Case("Qwen/Qwen3-8B", "qlora", 4096),
    Case("Qwen/Qwen3-1.7B", "lora", 4096, checkpointing=False),
    Case("Qwen/Qwen3-8B", "lora", 4096, checkpointing=False),
    Case("Qwen/Qwen3-8B", "qlora", 4096, checkpointing=False),
    Case("Qwen/Qwen2.5-7B-Instruct", "lora", 8192),
    Case("Qwen/Qwen2.5-7B-Instruct", "qlora", 8192),
    Case("Qwen/Qwen3-4B", "full", 4096, accumulation=2),
    Case("Qwen/Qwen3-0.6B", "full", 4096, loss="full"),
    Case("Qwen/Qwen3-8B", "lora", 4096, checkpointing=18),
    Case("Qwen/Qwen3-8B", "lora", 32768),
    Case("Qwen/Qwen3-0.6B", "full", 4096, micro_batch=4, accumulation=2),
    Case("Qwen/Qwen3-1.7B", "lora", 4096, checkpointing=False, attention="sdpa"),
    Case("Qwen/Qwen3-30B-A3B", "lora", 4096, num_layers=8),
    Case("Qwen/Qwen3-30B-A3B", "qlora", 4096, num_layers=8),
    Case("Qwen/Qwen3-14B", "qlora", 4096),
    Case("Qwen/Qwen2.5-0.5B", "full", 8192, checkpointing=False),
    Case("Qwen/Qwen3-14B", "lora", 16384),
    Case("Qwen/Qwen3-0.6B", "lora", 2048, micro_batch=4, checkpointing=False),
)


def predicted_bytes(case: Case) -> int:
    """What the plan says of the training step: torch's `max_memory_allocated`."""
    return phases(case.spec, case.settings, device_overheads(gpu_spec(GPU)), False)["train_step"].allocated


def traced_bytes(case: Case) -> tuple[int, int]:
    """What the trace says of the tensors, and the replay of what the allocator reserves for them."""
    workspaces = device_overheads(gpu_spec(GPU)).workspace_bytes
    recording, layers = recorded_step(case.spec, case.settings)
    reserved = replay(recording, layers, [workspaces]).peak_reserved
    return traced_peak(case.spec, case.settings).allocated + workspaces, reserved


def measured(case: Case, device: str) -> dict[str, Any]:
    """Peak bytes and seconds of an optimizer step."""
    import torch

    from qwentune.model.adamw import AdamW
    from qwentune.model.head import LossHead

    on_gpu = device == "cuda"
    model = network(case, device)
    head = LossHead(model, case.loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=1e-5)
    batch = full_rows(case, device)
    seconds: list[float] = []
    for _ in range(4):
        start = time.monotonic()
        for _ in range(case.accumulation):
            head.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    best = min(seconds[1:])
    return {
        "measured_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "seconds_per_step": round(best, 4),
        "tokens_per_second": round(case.settings.forward_tokens * case.accumulation / best),
    }


def network(case: Case, device: str) -> Any:
    """The network to train, with random weights made where they are needed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwentune.model.adapters import add_adapters
    from qwentune.model.attention import IMPLEMENTATIONS
    from qwentune.model.loading import recompute_layers
    from qwentune.recipe import Tuning

    config = AutoConfig.for_model(**config_of(case.spec))
    attention = IMPLEMENTATIONS[case.attention]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if case.kind == "qlora":
        hold_linear_modules_in_4_bits(model, device)
    materialize(model, device)
    model.tie_weights()
    model.config.use_cache = False
    recompute_layers(model, case.checkpointing)
    if case.kind != "full":
        model = add_adapters(model, Tuning.model_validate({"kind": case.kind, "rank": 16}), "fp32")
    return model.to(device).train()


def materialize(model: Any, device: str) -> None:
    """Random values for what is still on meta; inverse frequencies as the configuration has them."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, 0.02)
                setattr(module, name, torch.nn.Parameter(values))
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config).to(device)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq


def hold_linear_modules_in_4_bits(model: Any, device: str) -> None:
    """Replaces the linear modules of all layers as loading with a quantisation configuration does."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for parent in layer.modules():
            for name, module in list(parent.named_children()):
                if type(module) is not torch.nn.Linear:
                    continue
                shape = module.out_features, module.in_features
                with torch.device("meta"):  # no time lost on initial values
                    made = Linear4bit(
                        *reversed(shape), bias=module.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
                if made.bias is not None:
                    made.bias = torch.nn.Parameter(torch.zeros(shape[0], dtype=torch.bfloat16))
                setattr(parent, name, made.to(device))
    model.is_loaded_in_4bit = True  # what PEFT asks


def full_rows(case: Case, device: str) -> Any:
    """A micro-batch of full rows, each one chain whose tokens are all trained but the first."""
    import numpy as np

    from qwentune.data.layout.batch import collate
    from qwentune.data.layout.trie import lay_out

    rng = np.random.default_rng(0)
    weights = np.ones(case.tokens, dtype=np.float32)
    weights[0] = 0
    ids = [rng.integers(0, 1000, case.tokens).astype(np.int32) for _ in range(case.micro_batch)]
    batch = collate([lay_out([[(row, weights)]]) for row in ids], 1 / case.settings.forward_tokens)
    return {name: tensor if name == "trees" else tensor.to(device) for name, tensor in batch.items()}


def read(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a file by case."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def write(file: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Writes all rows."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def predict(file: Path) -> None:
    """Writes what is reckoned of every case, before anything is measured."""
    rows = read(file)
    for case in CASES:
        if not rows.get(case.name, {}).get("measured_bytes"):
            traced, replayed = traced_bytes(case)
            predicted = {"predicted_bytes": predicted_bytes(case), "traced_bytes": traced, "replayed_bytes": replayed}
            rows[case.name] = dict.fromkeys(FIELDS, "") | {"case": case.name, **predicted}
    write(file, rows)


def measure(file: Path, seconds: float = 240.0, device: str = "cuda") -> None:
    """Measures the cases that have no measurement yet, while there is time."""
    import torch
    import transformers

    deadline = time.monotonic() + seconds
    rows: dict[str, dict[str, Any]] = dict(read(file))
    for case in CASES:
        row = rows[case.name]
        if row["measured_bytes"] or time.monotonic() > deadline:
            continue
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        name = torch.cuda.get_device_name() if device == "cuda" else device
        began = time.monotonic()
        try:
            found = measured(case, device)
        except Exception as error:  # the other cases are worth having
            print(f"{case.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        versions = f"torch {torch.__version__} transformers {transformers.__version__}"
        rows[case.name] = {**row, **found, "device": name, "versions": versions}
        write(file, rows)
        error = 100 * (int(row["predicted_bytes"]) / max(1, found["measured_bytes"]) - 1)
        print(f"{case.name} {error:+.2f}% {found} in {time.monotonic() - began:.0f} s", flush=True)


def show(file: Path) -> None:
    """Prints the table and the errors' summary."""
    errors: dict[str, list[float]] = {"predicted": [], "traced": [], "replayed": []}
    truths = {"predicted": "measured_bytes", "traced": "measured_bytes", "replayed": "reserved_bytes"}
    print("| case | measured GiB | plan | trace | reserved GiB | replay | tokens/s |\n|---|---|---|---|---|---|---|")
    for row in read(file).values():
        if not row["measured_bytes"]:
            continue
        found: dict[str, str] = {}
        for name, truth in truths.items():
            if row[f"{name}_bytes"] and row[truth]:
                errors[name].append(100 * (int(row[f"{name}_bytes"]) / int(row[truth]) - 1))
                found[name] = f"{errors[name][-1]:+.2f} %"
        measured, reserved = (
            f"{int(row[name]) / GIB:.2f}" if row[name] else "" for name in dict.fromkeys(truths.values())
        )
        plan, trace, replayed = (found.get(name, "") for name in errors)
        print(
            f"| {row['case']} | {measured} | {plan} | {trace} | {reserved} | {replayed} | {row['tokens_per_second']} |"
        )
    for name, sizes in errors.items():
        if sizes:
            sizes = [abs(error) for error in sizes]
            print(
                f"\n{name}: {len(sizes)} cases, median error {statistics.median(sizes):.2f} %, worst {max(sizes):.2f} %"
            )


if __name__ == "__main__":
    command, file, *rest = sys.argv[1:]
    if command == "measure":
        measure(Path(file), *map(float, rest[:1]), *rest[1:])
    else:
        {"predict": predict, "show": show}[command](Path(file))
