"""An Omni checkpoint as it was, with a tuned thinker in it: servers take no thinker alone."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from qwentune.durable import mark, remove, replace_folder
from qwentune.errors import Problem, ResumeError
from qwentune.facts.documents import read_object
from qwentune.facts.weight_files import read_weights

OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
THINKER = "thinker."


def is_omni(folder: Path) -> bool:
    """Whether a folder holds a thinker and what speaks."""
    return read_object(folder / "config.json").get("model_type") in OMNI


def is_thinker(folder: Path) -> bool:
    """Whether a folder holds the weights of a thinker alone."""
    return str(read_object(folder / "config.json", optional=True).get("model_type")).endswith("_thinker")


def put_thinker_in(base: Path, thinker: Path) -> None:
    """Makes the folder of a tuned thinker one of the whole model: the other tensors and files are those of `base`.

    Raises ResumeError where the thinker's tensors are not those that the base has under `thinker.`.
    """
    stored = read_weights(base)
    # Under the name that the whole has, which transformers keeps or not.
    tuned = {
        THINKER + name.removeprefix(THINKER): (name, tensor.file) for name, tensor in read_weights(thinker).items()
    }
    expected = {name for name in stored if name.startswith(THINKER)}
    if expected != tuned.keys():
        other = sorted(expected ^ tuned.keys())
        what = f"{len(other)} tensors are not those of the base's thinker, the first: {other[0]}"
        raise ResumeError(Problem(str(thinker), what))
    sources = {name: (name, tensor.file) for name, tensor in stored.items()} | tuned
    whole = thinker.with_name(f".{thinker.name}.whole")
    remove(whole)
    mark(whole)
    with ExitStack() as held:
        paths = {file for _, file in sources.values()}
        opened: dict[Path, Any] = {file: held.enter_context(safe_open(file, framework="pt")) for file in paths}
        for file in sorted({tensor.file for tensor in stored.values()}):
            of_file = [name for name, tensor in stored.items() if tensor.file == file]
            tensors = {name: opened[sources[name][1]].get_tensor(sources[name][0]) for name in of_file}
            save_file(tensors, whole / file.name, metadata={"format": "pt"})
    of_weights = ("config.json", *(file.name for _, file in tuned.values()))
    kept = [file for file in thinker.iterdir() if file.name not in of_weights and ".safetensors" not in file.name]
    for file in (*kept, *base.iterdir()):
        if file.is_file() and not (whole / file.name).exists():
            shutil.copyfile(file, whole / file.name)
    replace_folder(whole, thinker)
