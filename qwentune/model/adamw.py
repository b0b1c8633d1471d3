"""AdamW that moves exact fp32 values, whatever the weights that the model computes with are held in.

Why our own: torch's AdamW steps on what the model holds, and a bf16 weight loses every update below half of its last
place; torchao's (0.18) rounds stochastically instead; bitsandbytes' (0.50) steps on the bf16 weight too, and waits once
for each tensor; neither can be told on the device to leave a step out. The arithmetic here is torch's own fused kernel,
over fp32 values that exist for one piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE_VALUES = 2**24  # are moved at a time; the plan counts the temporaries of as many
BLOCK_VALUES = 256  # share one scale in 8 bits, as in bitsandbytes' optimizers
FEWEST_IN_8_BITS = 4096  # smaller parameters keep fp32 moments, as in bitsandbytes' optimizers
HALF = 2**15  # of the last place of a bf16 value, in the bits of an fp32 one
MOMENTS = ("exp_avg", "exp_avg_sq")

kernels: Any = torch  # whose types leave out its kernels over lists of tensors


def joined(rounded: Sequence[Tensor], rests: Sequence[Tensor]) -> Tensor:
    """The fp32 values that `split` wrote, bit for bit, one after another: (sum of N,)."""
    exact, bits = _flat(rounded, torch.float32), _flat(rests, torch.int16)
    exact.view(torch.int32).add_(bits)
    return exact


def split(exact: Tensor, rounded: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    """Writes fp32 values as their roundings to bf16, exact ties away from zero, and the 16 bits that this leaves.

    `exact` (sum of N,) fp32 is destroyed; `rounded` (N,) bf16 each; `rests` (N,) int16 each: the signed distance in
    units of the last place of fp32. Rounding ties to even could not be undone, for nothing would tell up from down.
    """
    bits = exact.view(torch.int32)
    sizes = [len(rest) for rest in rests]
    kernels._foreach_copy_(list(rests), list(bits.split(sizes)))  # the low half, in two's complement
    bits.add_(HALF).bitwise_right_shift_(16)
    kernels._foreach_copy_([values.view(torch.int16) for values in rounded], list(bits.split(sizes)))


class AdamW(torch.optim.Optimizer):
    """AdamW over exact fp32 values, its moments in fp32, or in 8 bits by blocks; a shard keeps what is its own.

    A bf16 parameter is the rounding of its exact value; `remainder` in its state is the rest of it. Torch's convention
    for a step that must not count holds: where the tensor `found_inf` is 1, weights and state stay bit for bit as they
    are, and nobody waits to know; gradients are divided by `grad_scale`. Squared norms of the steps and of the weights
    after them are added up in `moved`, by device, until somebody clears it. A group may say `eight_bit` for itself.

    Gradients are those of the parameters, or the fp32 `sums` that `add_up` has made of them since the last step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
    ) -> None:
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.moved: dict[torch.device, Tensor] = {}
        self.sums: dict[Tensor, Tensor] = {}
        self._codes: dict[tuple[str, torch.device], Tensor] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "eight_bit": eight_bit}
        super().__init__(params, defaults)
        strided = [
            tuple(x.shape) for group in self.param_groups for x in group["params"] if not _local(x).is_contiguous()
        ]
        assert not strided, f"pieces are views, and parameters of these shapes are not contiguous: {strided}"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if self._gradient(parameter) is not None]
            if not parameters:
                continue
            steps = [self._state(parameter, group["eight_bit"])["step"] for parameter in parameters]
            kernels._foreach_add_(steps, 1)
            if self.found_inf is not None:
                kernels._foreach_sub_(steps, [self.found_inf] * len(steps))
            for piece in _pieces(part for parameter in parameters for part in self._parts(parameter)):
                self._move(piece, group)
        self.sums.clear()

    def gradients(self) -> list[Tensor]:
        """What the next step goes by, of each trained parameter, of a shard its part."""
        found = [self._gradient(parameter) for group in self.param_groups for parameter in group["params"]]
        return [gradient for gradient in found if gradient is not None]

    @torch.no_grad()
    def add_up(self) -> None:
        """Adds the parameters' gradients to fp32 sums and lets go of them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = _local(parameter.grad)
                if parameter in self.sums:
                    self.sums[parameter].add_(gradient)
                else:
                    self.sums[parameter] = gradient.float()
                parameter.grad = None

    def exact(self, parameter: Tensor) -> Tensor:
        """The fp32 value behind a parameter, of a shard its part; the parameter itself where it is fp32."""
        local, state = _local(parameter).detach(), self.state[parameter]
        if "remainder" not in state:
            return local.float()
        return joined([local.view(-1)], [state["remainder"].view(-1)]).view(local.shape)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state as it was saved; torch's own method would round it to the parameters' type.

        Parameters that were bf16 then and are fp32 now become their exact values; the other way round begins a rest.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            parameter = parameters[number]
            local = _local(parameter).detach()
            # Copied, for the saved ones may be a file that is mapped.
            state = self.state[parameter] = {
                name: tensor.to(parameter.device, copy=True) for name, tensor in saved.items()
            }
            if local.dtype == torch.float32 and "remainder" in state:
                rest = state.pop("remainder")
                local.copy_(joined([local.bfloat16().view(-1)], [rest.view(-1)]).view(local.shape))
            elif local.dtype == torch.bfloat16 and "remainder" not in state:
                state["remainder"] = torch.zeros_like(local, dtype=torch.int16)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        if parameter in self.sums:
            return self.sums[parameter]
        return None if parameter.grad is None else _local(parameter.grad)

    def _state(self, parameter: Tensor, eight_bit: bool) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            local = _local(parameter).detach()
            state["step"] = torch.zeros((), device=local.device)
            if local.dtype == torch.bfloat16:
                state["remainder"] = torch.zeros_like(local, dtype=torch.int16)
            # Of a shard the whole parameter counts, so that all ranks agree.
            in_fp32 = not eight_bit or parameter.numel() < FEWEST_IN_8_BITS
            for name in MOMENTS:
                if in_fp32:
                    state[name] = torch.zeros_like(local, dtype=torch.float32)
                    continue
                state[name] = torch.full_like(local, _code_values(name).index(0.0), dtype=torch.uint8)
                state[_scale(name)] = torch.zeros(-(-local.numel() // BLOCK_VALUES), device=local.device)
        return state

    def _parts(self, parameter: Tensor) -> Iterator[_Part]:
        """A parameter in parts of at most a piece."""
        state, gradient = self.state[parameter], self._gradient(parameter)
        assert gradient is not None
        weight, gradient = _local(parameter).detach().view(-1), gradient.reshape(-1)
        held = {name: tensor.view(-1) for name, tensor in state.items() if name != "step"}
        for start in range(0, len(weight), PIECE_VALUES):
            size = min(PIECE_VALUES, len(weight) - start)
            first, blocks = start // BLOCK_VALUES, -(-size // BLOCK_VALUES)
            part = {
                name: values.narrow(0, first, blocks) if name.endswith("_scale") else values.narrow(0, start, size)
                for name, values in held.items()
            }
            yield _Part(weight.narrow(0, start, size), gradient.narrow(0, start, size), state["step"], part)

    def _move(self, piece: Sequence[_Part], group: dict[str, Any]) -> None:
        """One step of one piece: its exact values, torch's kernel, and what is held of them again."""
        weights = [part.weight for part in piece]
        rests = [part.held["remainder"] for part in piece if "remainder" in part.held]
        flat = joined(weights, rests) if rests else None
        exact = weights if flat is None else list(flat.split([len(weight) for weight in weights]))
        before = _flat(exact, torch.float32)
        moments = {name: [self._unpacked(part.held, name) for part in piece] for name in MOMENTS}
        gradients = [part.gradient for part in piece]
        if any(gradient.dtype != torch.float32 for gradient in gradients):
            sizes = [len(gradient) for gradient in gradients]
            gradients = list(_flat(gradients, torch.float32).split(sizes))
        kernels._fused_adamw_(
            exact,
            gradients,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            [part.step for part in piece],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
        self._measure(before, exact)
        for name, values in moments.items():
            for part, moment in zip(piece, values, strict=True):
                if part.held[name] is not moment:
                    self._pack(part.held, name, moment)
        if flat is not None:
            split(flat, weights, rests)

    def _measure(self, before: Tensor, after: Sequence[Tensor]) -> None:
        steps = before.split([len(values) for values in after])
        kernels._foreach_sub_(steps, after)
        moved = torch.stack([torch.stack(kernels._foreach_norm(values)) for values in (steps, after)])
        moved, device = moved.square().sum(dim=1), moved.device
        self.moved[device] = self.moved[device] + moved if device in self.moved else moved

    def _unpacked(self, held: dict[str, Tensor], name: str) -> Tensor:
        """A moment in fp32."""
        if _scale(name) not in held:
            return held[name]
        from bitsandbytes.functional import dequantize_blockwise

        code = self._code(name, held[name].device)
        return dequantize_blockwise(held[name], absmax=held[_scale(name)], code=code, blocksize=BLOCK_VALUES)

    def _pack(self, held: dict[str, Tensor], name: str, moment: Tensor) -> None:
        """Keeps a moment in 8 bits. What was unpacked and is packed again may differ: a step left out keeps the old."""
        from bitsandbytes.functional import quantize_blockwise

        code = self._code(name, moment.device)
        packed, how = quantize_blockwise(moment, code=code, blocksize=BLOCK_VALUES)
        old, new = [held[name], held[_scale(name)]], [packed, how.absmax]
        if self.found_inf is not None:
            is_bad = self.found_inf.bool()
            new = [torch.where(is_bad, *both) for both in zip(old, new, strict=True)]
        kernels._foreach_copy_(old, new)

    def _code(self, name: str, device: torch.device) -> Tensor:
        """The values that 8 bits of a moment stand for, on the device."""
        if (name, device) not in self._codes:
            self._codes[name, device] = torch.tensor(_code_values(name)).to(device)
        return self._codes[name, device]


@dataclass(frozen=True, slots=True)
class _Part:
    """At most a piece of one parameter and of its state, flat: (N,)."""

    weight: Tensor
    gradient: Tensor
    step: Tensor
    held: dict[str, Tensor]


def _pieces(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """Parts of one type together, as many as make a piece."""
    piece: list[_Part] = []
    size = 0
    for part in parts:
        if piece and (size + len(part.weight) > PIECE_VALUES or part.weight.dtype != piece[0].weight.dtype):
            yield piece
            piece, size = [], 0
        piece.append(part)
        size += len(part.weight)
    if piece:
        yield piece


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copies one after another, in one go."""
    sizes = [len(tensor) for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    kernels._foreach_copy_(list(flat.split(sizes)), list(tensors))
    return flat


def _scale(name: str) -> str:
    return f"{name}_scale"


@cache
def _code_values(name: str) -> list[float]:
    """bitsandbytes' dynamic 8-bit values: of both signs for the first moment, of one for the second."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").tolist()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
