"""What safetensors files hold, read from their headers: names, shapes and dtypes of tensors, without torch.

Format: 8 bytes with the header's length, little-endian, the header as JSON, then the tensors without a gap.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, cast

from qwentune.errors import Problem, ResumeError, UsageError
from qwentune.facts.documents import MEND, is_too_deep, read_object, shown

LONGEST_HEADER_BYTES = 2**25  # a model of 480B has 4 MB of it over all its files
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Bits of a value; those of fewer than 8 are packed.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_TRAINABLE = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, by the file's header; its bytes begin at `start` in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * _BITS[self.dtype] // 8


class _FaultError(Exception):
    """What is wrong with a header."""


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name: of its one file, or of all files that its index names.

    Raises ResumeError with every file that is cut, no safetensors file, or not what the index says, and where a tensor
    is of a kind that no model computes with.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return _read([folder / WEIGHTS])
    index = folder / INDEX
    try:
        files = read_object(index).get("weight_map")
    except UsageError as error:
        raise ResumeError(error.problems) from None
    files = cast("dict[str, Any]", files) if isinstance(files, dict) else {}
    if not files or not all(isinstance(name, str) for name in files.values()):
        raise ResumeError(Problem(f"{index}: weight_map", "names no files of tensors.", MEND))
    outside = sorted({name for name in files.values() if Path(name).name != name})
    if outside:
        raise ResumeError(Problem(f"{index}: weight_map", f"names {outside[0][:80]!r}, no file of this folder.", MEND))
    stored = _read([folder / name for name in sorted({*files.values()})], files)
    if lost := sorted({*files} - {*stored}):
        what = f"names {len(lost)} tensors that {folder / files[lost[0]]} does not hold, the first: {lost[0][:80]}"
        raise ResumeError(Problem(f"{index}: weight_map", what, MEND))
    return stored


def read_adapter(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter by name; ResumeError as for a checkpoint."""
    return _read([folder / ADAPTER_WEIGHTS])


def _read(files: list[Path], expected: dict[str, str] | None = None) -> dict[str, StoredTensor]:
    """The tensors of several files; where it is `expected` in which file each stands, it must be that one."""
    stored: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            tensors = read_header(file)
        except ResumeError as error:
            problems += error.problems
            continue
        for name, tensor in tensors.items():
            if expected is not None and expected.get(name) != file.name:
                said = expected.get(name, "no file")
                problems.append(Problem(str(file), f"holds {name[:80]}, for which the index names {said}", MEND))
            elif tensor.dtype not in _TRAINABLE:
                what = f"{name[:80]} is {tensor.dtype}; weights are {', '.join(_TRAINABLE)}"
                problems.append(
                    Problem(str(file), what, "Take the 16-bit checkpoint: this one is quantised or broken.")
                )
        stored |= tensors
    if problems:
        raise ResumeError(problems)
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; ResumeError where its header is not that of a whole file."""
    try:
        return _header(file)
    except _FaultError as error:
        raise ResumeError(Problem(str(file), str(error), MEND)) from None
    except OSError as error:
        raise ResumeError(Problem(str(file), f"cannot be read: {error.strerror}", MEND)) from None


def _header(file: Path) -> dict[str, StoredTensor]:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _FaultError("is no file")
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(8), "little")
        if status.st_size < 10:
            raise _FaultError(f"is empty or cut: it has {status.st_size} bytes")
        if num_bytes > min(LONGEST_HEADER_BYTES, status.st_size - 8):
            raise _FaultError(
                f"is cut, or no safetensors file: of a header of {num_bytes} bytes {status.st_size - 8} are there"
            )
        text = opened.read(num_bytes)
    try:
        header: Any = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
        if b"\\u" in text:  # an escape of half a character, which Python reads and safetensors does not
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # a UnicodeDecodeError is one, too
        raise _FaultError("has a broken header: no JSON") from None
    if not isinstance(header, dict) or is_too_deep(cast("object", header)):
        raise _FaultError("has a broken header: no object of tensors")
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(
                isinstance(x, str) for x in cast("dict[str, Any]", entry).values()
            ):
                raise _FaultError("has a broken header: its metadata are no texts")
            continue
        tensors[name], begin, end = _tensor(name, entry, file, 8 + num_bytes)
        places.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            raise _FaultError(f"has a broken header: {name[:80]} begins at byte {begin}, not at {last}")
        last = end
    if (held := status.st_size - 8 - num_bytes) != last:
        raise _FaultError(f"is cut, or longer than it should be: {held} bytes of tensors, its header tells of {last}")
    return tensors


def _tensor(name: str, entry: object, file: Path, offset: int) -> tuple[StoredTensor, int, int]:
    described = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    dtype, shape, place = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_whole(shape) or not _are_whole(place) or len(place) != 2:
        raise _FaultError(f"has a broken header: {name[:80]} has no dtype, shape and place")
    begin, end = place
    if dtype not in _BITS:
        raise _FaultError(f"has a broken header: {name[:80]} is of an unknown kind, {dtype[:40]}")
    if not begin <= end or (end - begin) * 8 != prod(shape) * _BITS[dtype]:
        what = f"{name[:80]} is {dtype} {shown(shape)} in bytes {shown(place)}"
        raise _FaultError(f"has a broken header: {what}")
    return StoredTensor(dtype, tuple(shape), file, offset + begin), begin, end


def _are_whole(values: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none below 0."""
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in cast("list[object]", values))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found
