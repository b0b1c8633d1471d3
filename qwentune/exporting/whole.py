"""What was tuned of a checkpoint, in the place that it has there: servers load the class that the base's files name.

A run on texts alone tunes the decoder of a Qwen3.5 without its vision tower, and of an Omni model only the thinker is
ever tuned.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from qwentune.durable import mark, remove, replace_file, replace_folder
from qwentune.errors import Problem, ResumeError
from qwentune.exporting.changes import EMBEDDING, HEAD, PREFIX, place
from qwentune.exporting.config_keys import kept_config
from qwentune.exporting.tensors import ModelTensor, write_tensors
from qwentune.facts.adapter_config import ADAPTER_CONFIG, read_adapter_config
from qwentune.facts.documents import read_object
from qwentune.facts.towers import LOADED_ALONE, not_adapted
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter, read_weights

DECODER, OF_THE_WHOLE = "model.", "model.language_model."


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
    write_tensors(tensors, stored, whole)
    config = kept_config(*(read_object(folder / "config.json") for folder in (base, tuned)))
    (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_other_files(tuned, whole)
    replace_folder(whole, tuned)


def copy_other_files(base: Path, target: Path) -> None:
    """Copies what stands beside a base's weights and is not there yet: voices, processor files."""
    for file in base.iterdir():
        if file.is_file() and ".safetensors" not in file.name and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def name_as_part(folder: Path) -> None:
    """Gives the tensors of a decoder that was loaded alone the names of its own class, which its config.json declares.

    Transformers writes them under those of the whole.
    """
    stored = read_weights(folder)
    names = {name: name.replace(OF_THE_WHOLE, DECODER, 1) for name in stored if name.startswith(OF_THE_WHOLE)}
    if not names:
        return
    renamed = {names.get(name, name): tensor for name, tensor in stored.items()}
    named = folder.with_name(f".{folder.name}.named")
    remove(named)
    mark(named)
    write_tensors({name: ModelTensor(tensor) for name, tensor in renamed.items()}, renamed, named)
    for file in named.iterdir():
        if ".safetensors" in file.name:
            replace_file(file, folder / file.name)
    remove(named)


def name_as_whole(folder: Path, base: Path) -> None:
    """Gives an adapter on a decoder that was loaded alone the names that its modules have in the base's own class."""
    if read_object(base / "config.json").get("model_type") not in LOADED_ALONE:
        return
    file = folder / ADAPTER_WEIGHTS
    if any(OF_THE_WHOLE in name for name in read_adapter(folder)):
        return
    with safe_open(file, framework="pt") as opened:
        tensors = {_whole_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, {"format": "pt"})
    config = read_adapter_config(folder)
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = [_whole_module(name) for name in config[key]]
    for key in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if isinstance(config.get(key), dict):
            config[key] = {_whole_module(name): value for name, value in config[key].items()}
    config["exclude_modules"] = config.get("exclude_modules") or not_adapted(())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _whole_name(name: str) -> str:
    return PREFIX + _whole_module(name.removeprefix(PREFIX))


def _whole_module(name: str) -> str:
    return OF_THE_WHOLE + name.removeprefix(DECODER) if name.startswith(DECODER) else name
