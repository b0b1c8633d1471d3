"""From a configuration of another tool to its translation."""

from __future__ import annotations

from pathlib import Path

from qwentune.errors import Problem
from qwentune.peers import axolotl, llama_factory, ms_swift
from qwentune.peers.configuration import Configuration, read_configuration
from qwentune.peers.hyperparameters import translate_hyperparameters
from qwentune.peers.translation import Translation, begin, finish

DATA = {
    "llama_factory": llama_factory.translate_data,
    "axolotl": axolotl.translate_data,
    "ms_swift": ms_swift.translate_data,
}


def translate_file(path: Path) -> Translation:
    """What the configuration in a file means here. Raises UsageError where it is none of a tool that is known."""
    return translate(read_configuration(path))


def translate(configuration: Configuration) -> Translation:
    """What a configuration of another tool means here; what cannot be is among its `problems`."""
    translation = begin(configuration)
    DATA[configuration.name](translation)
    translate_hyperparameters(translation)
    if "model" not in translation.settings:
        translation.problems.append(Problem(str(configuration.path), "no model is named", "Give it there first."))
    finish(translation)
    return translation
