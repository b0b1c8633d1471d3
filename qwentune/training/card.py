"""Measures a card: matrix products at a model's shapes, copies, attention and launches, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

import torch
from torch.nn import functional

from qwentune import console
from qwentune.facts.architecture import ModelSpec
from qwentune.memory.closed_form.limit import Limit
from qwentune.memory.plan_request import Device
from qwentune.memory.rates import Rates, find_rates, keep_rates
from qwentune.memory.settings import HostMemory, Settings

SQUARE = 8192
TOKENS = 4096  # of a layer's products
ROW_LENGTHS = (2048, 16384)
COPIED_VALUES = 2**28
LAUNCHES = 2000
REPEATS = 5


def measured_rates(
    name: str,
    spec: ModelSpec,
    versions: Mapping[str, str],
    device: torch.device,
    *,
    square: int = SQUARE,
    tokens: int = TOKENS,
    row_lengths: tuple[int, ...] = ROW_LENGTHS,
    copied: int = COPIED_VALUES,
) -> Rates:
    """The rates of a card, from the best of some repetitions; the sizes are smaller in a rehearsal.

    Operands are random, for zeros go faster; random states are left as they were. Raises torch's OutOfMemoryError.
    """
    random = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)

    product = 2 * square**3 / _seconds(partial(torch.mm, drawn(square, square), drawn(square, square)), device) / 1e12
    flops = seconds = 0.0
    for rows, columns in _layer_shapes(spec):
        seconds += _seconds(partial(functional.linear, drawn(tokens, rows), drawn(columns, rows)), device)
        flops += 2.0 * tokens * rows * columns
    target = torch.empty(copied, device=device, dtype=torch.bfloat16)
    copies = 4 * copied / _seconds(partial(target.copy_, torch.zeros_like(target)), device) / 1e9
    del target
    attention: dict[str, float] = {}
    for length in row_lengths:
        q = drawn(1, spec.num_heads, length, spec.head_dim)
        k, v = (drawn(1, spec.num_kv_heads, length, spec.head_dim) for _ in range(2))
        attend = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        took = _seconds(attend, device)
        attention[str(length)] = 2 * spec.query_size * length**2 / took / 1e12
    small = torch.zeros(8, device=device)
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        small.add_(1)
    launch = (time.perf_counter() - began) / LAUNCHES
    _wait(device)
    return Rates(
        device=name,
        product_tflops=product,
        copy_gb_per_second=copies,
        launch_microseconds=launch * 1e6,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=dict(versions),
        layer_tflops={spec.id: flops / seconds / 1e12},
        attention_tflops=attention,
    )


def limit_of(spec: ModelSpec, settings: Settings, device: Device, versions: Mapping[str, str]) -> Limit | None:
    """What the cards of a run allow; None on a CPU. A card of this machine that nothing is known of is measured now."""
    if isinstance(device, HostMemory):
        return None
    rates = find_rates(device.name)
    if rates is None and device.is_here and device.has_bf16 and torch.cuda.is_available():
        card = torch.device("cuda", torch.cuda.current_device())
        with console.busy("measuring the card, once"), suppress(torch.OutOfMemoryError):  # another process holds it
            rates = measured_rates(device.name, spec, versions, card)
            keep_rates(rates)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return Limit.of(spec, settings, device, None if rates is None else rates.product_tflops)


def _layer_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Inputs and outputs of the products of an attention layer and its dense network."""
    hidden, query, keys = spec.hidden_size, spec.query_size, spec.kv_size
    inner = spec.dense_intermediate
    return [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden), *[(hidden, inner)] * 2, (inner, hidden)]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    found: list[float] = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
