"""Model folders and adapters that something has happened to: their files mutated as bytes and as values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = tuple[str, Callable[[Path], None]]  # what is done to a file, in words

# In place of any value of a JSON file.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 10**30, -0.5, 0.1, 1e999, float("nan"), "", "x", "\ud800", "64", [], {}, [[]],
    [None], [3], {"a": 1}, ["q_proj"], "all-linear", "int8", "(a",
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and objects some."""
    yield at
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from places(value[index], (*at, index))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; `...` takes the place away."""
    if not at:
        return new
    changed = copy.copy(value)
    if len(at) == 1 and new is ...:
        del changed[at[0]]
    else:
        changed[at[0]] = put(value[at[0]], at[1:], new) if at[1:] else new
    return changed


def of_value(chance: random.Random, content: Any) -> Mutation:
    """One value of a JSON file becomes another, or is taken away."""
    at = chance.choice([*places(content)])
    new = ... if at and chance.random() < 0.2 else chance.choice(VALUES)
    return f"{'.'.join(map(str, at))} = {'nothing' if new is ... else repr(new)}", lambda path: path.write_text(
        json.dumps(put(content, at, new)), errors="surrogatepass"
    )


def of_bytes(chance: random.Random) -> Mutation:
    """A file is cut, emptied, overwritten, grown, or no file at all."""
    kind = chance.choice(["cut", "empty", "flip", "zeros", "binary", "insert", "folder", "deep", "spaces", "dangling"])
    seed = chance.random()

    def mutate(path: Path) -> None:
        dice, content = random.Random(seed), path.read_bytes()
        place = dice.randrange(max(1, len(content)))
        if kind in ("folder", "dangling"):
            path.unlink()
            path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
            return
        flipped = content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]
        path.write_bytes(
            {
                "cut": content[:place],
                "empty": b"",
                "flip": flipped,
                "zeros": bytes(len(content)),
                "binary": dice.randbytes(200),
                "insert": content[:place] + dice.randbytes(dice.randrange(1, 9)) + content[place:],
                "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
                "spaces": b" \n",
            }[kind]
        )

    return kind, mutate


def of_header(chance: random.Random, file: Path) -> Mutation:
    """The header of a safetensors file tells of other tensors, or is another one; what stands behind it may too."""
    content = file.read_bytes()
    num_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + num_bytes])
    behind = content[8 + num_bytes :]
    kind = chance.choice(["length", "value", "rename", "drop", "swap", "dtype", "more", "resize"])
    names = [name for name in header if name != "__metadata__"]
    first, second = chance.sample(names, 2)
    length: int | None = None
    if kind == "length":
        length = chance.choice([0, 1, num_bytes - 1, num_bytes + 1, 2**40, 2**63 + 5, len(content)])
    elif kind == "value":
        at = chance.choice([place for place in places(header) if place])
        header = put(header, at, chance.choice(VALUES))
    elif kind == "rename":
        header = {(name + "x" if name == first else name): entry for name, entry in header.items()}
    elif kind == "drop":
        dropped = header.pop(first)["data_offsets"]
        size = dropped[1] - dropped[0]
        for name in header:
            if name != "__metadata__" and header[name]["data_offsets"][0] >= dropped[1]:
                header[name] = {**header[name], "data_offsets": [x - size for x in header[name]["data_offsets"]]}
        behind = behind[: dropped[0]] + behind[dropped[1] :]
    elif kind == "swap":
        header[first], header[second] = header[second], header[first]
    elif kind == "dtype":
        old = header[first]
        wide = {"F32": ("I32", 1), "F16": ("I16", 1), "BF16": ("I16", 1)}[old["dtype"]]
        header[first] = {**old, "dtype": wide[0]}
    elif kind == "more":
        header["model.one_more.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(behind), len(behind) + 4]}
        behind += bytes(4)
    elif kind == "resize":
        header[first] = {**header[first], "shape": [1, *header[first]["shape"]]}
    text = json.dumps(header).encode(errors="replace")
    written = (len(text) if length is None else length).to_bytes(8, "little") + text + behind
    return f"header {kind} of {first}", lambda path: path.write_bytes(written) and None
