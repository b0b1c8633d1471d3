"""The rendered examples of a run on disk: written one after the other, read as memory-mapped arrays.

What an example shares with an earlier one of the same dialogue is stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qwentune.data.layout import media_table
from qwentune.data.layout.media_table import KeptTable, MediaTable
from qwentune.data.layout.sums import DamagedError, StaleError, opened, prove, refuse_stale, sums_of
from qwentune.data.media.pads import pad_of
from qwentune.data.media.seen import Seen
from qwentune.data.reading.faults import Waiting
from qwentune.data.rendering.example import PARTS, Example, Span
from qwentune.data.sample import Source

DTYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "offsets": np.int64,
    "shared": np.int32,
    "back": np.int32,
    "span_offsets": np.int64,
    "starts": np.int32,
    "stops": np.int32,
    "weights": np.float32,
    "turns": np.int32,
    "files": np.int32,
    "lines": np.int64,
    "versions": np.int16,
    "parts": np.int8,
    "train": np.int64,
    "evaluation": np.int64,
}
BUFFER_TOKENS = 2**20
DESCRIPTION, MANIFEST = "description.json", "manifest.json"
LARGEST_MANIFEST_BYTES = 2**24  # which lists the sums of more than 10 TB


OF_EXAMPLES = tuple(name for name in DTYPES if name not in ("files", "train", "evaluation"))
TRAINED = ("input_ids", "offsets", "shared", "back", "span_offsets", "starts", "stops", "weights", "versions", "train")


@dataclass(frozen=True)
class Examples:
    """All rendered examples of a run, memory-mapped.

    Example i begins with `shared[i]` tokens of example `i - back[i]`, the most that it shares with an earlier one of
    its sample, and goes on with `input_ids[offsets[i]:offsets[i + 1]]`. It trains its tokens `starts[k]` to `stops[k]`,
    each with `weights[k]`, for k from `span_offsets[i]` to `span_offsets[i + 1]`; `turns[k]` is the message they belong
    to, -1 in a text. Every epoch trains the examples of version -1 and those of one other version. `train` and
    `evaluation` are indices of examples in training order, an index standing as often as its source is repeated.
    `parts` are indices of `PARTS`. A negative id −(k + 1) is a pad of `media[k]`.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    shared: NDArray[np.int32]
    back: NDArray[np.int32]
    span_offsets: NDArray[np.int64]
    starts: NDArray[np.int32]
    stops: NDArray[np.int32]
    weights: NDArray[np.float32]
    turns: NDArray[np.int32]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]
    versions: NDArray[np.int16]
    parts: NDArray[np.int8]
    train: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    file_names: tuple[str, ...]
    media: tuple[Seen, ...] = ()

    @classmethod
    def open(cls, folder: Path, sums: Mapping[str, Any], file_names: Sequence[str]) -> Examples:
        """The examples that an `ExampleWriter` wrote into `folder`; DamagedError where a file has not its sums,
        StaleError with the row where that of a medium is not what it was.

        What was proved is what is mapped, and stays so where the folder is moved or removed meanwhile.
        """
        arrays = {name: _mapped(folder, name, sums) for name in DTYPES}
        table = _media(folder, sums)
        examples = cls(**arrays, file_names=tuple(file_names), media=table.media)
        if table.changed is not None:
            number, file = table.changed
            place = int(np.flatnonzero(examples.input_ids == pad_of(number))[0])
            source = examples.source(int(np.searchsorted(examples.offsets, place, side="right")) - 1)
            raise StaleError(f"{source}: {file} was written or removed since the data was rendered")
        if table.come is not None:
            place, source = table.come
            raise StaleError(f"{source} was left out, and {place} is another since")
        return examples

    def __len__(self) -> int:
        return len(self.shared)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example."""
        return self.shared.astype(np.int64) + np.diff(self.offsets)

    @cached_property
    def num_trained(self) -> NDArray[np.int64]:
        """The number of supervised tokens of each example."""
        return self._summed(self.stops - self.starts.astype(np.int64))

    @cached_property
    def trained_weights(self) -> NDArray[np.float64]:
        """The sum of the loss weights of each example."""
        return self._summed((self.stops - self.starts) * self.weights.astype(np.float64))

    def length(self, i: int) -> int:
        """Number of tokens of example i."""
        return int(self.lengths[i])

    def ids(self, i: int) -> NDArray[np.int32]:
        """The tokens of example i."""
        parts = [self.input_ids[self.offsets[i] : self.offsets[i + 1]]]
        missing = int(self.shared[i])
        while missing:
            i -= int(self.back[i])
            known = int(self.shared[i])
            if known < missing:
                start = int(self.offsets[i])
                parts.append(self.input_ids[start : start + missing - known])
                missing = known
        return np.concatenate(parts[::-1]) if len(parts) > 1 else parts[0]

    def tokens(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of example i."""
        weights = np.zeros(self.length(i), dtype=np.float32)
        for k in range(self.span_offsets[i], self.span_offsets[i + 1]):
            weights[self.starts[k] : self.stops[k]] = self.weights[k]
        return self.ids(i), weights

    def source(self, i: int) -> Source:
        """Where the sample of example i stands."""
        return Source(self.file_names[int(self.files[i])], int(self.lines[i]))

    def example(self, i: int) -> Example:
        """Example i with its source."""
        spans = tuple(
            Span(int(self.starts[k]), int(self.stops[k]), float(self.weights[k]), int(self.turns[k]))
            for k in range(self.span_offsets[i], self.span_offsets[i + 1])
        )
        version, part = int(self.versions[i]), PARTS[int(self.parts[i])]
        return Example(self.source(i), self.ids(i).tolist(), spans, version=version, part=part, media=self.media)

    def _summed(self, values: NDArray[Any]) -> NDArray[Any]:
        sums = np.concatenate([[0], np.cumsum(values)])
        return sums[self.span_offsets[1:]] - sums[self.span_offsets[:-1]]


class ExampleColumns:
    """Examples of one file as the arrays of `Examples`, places counted from the first of them."""

    def __init__(self) -> None:
        self.values: dict[str, array[Any]] = {name: array(np.dtype(DTYPES[name]).char) for name in OF_EXAMPLES}
        self.media = MediaTable()

    def __len__(self) -> int:
        return len(self.values["shared"])

    def add(self, examples: Sequence[Example]) -> None:
        """Adds the examples of one sample."""
        values = self.values
        for example in examples:
            tail = example.tail
            if example.media:
                tail = self.media.renumbered(np.asarray(tail, dtype=np.int32), example.media).tolist()
            values["input_ids"].extend(tail)
            values["offsets"].append(len(values["input_ids"]))
            values["shared"].append(example.shared)
            values["back"].append(example.back)
            for span in example.spans:
                values["starts"].append(span.start)
                values["stops"].append(span.stop)
                values["weights"].append(span.weight)
                values["turns"].append(span.turn)
            values["span_offsets"].append(len(values["starts"]))
            values["lines"].append(example.source.line)
            values["versions"].append(example.version)
            values["parts"].append(PARTS.index(example.part))


@dataclass(frozen=True, slots=True)
class Mark:
    """How far an `ExampleWriter` has come."""

    num_examples: int
    num_tokens: int
    num_spans: int
    num_media: int
    control_ids_used: frozenset[int]
    num_bytes: Mapping[str, int]


class ExampleWriter:
    """Writes the arrays of `Examples` into a folder, and notes which control tokens they hold."""

    def __init__(self, folder: Path, control_ids: Collection[int]) -> None:
        self.folder = folder
        self.control_ids = np.asarray(sorted(control_ids), dtype=np.int32)
        self.control_ids_used: set[int] = set()
        self.file_names: dict[str, int] = {}
        self.media = MediaTable()
        self.num_examples = 0
        self._num_tokens = self._num_spans = 0
        self._values: dict[str, array[Any]] = {name: array(np.dtype(dtype).char) for name, dtype in DTYPES.items()}
        self._values["offsets"].append(0)
        self._values["span_offsets"].append(0)

    def __enter__(self) -> ExampleWriter:
        with ExitStack() as stack:
            self._files = {name: stack.enter_context(_path(self.folder, name).open("wb")) for name in DTYPES}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, examples: ExampleColumns, file: str) -> None:
        """Adds examples of a file."""
        if not len(examples):
            return
        before = {"offsets": self._num_tokens, "span_offsets": self._num_spans}
        for name, values in examples.values.items():
            if name in before:
                ends = np.frombuffer(values, dtype=np.int64) + before[name]
                self._values[name].frombytes(ends.tobytes())
            elif name == "input_ids" and len(examples.media):
                ids = np.frombuffer(values, dtype=np.int32)
                self._values[name].frombytes(self.media.renumbered(ids, list(examples.media.numbers)).tobytes())
            else:
                self._values[name].extend(values)
        self._values["files"].extend([self.file_names.setdefault(file, len(self.file_names))] * len(examples))
        self.num_examples += len(examples)
        self._num_tokens += len(examples.values["input_ids"])
        self._num_spans += len(examples.values["starts"])
        if len(self._values["input_ids"]) > BUFFER_TOKENS:
            self._flush()

    def mark(self) -> Mark:
        """How far it has come, to be taken back to."""
        self._flush()
        sizes = {name: file.tell() for name, file in self._files.items()}
        used = frozenset(self.control_ids_used)
        return Mark(self.num_examples, self._num_tokens, self._num_spans, len(self.media), used, sizes)

    def take_back(self, mark: Mark) -> None:
        """Takes back what was added since."""
        for name, file in self._files.items():
            del self._values[name][:]
            file.seek(mark.num_bytes[name])
            file.truncate()
        self.num_examples, self._num_tokens, self._num_spans = mark.num_examples, mark.num_tokens, mark.num_spans
        self.control_ids_used = set(mark.control_ids_used)
        self.media.shorten(mark.num_media)

    def finish(self, train: NDArray[np.int64], evaluation: NDArray[np.int64], waiting: Sequence[Waiting] = ()) -> str:
        """Writes the order of examples; a hash of what is trained, wherever it was read.

        `waiting` are the problems of rows that were left out and may be mended beside their file.
        """
        self._values["train"].frombytes(train.astype(np.int64).tobytes())
        self._values["evaluation"].frombytes(evaluation.astype(np.int64).tobytes())
        self._flush()
        content = hashlib.sha256()
        for name in TRAINED:
            with _path(self.folder, name).open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        if len(self.media) or waiting:
            content.update(self.media.write(self.folder, waiting))
        return content.hexdigest()[:32]

    def _flush(self) -> None:
        ids = np.frombuffer(self._values["input_ids"], dtype=np.int32)
        self.control_ids_used.update(np.intersect1d(ids[ids >= self.control_ids[0]], self.control_ids).tolist())
        del ids  # an array with a view of it cannot shrink
        for name, values in self._values.items():
            values.tofile(self._files[name])
            self._files[name].flush()
            del values[:]


def seal(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the description of a finished folder, and last the sums by which all of it is proved when it is opened."""
    (folder / DESCRIPTION).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    sums: dict[str, list[int]] = {}
    media = [media_table.FILE] if (folder / media_table.FILE).exists() else []
    for name in (DESCRIPTION, *media, *(_path(folder, name).name for name in DTYPES)):
        with opened(folder / name) as file:
            sums[name] = sums_of(file)
    (folder / MANIFEST).write_text(json.dumps(sums), encoding="utf-8")


def open_sealed(folder: Path, fingerprint: str) -> tuple[dict[str, Any], Examples]:
    """The description and the examples of a sealed folder; DamagedError where any of it is not what was written."""
    refuse_stale(folder)
    with opened(folder / MANIFEST) as file:
        try:
            parsed = json.loads(file.read(LARGEST_MANIFEST_BYTES))
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, dict):
        raise DamagedError(f"{MANIFEST} is not the list of sums that was written")
    sums = cast(dict[str, Any], parsed)
    with opened(folder / DESCRIPTION) as file:
        prove(file, DESCRIPTION, sums)
        file.seek(0)
        description = json.loads(file.read())
    if description["fingerprint"] != fingerprint:
        raise DamagedError(f"{DESCRIPTION} is that of other data")
    return description, Examples.open(folder, sums, description["file_names"])


def _media(folder: Path, sums: Mapping[str, Any]) -> KeptTable:
    """The media of a sealed folder."""
    if media_table.FILE not in sums:
        return KeptTable()
    with opened(folder / media_table.FILE) as file:
        prove(file, media_table.FILE, sums)
        file.seek(0)
        return KeptTable.read(file.read())


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(folder: Path, name: str, sums: Mapping[str, Any]) -> NDArray[Any]:
    path = _path(folder, name)
    with opened(path) as file:
        prove(file, path.name, sums)
        if not os.fstat(file.fileno()).st_size:  # there is nothing to map
            return np.empty(0, dtype=DTYPES[name])
        return np.memmap(file, dtype=DTYPES[name], mode="r")
