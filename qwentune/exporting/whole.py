"""What was tuned of a checkpoint, in the place that it has there: servers load the class that the base's files name.

A run on texts alone tunes the decoder of a Qwen3.5 without its vision tower, and of an Omni model only the thinker is
ever tuned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from qwentune.durable import mark, remove, replace_file, replace_folder
from qwentune.errors import Problem, ResumeError
from qwentune.exporting.changes import EMBEDDING, HEAD, place
from qwentune.exporting.config_keys import kept_config
from qwentune.exporting.processors import is_whole
from qwentune.exporting.tensors import ModelTensor, write_tensors
from qwentune.facts.documents import read_object
from qwentune.facts.towers import part_of
from qwentune.facts.weight_files import read_weights
from qwentune.model.loading import read_config
from qwentune.model.part_names import DECODER, decoder_name
from qwentune.model.senses import network_class


def is_part(folder: Path, base: Path) -> bool:
    """Whether a folder holds the weights of a part of the model in `base`, loaded without the rest."""
    kinds = [read_object(each / "config.json", optional=True).get("model_type") for each in (folder, base)]
    return None not in kinds and kinds[0] != kinds[1]


def put_back(base: Path, tuned: Path) -> None:
    """Makes the folder of a tuned part one of the whole model: the other tensors and its config.json are the base's.

    Raises ResumeError where the tuned tensors are not those that the base has of that part.
    """
    stored, ours = read_weights(base), read_weights(tuned)
    at = {place(name): name for name in ours}
    if HEAD not in at and any(place(name) == HEAD for name in stored):  # tied, and stored all the same
        at[HEAD] = at[EMBEDDING]
    kinds = {where.partition(".")[0] for where in at}
    here = {place(name): name for name in stored if place(name).partition(".")[0] in kinds}
    odd = sorted({*here} ^ {*at})
    odd += [where for where, name in here.items() if where in at and stored[name].shape != ours[at[where]].shape]
    if odd:
        what = f"{len(odd)} tensors are not those that the base has of this part, the first: {odd[0]}"
        raise ResumeError(Problem(str(tuned), what))
    tensors = {name: ModelTensor(tensor) for name, tensor in stored.items()}
    tensors |= {name: ModelTensor(ours[at[where]]) for where, name in here.items()}
    whole = tuned.with_name(f".{tuned.name}.whole")
    remove(whole)
    mark(whole)
    try:
        write_tensors(tensors, stored, whole)
        config = kept_config(*(read_object(folder / "config.json") for folder in (base, tuned)))
        (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_other_files(tuned, whole)
        replace_folder(whole, tuned)
    finally:
        remove(whole)


def copy_other_files(base: Path, target: Path) -> None:
    """Copies what stands beside a base's weights and is not there yet: voices, processor files."""
    for file in base.iterdir():
        if file.is_file() and ".safetensors" not in file.name and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def name_as_part(folder: Path) -> None:
    """Gives the tensors of a decoder that was loaded alone the names of its own class, which its config.json declares.

    Transformers writes them under those of the whole.
    """
    if is_whole(folder):
        return
    stored = read_weights(folder)
    renamed = {decoder_name(name): tensor for name, tensor in stored.items()}
    if renamed.keys() == stored.keys():
        return
    named = folder.with_name(f".{folder.name}.named")
    remove(named)
    mark(named)
    try:
        write_tensors({name: ModelTensor(tensor) for name, tensor in renamed.items()}, renamed, named)
        for file in named.iterdir():
            if ".safetensors" in file.name:
                replace_file(file, folder / file.name)
    finally:
        remove(named)


def write_text_part(tensors: Mapping[str, ModelTensor], base: Path, target: Path) -> None:
    """Writes of a whole model's tensors those that read and write text, and its config.json, as a model of its own."""
    parts = {decoder_name(name): tensor for name, tensor in tensors.items() if name.startswith((DECODER, "lm_head."))}
    parts = {name: tensor for name, tensor in parts.items() if part_of(name) == "language"}
    write_tensors(parts, {name: tensor.stored for name, tensor in parts.items()}, target)
    config = read_config(base, has_media=False)
    config.architectures = [network_class(config).__name__]
    config.to_json_file(target / "config.json")
