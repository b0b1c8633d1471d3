"""The step over transformers' Trainer: exact fp32 values are moved, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from qwentune.data.layout.batch import Batch
from qwentune.facts.towers import Part, part_of
from qwentune.model.adamw import AdamW
from qwentune.model.head import LossHead
from qwentune.model.sharded import Shards
from qwentune.training.reports import Report

_Mixed = Trainer if TYPE_CHECKING else object


class ExactStep(_Mixed):
    """Mixin for a transformers Trainer: forward, backward, the gradients' norm, the optimizer and how far it moved.

    Batches carry weights that are already normalised over the whole optimizer batch, so nothing is counted or gathered.
    A step whose gradient is not finite, and each after it, leaves weights and optimizer untouched; `_first_bad_step`
    knows which it was, infinity while there is none.
    """

    loss_head: LossHead
    learning_rate_factor: Callable[[int], float]
    lora_plus_ratio: float
    part_rates: Mapping[Part, float]  # learning rates other than that of the language model
    eight_bit: bool
    fp32_sums: bool
    shards: Shards | None
    report: Report
    _first_bad_step: Tensor | None = None
    _trained: Sequence[list[nn.Parameter]] = ()

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self.report.pass_mark()
        if not model.training:
            model.train()  # walks all modules, so only when an evaluation went before
        if not self.is_deepspeed_enabled:  # the loop empties gradients by a walk over all modules, frozen ones too
            model.zero_grad = self.adamw.zero_grad
        # Ranks average their gradients; the loss is already a share of the whole batch's mean.
        loss = self.loss_head.loss(model, self._prepare_inputs(inputs)) * self.args.world_size
        self.report.pass_mark()
        if self.accelerator.sync_gradients:  # what is measured is the step that comes; DeepSpeed's comes in `backward`
            self.adamw.moved.clear()
        kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **kwargs)
        if self.fp32_sums and not self.is_deepspeed_enabled:
            self.adamw.add_up()
        return loss.detach()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        network: Any = self.model if model is None else model
        if self.shards is not None:
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.set_auto_wrap_policy(network)  # before layers go by other names, which accelerate would not find
            self.shards.lay_in(network)
        decayed = {*self.get_decay_parameter_names(network)}
        # Of most rows of an embedding a batch says nothing: their moments, small as they get, stay in fp32.
        wide = {module.weight for module in network.modules() if self.eight_bit and isinstance(module, nn.Embedding)}
        faster = {"lora_B", "lora_embedding_B"} if self.lora_plus_ratio != 1 else set[str]()
        groups: dict[tuple[Part, bool, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                is_faster = not faster.isdisjoint(name.split("."))
                kind = (part_of(name), is_faster, name in decayed, parameter in wide)
                groups.setdefault(kind, []).append(parameter)
        self.adamw = AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.part_rates.get(part, self.args.learning_rate)
                    * (self.lora_plus_ratio if is_faster else 1.0),
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                    "eight_bit": self.eight_bit and not is_wide,
                }
                for (part, is_faster, is_decayed, is_wide), parameters in sorted(
                    groups.items(), key=lambda group: (group[0][0] != "language", group[0][1])
                )
            ],  # the first group's learning rate is the one that is logged
            betas=(self.args.adam_beta1, self.args.adam_beta2),
        )
        if self.shards is not None:
            self._trained = [group["params"][:] for group in self.adamw.param_groups]
        self.optimizer = self.adamw
        return self.adamw

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        chosen: Any = optimizer or self.optimizer
        # accelerate has looked for each parameter by its address, and those of which a rank has no row share one.
        for group, parameters in zip(chosen.param_groups, self._trained, strict=False):
            group["params"] = parameters
        self.lr_scheduler: Any = LambdaLR(chosen, self.learning_rate_factor)
        kept = ("betas", "weight_decay", "initial_lr")
        self._settings = [{name: group[name] for name in kept} for group in chosen.param_groups]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # the stock count walks all parameters at every step

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        norm = self._norm_of_gradients()
        # The optimizer divides as it reads: gradients in 16 bits would be rounded once more.
        self.adamw.grad_scale = ((norm + 1e-6) / self.args.max_grad_norm).clamp(min=1.0)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        if self.is_deepspeed_enabled:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        else:
            norm = self._norm_of_gradients() if grad_norm is None else grad_norm
        finite = torch.isfinite(norm if isinstance(norm, Tensor) else torch.tensor(norm, device=self.args.device))
        step = torch.where(finite, torch.inf, float(self.state.global_step + 1))
        self._first_bad_step = step if self._first_bad_step is None else torch.minimum(self._first_bad_step, step)
        if not self.is_deepspeed_enabled:  # DeepSpeed's engine leaves such a step out by itself
            # Read on the device, where weights and state then stay as they are.
            self.adamw.found_inf = torch.isfinite(self._first_bad_step).float().reshape(())
        return norm

    def _norm_of_gradients(self) -> Tensor:
        """The norm over all ranks' parts, in fp32 whatever the gradients are held in."""
        if self.fp32_sums and self.args.world_size > 1 and not self.is_fsdp_enabled:
            # Those of earlier micro-batches are this rank's own; DDP's last ones, the mean of all, stay the same.
            for total in self.adamw.sums.values():
                dist.all_reduce(total)
                total /= self.args.world_size
        norms: Any = torch._foreach_norm(self.adamw.gradients(), 2, torch.float32)  # pyright: ignore
        squares = torch.stack(norms).square().sum()
        if self.is_fsdp_enabled:
            dist.all_reduce(squares)
        return squares.sqrt()

    def _update_ratio(self) -> float | None:
        """The norm of the last step over that of the trained weights; all ranks come here."""
        moved = [each.to(self.args.device) for each in self.adamw.moved.values()]
        total = sum(moved, torch.zeros(2, device=self.args.device))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # each rank has moved its share
            dist.all_reduce(total)
        step, weights = total.sqrt().tolist()
        return step / weights if weights else None
