"""What an adapter changes of its base, tensor by tensor: PEFT's own sums, without a model in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from qwentune.errors import Problem, ResumeError
from qwentune.exporting.tensors import Change, ModelTensor, read_rows
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, StoredTensor, read_adapter
from qwentune.model.part_names import PREFIX

ADAPTER = "default"
# Parts of names in which the classes of a family, and their files, differ.
LOADED_AS = ("model", "language_model", "thinker")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
MATRICES = ("lora_A.weight", "lora_B.weight")
OF_A_STACK = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Adapter matrices in memory at once: those of a layer's experts, of which every expert takes a part.
HELD = 4
NOT_MERGED = "Export it without --merge."

Read = Callable[[str], Tensor]
Rows = Callable[[Tensor, int], Tensor]


def place(name: str) -> str:
    """Where a tensor stands in the network, whichever class of its family names it."""
    return ".".join(part for part in name.split(".") if part not in LOADED_AS)


@dataclass(frozen=True)
class _Adapted:
    """A parameter of the network that the adapter changes, the adapter's tensors that do, and how.

    `of_expert` is the change of one expert's rows from a number on, where the parameter is a stack of experts.
    """

    parameter: str
    keys: tuple[str, ...]
    change: Change
    of_expert: Callable[[int, int], Rows] | None = None


def merged_tensors(
    base: Mapping[str, StoredTensor], adapted: PeftModel, adapter: Path, *, tied: bool
) -> dict[str, ModelTensor]:
    """The base's tensors by name, each with what the adapter changes of it.

    `adapted` is the network without weights that the adapter stands around; `tied` says that its head is its
    embedding. Raises ResumeError where something of the adapter cannot be merged.
    """
    stored = read_adapter(adapter)
    file = str(adapter / ADAPTER_WEIGHTS)
    at: dict[str, list[str]] = defaultdict(list)
    for name in base:
        at[place(name)].append(name)
    changes: dict[str, list[Change]] = defaultdict(list)
    unused = {*stored}
    for each in _adapted(adapted, stored):
        unused.difference_update(each.keys)
        where = place(each.parameter)
        if tied and where == HEAD:
            what = "adapts lm_head, whose weights are the embedding's too: merging would change both"
            raise ResumeError(Problem(file, what, NOT_MERGED))
        found = dict.fromkeys(at.get(where, ()), each.change)
        if not found and each.of_expert is not None:
            found = dict(_of_single_experts(each, where, at, stored))
        if not found:
            raise ResumeError(Problem(file, f"adapts {each.parameter}, which the base's files do not have", NOT_MERGED))
        if tied and where == EMBEDDING:  # some checkpoints store the head once more
            found |= dict.fromkeys(at.get(HEAD, ()), each.change)
        for name, change in found.items():
            changes[name].append(change)
    if unused:
        what = f"{len(unused)} tensors are of a kind that cannot be merged, the first: {min(unused)}"
        raise ResumeError(Problem(file, what, NOT_MERGED))
    return {name: ModelTensor(tensor, tuple(changes.get(name, ()))) for name, tensor in base.items()}


def _adapted(network: PeftModel, stored: Mapping[str, StoredTensor]) -> Iterator[_Adapted]:
    read = lru_cache(HELD)(lambda key: read_rows(stored[key]).float())
    for name, module in network.named_modules():
        own = name.removeprefix(PREFIX).replace(".base_layer", "")
        if isinstance(module, TrainableTokensLayer):
            key = f"{name}.trainable_tokens_delta"
            if key in stored:  # a tied head has those of the embedding
                change = Change(_rows_of(module.token_indices[ADAPTER], key, read))
                yield _Adapted(f"{own.removesuffix('.token_adapter')}.weight", (key,), change)
        elif isinstance(module, ModulesToSaveWrapper):
            for parameter in module.original_module.state_dict():
                key = f"{name}.{parameter}"
                yield _Adapted(f"{own}.{parameter}", (key,), Change(_saved(stored[key])))
        elif isinstance(module, LoraLayer):
            names = ["lora_embedding_A", "lora_embedding_B"] if isinstance(module, Embedding) else MATRICES
            names = [*names, *(["lora_magnitude_vector"] if module.use_dora[ADAPTER] else ())]
            keys = tuple(f"{name}.{each}" for each in names)
            scaling = module.scaling[ADAPTER]
            if isinstance(module, ParamWrapper):
                parameter = f"{own}.{module.parameter_name}"
                if module.num_experts == 1:
                    yield _Adapted(parameter, keys, Change(_of_linear(scaling, keys, read)))
                else:
                    yield _Adapted(
                        parameter, keys, Change(_of_stack(module, keys, read)), _of_expert(module, keys, read)
                    )
            elif isinstance(module, Embedding):
                change = Change(_of_embedding(scaling, keys, read), needs_all_rows=len(keys) > 2)
                yield _Adapted(f"{own}.weight", keys, change)
            elif isinstance(module, Linear):
                yield _Adapted(f"{own}.weight", keys, Change(_of_linear(scaling, keys, read)))


def _of_single_experts(
    stack: _Adapted, where: str, at: Mapping[str, list[str]], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Change]]:
    """The change of a stack of experts as changes of the single matrices that the base's files hold of it."""
    assert stack.of_expert is not None
    experts, _, kind = where.rpartition(".")
    names = OF_A_STACK.get(kind, ())
    for number, name in enumerate(names):
        offset = number * stored[stack.keys[1]].shape[0] // len(names)
        expert = 0
        while found := at.get(f"{experts}.{expert}.{name}.weight"):
            change = Change(stack.of_expert(expert, offset))
            yield from ((each, change) for each in found)
            expert += 1


def _rows_of(tokens: list[int], key: str, read: Read) -> Rows:
    """Rows of an embedding or a head that were trained themselves."""

    def change(rows: Tensor, first: int) -> Tensor:
        here = [(number - first, at) for at, number in enumerate(tokens) if first <= number < first + len(rows)]
        places, sources = [place for place, _ in here], [source for _, source in here]
        return rows.index_copy(0, torch.tensor(places, dtype=torch.long), read(key)[sources])

    return change


def _saved(tensor: StoredTensor) -> Rows:
    """What was trained whole."""
    return lambda rows, first: read_rows(tensor, first, len(rows)).float()


def _of_linear(scaling: float, keys: Sequence[str], read: Read) -> Rows:
    def change(rows: Tensor, first: int) -> Tensor:
        delta = read(keys[1])[first : first + len(rows)] @ read(keys[0]) * scaling
        if len(keys) == 2:
            return rows + delta
        norm = torch.linalg.norm(rows + delta, dim=1)
        return (read(keys[2])[first : first + len(rows)] / norm).view(-1, 1) * (rows + delta)

    return change


def _of_embedding(scaling: float, keys: Sequence[str], read: Read) -> Rows:
    def change(rows: Tensor, first: int) -> Tensor:
        delta = (read(keys[1]) @ read(keys[0])[:, first : first + len(rows)]).T * scaling
        if len(keys) == 2:
            return rows + delta
        norm = torch.linalg.norm(rows.T + delta.T, dim=1)  # of a column, over the whole vocabulary
        return (read(keys[2]) / norm).view(1, -1) * (rows + delta)

    return change


def _of_stack(module: Any, keys: Sequence[str], read: Read) -> Rows:
    """Of experts (E, out, in), or (E, in, out) in some classes."""
    count, scaling = module.num_experts, module.scaling[ADAPTER]
    sums = "o r e, e r i -> e o i" if module._did_swap_in_out_features else "o r e, e r i -> e i o"

    def change(experts: Tensor, first: int) -> Tensor:
        here = slice(first, first + len(experts))
        return experts + torch.einsum(sums, *_factors(read, keys, count, here)) * scaling

    return change


def _of_expert(module: Any, keys: Sequence[str], read: Read) -> Callable[[int, int], Rows] | None:
    count, scaling = module.num_experts, module.scaling[ADAPTER]
    if not module._did_swap_in_out_features:
        return None

    def of(expert: int, offset: int) -> Rows:
        def change(rows: Tensor, first: int) -> Tensor:
            b, a = _factors(read, keys, count, slice(expert, expert + 1))
            here = slice(offset + first, offset + first + len(rows))
            return rows + torch.einsum("o r e, e r i -> e o i", b[here], a)[0] * scaling

        return change

    return of


def _factors(read: Read, keys: Sequence[str], count: int, experts: slice) -> tuple[Tensor, Tensor]:
    """Matrices B (out, r, e) and A (e, r, in) of some experts, as PEFT has them side by side for all."""
    a, b = read(keys[0]), read(keys[1])
    return b.reshape(len(b), -1, count)[:, :, experts], a.reshape(count, -1, a.shape[-1])[experts]
