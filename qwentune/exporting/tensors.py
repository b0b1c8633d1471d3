"""The tensors of a model one by one, a few rows at a time, from files to files: no more of it is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwentune.errors import Problem, ResumeError
from qwentune.facts.weight_files import INDEX, WEIGHTS, StoredTensor

BLOCK_VALUES = 2**22  # 16 MiB in fp32
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Change:
    """What makes a tensor another: from fp32 rows and the number of the first one to new rows."""

    rows: Callable[[Tensor, int], Tensor]
    needs_all_rows: bool = False


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A tensor of a file, changed on its way where an adapter has something to say of it; of the file's dtype."""

    stored: StoredTensor
    changes: tuple[Change, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is written; a number alone has none."""
        return self.stored.shape

    def blocks(self, values: int = BLOCK_VALUES) -> Iterator[Tensor]:
        """Its rows (along the first axis) in order, about so many values at a time.

        Changed in fp32 and rounded once. Raises ResumeError where a change makes a value that is not finite.
        """
        num_rows = self.shape[0] if self.shape else 1
        step = max(1, values // max(1, prod(self.shape[1:])))
        if any(change.needs_all_rows for change in self.changes):
            step = num_rows
        for first in range(0, num_rows, step):
            block = read_rows(self.stored, first, min(step, num_rows - first))
            if self.changes:
                changed = block.float()
                for change in self.changes:
                    changed = change.rows(changed, first)
                if not changed.isfinite().all():
                    what = "the adapter makes a weight of it that is no number: NaN or infinite"
                    raise ResumeError(Problem(str(self.stored.file), what, "The adapter is broken: nothing is merged."))
                block = changed.to(block.dtype)
            yield block

    def whole(self) -> Tensor:
        """All of it, in fp32."""
        return torch.cat([block.float() for block in self.blocks()]).reshape(self.shape)


def read_rows(stored: StoredTensor, first: int = 0, num_rows: int | None = None) -> Tensor:
    """Some rows of a tensor, or all; (1,) for a number alone. Read, not mapped: pages of a mapped file would count."""
    shape = stored.shape or (1,)
    count = shape[0] - first if num_rows is None else num_rows
    row_bytes = prod(shape[1:]) * DTYPES[stored.dtype].itemsize
    data = bytearray(count * row_bytes)
    with stored.file.open("rb") as file:
        file.seek(stored.start + first * row_bytes)
        if file.readinto(data) != len(data):
            raise ResumeError(Problem(str(stored.file), "The file has become shorter while it was read."))
    rows = torch.frombuffer(data, dtype=DTYPES[stored.dtype]) if data else torch.empty(0, dtype=DTYPES[stored.dtype])
    return rows.reshape(count, *shape[1:])


def write_tensors(tensors: Mapping[str, ModelTensor], layout: Mapping[str, StoredTensor], target: Path) -> None:
    """Writes a checkpoint's tensors into files of the names and the order that `layout` has, with their index.

    The header of a file comes first in it and is known before its tensors are.
    """
    files = dict.fromkeys(stored.file for stored in layout.values())
    for file in files:
        names = sorted((name for name in layout if layout[name].file == file), key=lambda name: layout[name].start)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            stored = tensors[name].stored
            begin, end = end, end + stored.num_bytes
            header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / file.name).open("wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for block in tensors[name].blocks():
                    written.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if [file.name for file in files] != [WEIGHTS]:
        total = sum(tensors[name].stored.num_bytes for name in layout)
        weight_map = {name: layout[name].file.name for name in sorted(layout)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
