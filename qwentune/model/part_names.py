"""What a decoder's tensors are called alone and in the model that it is a part of, and adapters named for either.

A run on texts alone loads the decoder of a Qwen3.5 without its vision tower; its base's files, and servers, name the
whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from qwentune.facts.adapter_config import ADAPTER_CONFIG, read_adapter_config
from qwentune.facts.documents import read_object
from qwentune.facts.media import FAMILIES
from qwentune.facts.towers import LOADED_ALONE, not_adapted
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter

DECODER, OF_THE_WHOLE = "model.", "model.language_model."
PREFIX = "base_model.model."  # that PEFT puts before each name
LISTS, TABLES = ("target_modules", "target_parameters"), ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def decoder_name(name: str) -> str:
    """The name that a tensor or module of the whole model has in its decoder alone."""
    return name.replace(OF_THE_WHOLE, DECODER, 1) if name.startswith(OF_THE_WHOLE) else name


def name_as_whole(folder: Path, base: Path) -> None:
    """Gives an adapter on a decoder that was loaded alone the names that its modules have in the base's own class."""
    if read_object(base / "config.json").get("model_type") in LOADED_ALONE and not _names_the_whole(folder):
        _rename(folder, _whole_name, not_adapted(()))


@contextmanager
def named_for(config: PreTrainedConfig, adapter: Path) -> Iterator[Path]:
    """The folder of an adapter as a model of this configuration is named: a copy, where it was made for the whole."""
    if config.model_type in FAMILIES or not _names_the_whole(adapter):
        yield adapter
        return
    with TemporaryDirectory(prefix="qwentune-") as copy:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(adapter / name, Path(copy, name))
        _rename(Path(copy), decoder_name, None)
        yield Path(copy)


def _names_the_whole(folder: Path) -> bool:
    return any(name.startswith(PREFIX + OF_THE_WHOLE) for name in read_adapter(folder))


def _rename(folder: Path, rename: Callable[[str], str], excluded: str | None) -> None:
    file = folder / ADAPTER_WEIGHTS
    with safe_open(file, framework="pt") as opened:
        names: list[str] = list(opened.keys())
        tensors = {PREFIX + rename(name.removeprefix(PREFIX)): opened.get_tensor(name) for name in names}
    save_file(tensors, file, {"format": "pt"})
    config = read_adapter_config(folder)
    for key in LISTS:
        if isinstance(config.get(key), list):
            config[key] = [rename(name) for name in config[key]]
    for key in TABLES:
        if isinstance(config.get(key), dict):
            config[key] = {rename(name): value for name, value in config[key].items()}
    config["exclude_modules"] = excluded
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole_name(name: str) -> str:
    return OF_THE_WHOLE + name.removeprefix(DECODER) if name.startswith(DECODER) else name
