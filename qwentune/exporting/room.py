"""Whether a model that answers has room here, judged by the headers of its files before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

from qwentune.errors import DoesNotFitError, Problem, counted
from qwentune.exporting.finished import FinishedRun
from qwentune.facts.models import model_spec
from qwentune.facts.weight_files import StoredTensor, read_adapter, read_weights

Form: TypeAlias = Literal["fp32", "as stored", "4 bits"]
LEAST_TOKENS = 2048  # of prompt and answer, for which there must be room
WORKSPACE_BYTES = 2**30  # of CUDA's context and libraries, of activations; a host has them anyway, and swaps others
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight in 4 bits, its scales in 8
# Linear layers that bitsandbytes takes: no embedding, head, router, tower, nor experts, which transformers fuses.
IN_4_BITS = re.compile(r"(?!.*(?:embed_tokens|lm_head|visual|audio|experts|mlp\.gate\.)).+\.weight")


@dataclass(frozen=True)
class Memory:
    """What weights and caches may fill: a card, or the host."""

    name: str
    free_bytes: int
    is_gpu: bool


@dataclass(frozen=True)
class Room:
    """The form in which weights are loaded, how many tokens of context have room beside them, and what to say of it."""

    form: Form
    tokens: int
    remark: str = ""


def room(run: FinishedRun, folders: Sequence[Path], memory: Memory) -> Room:
    """The best form in which the weights of all these folders fit, with the run's adapter where it has one.

    On a card as they are stored, else in 4 bits; on a host in fp32, which any processor reckons in, else as they are
    stored. Raises DoesNotFitError where none leaves room for a short talk.
    """
    spec = model_spec(run.model)
    added = read_adapter(run.trained) if run.has_adapter else {}
    stored = [(name, tensor) for folder in folders for name, tensor in read_weights(folder).items()]
    forms: tuple[Form, ...] = ("as stored", "4 bits") if memory.is_gpu else ("fp32", "as stored")
    needed: dict[Form, int] = {}
    for form in forms:
        adapter = sum(_bytes(name, tensor, "as stored" if form == "4 bits" else form) for name, tensor in added.items())
        needed[form] = round(sum(_bytes(name, tensor, form) for name, tensor in stored) + adapter)
        per_token = 2 * spec.num_attention_layers * spec.kv_size * (4 if form == "fp32" else 2)
        left = memory.free_bytes - needed[form] - (WORKSPACE_BYTES if memory.is_gpu else 0)
        tokens = min(spec.max_positions, left // max(1, per_token * len(folders)))
        if tokens >= min(LEAST_TOKENS, spec.max_positions):
            return Room(form, tokens, "" if form == forms[0] else _remark(run, form, needed, memory))
    sizes = " and ".join(f"{size / 1e9:,.1f} GB {_words(form)}" for form, size in needed.items())
    what = f"the weights take {sizes}, beside {counted(LEAST_TOKENS, 'token{|s}')} of context; {_free(memory)}"
    fix = f"Free some of it, or take more; `qwentune export {run.folder} --gguf q8_0` writes a file for llama.cpp."
    raise DoesNotFitError(Problem(run.model, what, fix))


def _bytes(name: str, tensor: StoredTensor, form: Form) -> float:
    if form == "fp32":
        return prod(tensor.shape) * 4
    if form == "4 bits" and len(tensor.shape) == 2 and IN_4_BITS.fullmatch(name):
        return prod(tensor.shape) * NF4_BYTES
    return tensor.num_bytes


def _remark(run: FinishedRun, form: Form, needed: dict[Form, int], memory: Memory) -> str:
    (first, too_much), (_, size) = list(needed.items())[:2]
    head = f"the weights take {too_much / 1e9:,.1f} GB {_words(first)}, and {_free(memory)}: they are loaded "
    if form == "as stored":
        return f"{head}{_words(form)} ({size / 1e9:,.1f} GB), in which few processors are quick"
    meaning = "as they were trained" if run.tuning == "qlora" else "answers may differ from those of the export"
    return f"{head}in 4 bits ({size / 1e9:,.1f} GB); {meaning}"


def _words(form: Form) -> str:
    return form if form == "as stored" else f"in {form}"


def _free(memory: Memory) -> str:
    return f"{memory.free_bytes / 1e9:,.1f} GB of {memory.name} are free"
