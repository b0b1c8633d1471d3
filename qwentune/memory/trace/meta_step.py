"""The training step of a recipe on meta tensors: the real model class, adapters, checkpointing and loss head.

Kernels that do not run on meta are replaced by functions that save the same tensors for the backward pass.
"""
# torch leaves many of its types unknown
# pyright: standard

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.models import config_of
from qwentune.memory.closed_form.phases import Terms
from qwentune.memory.settings import Settings
from qwentune.memory.trace.delta_rule import traceable_delta_rule
from qwentune.memory.trace.live_bytes import Bytes, Step, peak, trace
from qwentune.memory.trace.replay import BLOCKS_OF_A_KIND, Recording, depth, record
from qwentune.model.adamw import PIECE_VALUES, AdamW
from qwentune.model.adapters import add_adapters
from qwentune.model.attention import IMPLEMENTATIONS, Visibility, tree_by_tree
from qwentune.model.head import LossHead
from qwentune.model.loading import DTYPES, recompute_layers
from qwentune.recipe import Tuning

TRAINED_ROWS = (0, 1)  # how many counts for little: each is a row of the embedding


def traced_peak(spec: ModelSpec, settings: Settings) -> Terms:
    """The worst moment of the training step of one unsharded rank, device workspaces left out."""
    build, num_recomputed, num_kept = _steps(spec, settings)
    with traceable(spec, settings):
        _, terms = peak(trace(build, num_recomputed, num_kept))
    return _terms(terms)


def traced_evaluation(spec: ModelSpec, settings: Settings) -> Terms:
    """The worst moment of an evaluation, which takes one row at a time; device workspaces left out."""
    settings = replace(settings, micro_batch=1, accumulation=1, gradient_checkpointing=False)
    build, _, num_blocks = _steps(spec, settings)
    with traceable(spec, settings):
        _, terms = peak(trace(lambda _, kept: evaluation_of(build(0, kept)), 0, num_blocks))
    return _terms(terms)


def evaluation_of(step: Step) -> Step:
    """The evaluation of a step's batch in place of the step."""

    def loss() -> Tensor:
        with torch.no_grad():
            return step.loss()

    step.network.eval()
    return replace(step, loss=loss, optimize=lambda: None)


def _terms(terms: Bytes) -> Terms:
    return Terms(
        weights=terms.get("weights", 0),
        adapters=terms.get("adapters", 0),
        gradients=terms.get("gradients", 0),
        optimizer=terms.get("optimizer", 0),
        activations=terms.get("activations", 0) + terms.get("recomputed", 0),
        logits=terms.get("logits", 0),
        temporaries=terms.get("temporaries", 0),
    )


def recorded_step(spec: ModelSpec, settings: Settings) -> tuple[Recording, list[int]]:
    """The same step as the allocator sees it, and which recorded block each block of the model is like."""
    build, num_recomputed, num_kept = _steps(spec, settings)
    counts = min(num_recomputed, BLOCKS_OF_A_KIND), min(num_kept, BLOCKS_OF_A_KIND)
    with traceable(spec, settings):
        return record(build(*counts), counts[0]), depth(num_recomputed, num_kept)


def _steps(spec: ModelSpec, settings: Settings) -> tuple[Callable[[int, int], Step], int, int]:
    """What makes the step of so many recomputed and kept blocks, and how many the model has of each."""
    num_recomputed, rest = divmod(settings.num_checkpointed(spec.num_layers), spec.period)
    assert not rest, "the plan recomputes whole periods"
    config = AutoConfig.for_model(**config_of(spec))  # pyright: ignore[reportArgumentType]

    def build(recomputed: int, kept: int) -> Step:
        return meta_step(config, settings, recomputed * spec.period, kept * spec.period, spec.num_layers)

    return build, num_recomputed, spec.num_layers // spec.period - num_recomputed


def meta_step(
    config: PreTrainedConfig, settings: Settings, num_recomputed: int, num_kept: int, num_layers: int | None = None
) -> Step:
    """One step of a model with as many layers, the first `num_recomputed` of them recomputed.

    Its optimizer moves what a model of `num_layers` has, for what that takes does not grow evenly with the depth.
    """
    network = meta_network(config, settings, num_recomputed + num_kept)
    return step_of(network, settings, num_recomputed, meta_batch(settings), num_layers)


def step_of(
    network: Any, settings: Settings, num_recomputed: int, batch: dict[str, Tensor], num_layers: int | None = None
) -> Step:
    """One step of a network whose base weights are there, on meta or not; the optimizer's states are there too."""
    layers = list(network.model.layers)
    recompute_layers(network, num_recomputed if num_recomputed < len(layers) else True)
    period = _period(network.config)
    if settings.kind != "full":
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        tuning = Tuning.model_validate(
            {
                "kind": settings.kind,
                "rank": settings.rank,
                "targets": targets,
                "dropout": 0.5 if settings.drops else 0.0,
                "variant": "dora" if settings.dora else "plain",
            }
        )
        with torch.device(layers[0].input_layernorm.weight.device):
            network = add_adapters(network, tuning, settings.adapters, TRAINED_ROWS if settings.trains_rows else ())
    network.train()
    head = LossHead(network, settings.loss)
    head.attention = IMPLEMENTATIONS["eager"]  # so that probes hear of the batch's trees too
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    blocks = [layers[at : at + period] for at in range(0, len(layers), period)]
    optimizer, states = _optimizer(trained, _embeddings(network), settings)
    moving = optimizer if num_layers is None else _standing_in(network, blocks, settings, num_layers // period)
    if settings.adds_in_fp32:
        optimizer.sums = _sums(trained)
    elif settings.accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)

    def optimize() -> None:
        if settings.adds_in_fp32:
            optimizer.add_up()
        moving.step()

    return Step(network, blocks, lambda: head.loss(network, batch), optimize, states, {**optimizer.sums})


def _period(config: PreTrainedConfig) -> int:
    types = list(getattr(config, "layer_types", None) or [])
    return types.index("full_attention") + 1 if "linear_attention" in types else 1


def meta_network(config: PreTrainedConfig, settings: Settings, num_layers: int) -> Any:
    """The model class of the configuration with random nothing in it, cut to `num_layers`."""
    config = deepcopy(config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    dtype = DTYPES[settings.weights]
    _register_probes()
    attention = IMPLEMENTATIONS["eager"] if settings.attention == "eager" else _PROBES[settings.attention]
    attention += "_on_cpu" if settings.attention == "sdpa" and settings.on_cpu else ""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if settings.kind == "qlora":
            hold_in_4_bits(network, dtype)
    network.config.use_cache = False
    return network


def meta_batch(settings: Settings) -> dict[str, Tensor]:
    """A micro-batch of full rows, every token trained."""
    num_tokens, meta = settings.forward_tokens, torch.device("meta")
    row = torch.empty((1, num_tokens), dtype=torch.int64, device=meta)
    flat = row[0]
    return {
        "input_ids": row,
        "position_ids": row,
        "visible_until": row,
        "predict_from": flat,
        "target": flat,
        "weight": flat.float(),
        "trees": torch.tensor([[settings.max_tokens, settings.branches]] * settings.micro_batch, dtype=torch.int64),
    }


def hold_in_4_bits(network: nn.Module, dtype: torch.dtype, double_quantised: bool = True) -> None:
    """Replaces the linear modules of all layers by 4-bit ones, as loading with a quantisation configuration does."""
    probe = _four_bit_linear()
    for layer in cast(Any, network).model.layers:
        for parent in layer.modules():
            for name, module in list(parent.named_children()):
                if type(module) is nn.Linear:
                    setattr(parent, name, probe(module, dtype, double_quantised))
    cast(Any, network).is_loaded_in_4bit = True  # what PEFT asks


def _embeddings(network: nn.Module) -> set[Tensor]:
    return {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}


def _optimizer(
    trained: Sequence[Tensor], embeddings: set[Tensor], settings: Settings
) -> tuple[AdamW, dict[Tensor, list[Tensor]]]:
    """The optimizer of a run as the Trainer sets it up, with its states, which are there from the first step on."""
    in_8_bits = settings.optimizer_state == "8bit"
    groups = [
        {"params": [x for x in trained if (in_8_bits and x not in embeddings) == eight_bit], "eight_bit": eight_bit}
        for eight_bit in (False, True)
    ]
    optimizer = AdamW([group for group in groups if group["params"]])
    device = trained[0].device
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
    states = {
        parameter: list(optimizer._state(parameter, group["eight_bit"]).values())
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return optimizer, states


def _sums(trained: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Gradients of earlier micro-batches, added up in fp32."""
    return {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained}


def _standing_in(network: nn.Module, blocks: Sequence[Any], settings: Settings, num_blocks: int) -> AdamW:
    """The optimizer of a network of so many blocks, whose tensors take no bytes: those of the network count."""
    inside = {parameter for block in blocks for layer in block for parameter in layer.parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    block = [parameter for layer in blocks[0] for parameter in layer.parameters() if parameter.requires_grad]
    outside, embeddings = [parameter for parameter in trained if parameter not in inside], _embeddings(network)
    num_before = 0 if trained[0] in inside else 1
    pairs = [(_alike(x), x) for x in (*outside[:num_before], *block * num_blocks, *outside[num_before:])]
    standing_in = [alike for alike, _ in pairs]
    optimizer, states = _optimizer(standing_in, {alike for alike, x in pairs if x in embeddings}, settings)
    if settings.adds_in_fp32:
        optimizer.sums = _sums(standing_in)
    gradients = [*optimizer.sums.values(), *(alike.grad for alike in standing_in if alike.grad is not None)]
    for tensor in (*standing_in, *gradients, *(state for held in states.values() for state in held)):
        tensor.untyped_storage().resize_(0)
    return optimizer


def _alike(parameter: Tensor) -> Tensor:
    """A parameter on meta with a gradient; of several whole pieces, which are moved alike, it has one."""
    size = parameter.numel()
    size = size if size <= PIECE_VALUES else PIECE_VALUES + size % PIECE_VALUES
    alike = nn.Parameter(torch.empty(size, dtype=parameter.dtype, device="meta"))
    alike.grad = torch.empty_like(alike)
    return alike


@contextmanager
def traceable(spec: ModelSpec, settings: Settings) -> Iterator[None]:
    """Lets the model run on meta tensors."""
    with (
        no_autocast(),
        fused_dropout(),
        unpacked_for_dora(),
        traceable_delta_rule(spec.model_type, settings) if spec.linear_attention else nullcontext(),
    ):
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """PEFT switches autocast off around experts' weights, and the meta device knows none."""
    autocast = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.autocast = autocast  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def unpacked_for_dora() -> Iterator[None]:
    """DoRA reads whole weights, which of 4-bit stand-ins PEFT cannot unpack."""
    module_of_dora: Any = dora
    unpack = module_of_dora.dequantize_module_weight
    module_of_dora.dequantize_module_weight = lambda module: (
        module.unpacked(module.compute_dtype) if hasattr(module, "unpacked") else unpack(module)
    )
    try:
        yield
    finally:
        module_of_dora.dequantize_module_weight = unpack


@contextmanager
def fused_dropout() -> Iterator[None]:
    """Dropout keeps a boolean mask, as on a GPU; elsewhere torch keeps one in the input's dtype."""
    forward = nn.Dropout.forward
    nn.Dropout.forward = lambda self, input: torch.native_dropout(input, self.p, self.training)[0]
    try:
        yield
    finally:
        nn.Dropout.forward = forward


class _FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and a fp32 log-sum per query and head, as flash, cuDNN and FlexAttention do.

    So do the kernels that take a mask, beside the mask.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:3], dtype=torch.float32), mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, logsum, _ = ctx.saved_tensors
        delta = torch.empty_like(logsum)  # noqa: F841 - alive beside the three gradients
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


# No more of a kernel's name, for transformers refuses some to some models, and looks for a kernel where it reads flash.
_PROBES = {"sdpa": "traced_sdpa", "flex_attention": "traced_flex", "flash_attention_2": "traced_varlen"}


@cache
def _register_probes() -> None:
    for name in _PROBES.values():
        AttentionInterface.register(name, _grouped_attention)
    AttentionInterface.register(_PROBES["sdpa"], partial(_repeated_attention, copies=False))
    AttentionInterface.register(_PROBES["sdpa"] + "_on_cpu", partial(_repeated_attention, copies=True))


def _grouped_attention(_module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FlashAttention.apply(q, k, v, None).transpose(1, 2).contiguous(), None


def _repeated_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, visibility: Visibility, copies: bool, **__: Any
) -> tuple[Tensor, None]:
    output = tree_by_tree(_FlashAttention.apply, q, k, v, visibility, None, copies=copies)
    return output.transpose(1, 2).contiguous(), None


class _FourBitProduct(torch.autograd.Function):
    """Unpacks the weight forward and again backward; saves nothing of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.module.unpacked(gradients[0].dtype), None


@cache
def _four_bit_linear() -> Any:
    """A stand-in for bitsandbytes' module, which PEFT takes for it; NF4, its scales quantised again or in fp32."""
    from bitsandbytes.nn.modules import Linear4bit

    class FourBitLinear(Linear4bit):
        def __init__(self, module: nn.Linear, dtype: torch.dtype, double_quantised: bool) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = module.in_features, module.out_features
            self.compute_dtype, self.bias = dtype, module.bias
            size = module.weight.numel()
            weight: Any = nn.Parameter(torch.empty((size // 2, 1), dtype=torch.uint8), requires_grad=False)
            weight.compress_statistics, weight.quant_type = double_quantised, "nf4"
            self.weight = weight
            scale_dtype = torch.uint8 if double_quantised else torch.float32
            self.register_buffer("scales", torch.empty(size // 64, dtype=scale_dtype))
            if double_quantised:
                self.register_buffer("scales_of_scales", torch.empty(-(-size // (64 * 256))))

        def unpacked(self, dtype: torch.dtype) -> Tensor:
            return torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.weight.device)

        def forward(self, x: Tensor) -> Tensor:
            product = _FourBitProduct.apply(x.to(self.compute_dtype), self)
            return (product if self.bias is None else product + self.bias).to(x.dtype)

    return FourBitLinear
