"""The step of a row on meta tensors, given to the project's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qwentune.memory.trace.live_bytes import Step, peak, trace
from qwentune.memory.trace.stand_ins import hold_in_4_bits, no_autocast
from tests.bench.rows import kernels
from tests.bench.rows.settings import RowSettings
from tests.bench.rows.sharding import sharded, units_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def predicted_bytes(settings: RowSettings) -> tuple[int, str]:
    """The peak of the step, in the row's statistic, and the region it lies in."""
    region, terms = peak(moments(settings))
    overheads = settings.overheads
    found = sum(terms.values()) + overheads.workspace_bytes
    if settings.statistic != "allocated":
        found += int(found * overheads.allocator_fraction) + overheads.allocator_bytes
    return found + (overheads.context_bytes if settings.statistic == "process" else 0), region


def moments(settings: RowSettings) -> dict[str, dict[str, int]]:
    """Bytes by term at the worst moment of each region."""
    num_layers = settings.config["num_hidden_layers"]
    counts = (num_layers, 0) if settings.checkpointing else (0, num_layers)
    with no_autocast(), _environment(settings):
        found = trace(lambda recomputed, kept: build(settings, recomputed + kept), *counts)
        if settings.sharding == "fsdp1":
            return sharded(found, units_of(build(settings, 1).network), settings)
    if settings.sharding == "ddp":  # it holds the gradients a second time, in its buckets
        gradients = found["optimizer"]["gradients"]
        return {region: {**terms, "buckets": gradients} for region, terms in found.items()}
    return found


def build(settings: RowSettings, num_layers: int) -> Step:
    """The step with so many layers."""
    network = _network(settings, num_layers)
    layers = list(network.model.layers)
    if settings.checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": settings.reentrant})
    if settings.kind != "full":
        network = _adapted(network, settings)
    if settings.fused_norms:
        _fuse_norms(network)
    if settings.fused_adapters:
        for layer in layers:
            _fuse_adapters(layer.self_attn, ("q_proj", "k_proj", "v_proj"), settings)
            _fuse_adapters(layer.self_attn, ("o_proj",), settings)
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    states, optimize = _optimizer(trained, settings)
    if settings.accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    return Step(network, [[layer] for layer in layers], _loss(network, settings), optimize, states)


def _network(settings: RowSettings, num_layers: int) -> Any:
    config = AutoConfig.for_model(**{**deepcopy(dict(settings.config)), "num_hidden_layers": num_layers})
    dtype = DTYPES[settings.dtype]
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=f"row_{settings.attention}"
        )
        if settings.kind == "qlora":
            hold_in_4_bits(network, dtype, settings.double_quantised)
    network.config.use_cache = False
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and (
            settings.upcast == "all" or (settings.upcast == "norms" and "norm" in name)
        ):
            parameter.data = parameter.data.float()
    return network


def _adapted(network: Any, settings: RowSettings) -> Any:
    network.enable_input_require_grads()
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    network = get_peft_model(network, adapters)
    for module in network.modules():
        if type(module) is nn.Dropout:  # CUDA's keeps a bool per value, meta's a factor
            module.forward = lambda x: torch.native_dropout(x, settings.dropout, True)[0]
    # PEFT's own dtype, but not on meta; FSDP's mixed precision hands the forward pass adapters in 16 bits.
    uses_16_bits = settings.sharding == "fsdp1" and settings.autocast and not settings.fused_adapters
    dtype = DTYPES[settings.dtype] if uses_16_bits else torch.float32
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return network


def _optimizer(
    trained: list[nn.Parameter], settings: RowSettings
) -> tuple[Mapping[Tensor, Sequence[Tensor]], Callable[[], None]]:
    if settings.optimizer.endswith("8bit"):
        states = {parameter: _states_in_8_bits(parameter, settings) for parameter in trained}
        return states, lambda: None
    optimizer = torch.optim.AdamW(trained, foreach=True)  # the fused one does not run on meta
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = {
        parameter: [state for state in kept.values() if state.is_meta] for parameter, kept in optimizer.state.items()
    }
    return states, (lambda: optimizer.step() and None) if settings.optimizer == "foreach" else lambda: None


def _states_in_8_bits(parameter: Tensor, settings: RowSettings) -> list[Tensor]:
    """bitsandbytes' moments: fp32 of small tensors; with paging those of large ones lie outside of torch's count."""
    size = parameter.numel()
    if size < 4096:
        return [torch.empty(size, device="meta") for _ in range(2)]
    scales = [torch.empty(-(-size // 256), device="meta") for _ in range(2)]
    if settings.optimizer == "paged-8bit" and size >= 100_000:
        return scales
    return [*scales, *(torch.empty(size, dtype=torch.uint8, device="meta") for _ in range(2))]


def _loss(network: Any, settings: RowSettings) -> Callable[[], Tensor]:
    ids = torch.empty((settings.micro_batch, settings.tokens), dtype=torch.int64, device="meta")
    outputs: list[Tensor] = []
    base = network if settings.kind == "full" else network.get_base_model()
    body, head = base.model, base.lm_head
    autocast = kernels.Autocast(DTYPES[settings.dtype])
    if settings.autocast:
        # Not a layer's own `forward`: what recomputes it would lie outside.
        for module in (*(part for layer in body.layers for part in layer.children()), head):
            module.forward = _inside(autocast, module.forward)

    def loss() -> Tensor:
        autocast.kept = {}  # casts of the forward pass; what is recomputed makes its own
        hidden = body(input_ids=ids).last_hidden_state
        if settings.loss == "liger":
            rows = hidden[..., :-1, :].contiguous()
            found = kernels.LinearCrossEntropy.apply(rows.view(-1, rows.shape[-1]), head.weight)
        else:
            found = _cross_entropy(head(hidden), ids, settings, outputs)
        if not settings.keeps_outputs:
            outputs.clear()
        autocast.kept = None
        return found

    return loss


def _inside(mode: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return inside


def _cross_entropy(logits: Tensor, ids: Tensor, settings: RowSettings, outputs: list[Tensor]) -> Tensor:
    """Of all tokens but the first; what the model returns beside the loss goes to `outputs`.

    transformers before 4.46 returned the logits in fp32; before 4.50 it copied them to shift them by a token.
    """
    if settings.transformers >= (4, 46):
        outputs.append(logits)
    logits = logits.float()
    if settings.transformers < (4, 46):
        outputs.append(logits)
    rows, labels = logits, ids
    if settings.transformers < (4, 50):
        rows, labels = logits[..., :-1, :].contiguous(), ids[..., 1:].contiguous()
    rows, labels = rows.view(-1, rows.shape[-1]), labels.view(-1)
    if settings.loss == "unsloth":
        return kernels.FusedCrossEntropy.apply(rows).sum()
    return nn.functional.cross_entropy(rows, labels)


def _fuse_norms(network: nn.Module) -> None:
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: kernels.FusedNorm.apply(x, norm.weight)


def _fuse_adapters(attention: Any, names: tuple[str, ...], settings: RowSettings) -> None:
    modules = [getattr(attention, name) for name in names]
    pairs = [matrix for m in modules for matrix in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    scaling, base = modules[0].scaling["default"], [module.base_layer for module in modules]
    outputs: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        if not outputs:
            outputs.extend(kernels.FusedAdapters.apply(x, base, scaling, settings.dropout, *pairs))
        return outputs.pop(0)

    for module in modules:
        module.forward = forward


@contextmanager
def _environment(settings: RowSettings) -> Iterator[None]:
    """What else the row's libraries do differently from the ones installed here."""
    with ExitStack() as stack:
        # It looks at values, which meta tensors have not.
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        if settings.autocast:
            stack.enter_context(patch("torch.is_autocast_enabled", lambda *device: not device))
        if settings.fused_norms:
            module = f"transformers.models.{settings.config['model_type']}.modeling_{settings.config['model_type']}"
            stack.enter_context(patch(f"{module}.apply_rotary_pos_emb", _rotate))
        yield


def _rotate(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return kernels.FusedRotation.apply(q), kernels.FusedRotation.apply(k)
