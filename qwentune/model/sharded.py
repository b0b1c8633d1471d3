"""Weights that no rank ever holds whole: each reads its own rows of every tensor from the files.

Towers are frozen here and stay whole on every rank, outside FSDP2: a rank runs them only where its rows show media, and
would else wait for others to gather their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel, modeling_utils

from qwentune.facts.towers import part_of


class Shards:
    """This rank's rows of a model's weights, until FSDP2 has spread the model: then they are laid into it.

    Until then the model holds hollow parameters, of the right shape and type but one value large: adapters can be put
    around them, nothing can be computed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model.__class__ = type(model).__bases__[0]  # what `sharding` made it of
        self.rows: dict[nn.Parameter, DTensor] = {}
        hollow: dict[nn.Parameter, nn.Parameter] = {}  # a tied head's stays the embedding's
        for module, name, parameter in _parameters(model):
            if not isinstance(parameter.data, DTensor):
                continue  # a tower's
            if parameter not in hollow:
                hollow[parameter] = _hollow(parameter)
                rows: Any = parameter.data
                self.rows[hollow[parameter]] = rows
            module._parameters[name] = hollow[parameter]

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """The module with its weight, gathered in host memory, in place of the hollow one; every rank comes here."""
        hollow = module._parameters["weight"]
        assert hollow is not None
        module._parameters["weight"] = nn.Parameter(self.rows[hollow].full_tensor().cpu(), hollow.requires_grad)
        yield
        module._parameters["weight"] = hollow

    def lay_in(self, model: nn.Module) -> None:
        """Spreads the model by FSDP2 and gives each of its hollow parameters this rank's rows."""
        rows_of: dict[tuple[nn.Module, str], Tensor] = {}
        meta: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, parameter in _parameters(model):
            if parameter not in self.rows:
                continue  # an adapter's, or a tower's
            rows_of[module, name] = self.rows[parameter].to_local()
            if parameter not in meta:
                meta[parameter] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad
                )
            module._parameters[name] = meta[parameter]
        _shard(model)
        laid: dict[nn.Parameter, nn.Parameter] = {}
        for (module, name), rows in rows_of.items():
            spread: Any = module._parameters[name]
            if spread not in laid:
                shape = spread.to_local().shape
                own = rows if rows.shape == shape else rows.new_empty(shape)  # of experts this rank may have none
                laid[spread] = nn.Parameter(_dtensor(own, spread, spread.device_mesh, 0), spread.requires_grad)
            module._parameters[name] = laid[spread]
        self.rows.clear()


def sharding(cls: type[PreTrainedModel], device: torch.device) -> type[PreTrainedModel]:
    """The same model, whose `from_pretrained` gives each rank its rows: transformers loads a DTensor's own part."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    class Sharded(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            towers = {*tower_parameters(self)}
            for module, name, parameter in _parameters(self):
                if parameter in towers:
                    continue
                module._parameters[name] = nn.Parameter(_without_data(parameter, mesh), parameter.requires_grad)

    # transformers looks by these for what it renames while it loads, and takes other classes for custom code.
    Sharded.__name__, Sharded.__qualname__, Sharded.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Sharded


@contextmanager
def no_warm_up() -> Iterator[None]:
    """Keeps transformers from reserving the GPU memory of the whole model, which 5.17 does for a part of it too."""
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def _parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every place of a parameter; a tied one has several."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _shard(model: nn.Module) -> None:
    """Groups as accelerate makes them: a layer, the embedding, the last norm with the head; tied ones are together.

    accelerate takes tied weights for untied ones where trained rows are laid into each, and finds this done already.
    """
    network: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for layer in network.get_decoder().layers:
        fully_shard(layer)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tail = [network.get_decoder().norm, head]
    if {*embedding.parameters()} & {*head.parameters()}:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model, ignored_params={*tower_parameters(model)})


def tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of what sees and hears; none in a model of text."""
    return [parameter for name, parameter in model.named_parameters() if part_of(name) != "language"]


def _without_data(parameter: Tensor, mesh: DeviceMesh) -> DTensor:
    """A DTensor over the rows of `parameter`, which is a meta tensor."""
    num_ranks, rank = mesh.size(), mesh.get_local_rank()
    dim = 0
    if parameter.ndim == 3 and rank * -(-len(parameter) // num_ranks) >= len(parameter):
        dim = 2  # a rank without experts would have nothing to stack; what it reads instead is not laid in
    parts = parameter.chunk(num_ranks, dim)
    local = parts[rank] if rank < len(parts) else parameter.narrow(dim, 0, 0)
    return _dtensor(local.contiguous(), parameter, mesh, dim)


def _dtensor(local: Tensor, whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    placements = [Shard(dim)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad)
