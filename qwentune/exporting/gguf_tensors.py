"""The tensors of a text model as llama.cpp computes with them: other names, experts in one piece, some numbers changed.

What changes, by llama.cpp's own converter (`conversion/qwen.py` of ggml-org/llama.cpp, read 2026-12): RMSNorms of
Qwen3-Next and 3.5 multiply by 1 + w there and by w here, but for the gated one of linear attention; `A_log` is stored
as -exp(A_log); the fused inputs of Qwen3-Next stand by kind, not by head; value heads of Qwen3.5 stand in the order in
which ggml repeats key heads: the first of every key head, then the second of every one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from qwentune.errors import Problem, UsageError
from qwentune.exporting.changes import HEAD, OF_A_STACK, place
from qwentune.exporting.tensors import ModelTensor
from qwentune.facts.architecture import LinearAttentionSpec, ModelSpec

ARCHITECTURES = {
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "qwen3_next": "QWEN3NEXT",
    "qwen3_5_text": "QWEN35",
    "qwen3_5_moe_text": "QWEN35MOE",
}
OF_THE_DECODER = ("embed_tokens", "layers", "norm", "lm_head")
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
IN_FP32 = ("norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: its values come in fp32, along the first axis, as often as they are asked for."""

    name: str
    shape: tuple[int, ...]
    type: Type
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        sizes = gguf.quant_shape_to_byte_shape(self.shape, self.type) if self.type != Type.F32 else (*self.shape, 4)
        return int(torch.Size(sizes).numel())


def architecture(model_type: str) -> Any:
    """What llama.cpp calls the decoder; UsageError where the installed gguf package has no name for it."""
    found = getattr(gguf.MODEL_ARCH, ARCHITECTURES.get(model_type, ""), None)
    if found is None:
        known = ", ".join(name for name, arch in ARCHITECTURES.items() if hasattr(gguf.MODEL_ARCH, arch))
        fix = f"GGUF is written of the decoders {known}; for others see llama.cpp's own converter."
        raise UsageError(Problem("--gguf", f"{model_type} is no decoder that the gguf package names", fix))
    return found


def gguf_tensors(tensors: Mapping[str, ModelTensor], spec: ModelSpec, kind: Type) -> list[GgufTensor]:
    """The decoder's tensors as they are written, matrices of that kind; towers and drafting layers are left out.

    Raises UsageError for a tensor that the architecture has no name for.
    """
    names = gguf.get_tensor_name_map(architecture(spec.model_type), spec.num_layers)
    written: list[GgufTensor] = []
    for where, shape, blocks in _layers_in_order(_laid_out(tensors, spec)):
        key = where if where.startswith("lm_head") else f"model.{where}"
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            what = f"{where} has no place in llama.cpp's {ARCHITECTURES[spec.model_type]}"
            raise UsageError(Problem("--gguf", what, "Serve the export or the merged model with vLLM or transformers."))
        written.append(GgufTensor(name, shape, _type_of(name, shape, kind), blocks))
    return written


def _type_of(name: str, shape: tuple[int, ...], kind: Type) -> Type:
    if len(shape) == 1 or name.endswith(IN_FP32):
        return Type.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return Type.F16
    return kind


_Laid = tuple[str, tuple[int, ...], Callable[[], Iterator[Tensor]]]


def _layers_in_order(laid: Iterator[_Laid]) -> list[_Laid]:
    order = {name: number for number, name in enumerate(OF_THE_DECODER)}

    def key(each: _Laid) -> tuple[int, list[int], str]:
        where = each[0]
        return order[where.partition(".")[0]], [int(part) for part in where.split(".") if part.isdecimal()], where

    return sorted(laid, key=key)


def _laid_out(tensors: Mapping[str, ModelTensor], spec: ModelSpec) -> Iterator[_Laid]:
    """Each tensor under its name in the network, or one that the gguf package knows, with its new shape and values."""
    stacks: dict[str, dict[int, ModelTensor]] = {}
    for name, tensor in tensors.items():
        where = place(name)
        if where.partition(".")[0] not in OF_THE_DECODER or (spec.tied and where == HEAD):
            continue
        if found := EXPERT.fullmatch(where):
            stacks.setdefault(f"{found[1]}.{found[3]}.weight", {})[int(found[2])] = tensor
        elif where.endswith(".mlp.experts.gate_up_proj"):
            yield from _halves(where, tensor)
        elif where.endswith(".mlp.experts.down_proj"):
            yield f"{where}.weight", tensor.shape, _as_stored(tensor)
        elif where.endswith(".in_proj_qkvz.weight"):
            assert spec.linear_attention is not None
            yield from _by_kind(where, tensor, spec.linear_attention)
        else:
            yield _changed(where, tensor, spec)
    for where, experts in stacks.items():
        every = [experts[number] for number in sorted(experts)]
        yield where, (len(every), *every[0].shape), _one_after_another(every)


def _as_stored(tensor: ModelTensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (block.float() for block in tensor.blocks())


def _one_after_another(tensors: list[ModelTensor]) -> Callable[[], Iterator[Tensor]]:
    return lambda: chain.from_iterable(_as_stored(tensor)() for tensor in tensors)


def _halves(where: str, tensor: ModelTensor) -> Iterator[_Laid]:
    """Gate and up of experts that a file holds as one (E, 2 × out, in)."""
    count, both, inputs = tensor.shape
    half = both // 2
    stack = where.rpartition(".")[0]
    for number, name in enumerate(OF_A_STACK["gate_up_proj"]):
        here = slice(number * half, (number + 1) * half)

        def blocks(here: slice = here) -> Iterator[Tensor]:
            return (block[:, here].float() for block in tensor.blocks())

        yield f"{stack}.{name}.weight", (count, half, inputs), blocks


def _by_kind(where: str, tensor: ModelTensor, linear: LinearAttentionSpec) -> Iterator[_Laid]:
    """Queries, keys and values of all heads, then the gates: files have the four of a key head side by side."""
    values = linear.value_size // linear.num_key_heads
    each = 2 * linear.key_head_dim + 2 * values
    rows = torch.arange(each * linear.num_key_heads).reshape(linear.num_key_heads, each)
    parts = rows.split([linear.key_head_dim, linear.key_head_dim, values, values], dim=1)
    layer = where.removesuffix("in_proj_qkvz.weight")
    for name, chosen in (("in_proj_qkv", parts[:3]), ("in_proj_z", parts[3:])):
        numbers = torch.cat([part.reshape(-1) for part in chosen])
        shape = (len(numbers), *tensor.shape[1:])

        def blocks(numbers: Tensor = numbers) -> Iterator[Tensor]:
            yield tensor.whole()[numbers]

        yield f"{layer}{name}.weight", shape, blocks


def _changed(where: str, tensor: ModelTensor, spec: ModelSpec) -> _Laid:
    """A tensor that stays by itself, its numbers or their order changed where llama.cpp has them otherwise."""
    shape, linear = tensor.shape, spec.linear_attention
    if linear is None:
        if where.endswith(".shared_expert_gate.weight"):
            return where, shape[1:], lambda: iter([tensor.whole()[0]])
        return where, shape, _as_stored(tensor)
    order = _value_heads(linear, where) if spec.model_type != "qwen3_next" else None
    if where.endswith(".shared_expert_gate.weight"):
        return where, shape[1:], lambda: iter([tensor.whole()[0]])
    if where.endswith("norm.weight") and not where.endswith("linear_attn.norm.weight"):
        return where, shape, lambda: iter([tensor.whole() + 1])
    if where.endswith(".A_log"):
        return where, shape, lambda: iter([-_ordered(tensor.whole(), order).exp()])
    if where.endswith(".dt_bias"):
        return where.replace(".dt_bias", ".dt_proj.bias"), shape, lambda: iter([_ordered(tensor.whole(), order)])
    if where.endswith(".conv1d.weight"):
        return where, (shape[0], shape[2]), lambda: iter([_ordered(tensor.whole()[:, 0], order)])
    if where.endswith(".linear_attn.out_proj.weight") and order is not None:
        return where, shape, lambda: (block.float()[:, order] for block in tensor.blocks())
    if order is not None:
        return where, shape, lambda: iter([_ordered(tensor.whole(), order)])
    return where, shape, _as_stored(tensor)


def _ordered(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values[order]


def _value_heads(linear: LinearAttentionSpec, where: str) -> Tensor | None:
    """The order of a tensor's rows (of `out_proj` columns) that puts value heads as ggml repeats key heads."""
    kinds = {
        "in_proj_qkv.weight": (2 * linear.key_size, linear.value_head_dim),
        "conv1d.weight": (2 * linear.key_size, linear.value_head_dim),
        "in_proj_z.weight": (0, linear.value_head_dim),
        "out_proj.weight": (0, linear.value_head_dim),
        **dict.fromkeys(("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"), (0, 1)),
    }
    found = kinds.get(where.partition(".linear_attn.")[2])
    if found is None or linear.num_key_heads == linear.num_value_heads:
        return None
    before, width = found
    heads = torch.arange(linear.num_value_heads * width).reshape(linear.num_key_heads, -1, width)
    return torch.cat([torch.arange(before), before + heads.transpose(0, 1).reshape(-1)])
