"""Tiny folders of the nine classes, and files to show them, that the whole session shares. Do not write into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.media import material
from tests.media.checkpoints import TYPES, MediaType, write_media_checkpoint
from tests.media.material import Item, Material
from tests.media.oracle import Class


@pytest.fixture(scope="session")
def classes(session_folder: Path) -> dict[str, Class]:
    """A folder of each class with a vocabulary of 1000 ranks, without weights."""

    def one(name: MediaType) -> Class:
        folder = write_media_checkpoint(session_folder / "media" / name, name)
        return Class(name, folder, PreTrainedTokenizerFast.from_pretrained(folder))

    return {name: one(name) for name in TYPES}


@pytest.fixture(scope="session")
def files(session_folder: Path) -> Material:
    """Pictures, sounds and videos."""
    return material.make(session_folder / "material", clips=(*material.CLIPS, *material.ODD_CLIPS))


@pytest.fixture(scope="session")
def items(files: Material) -> dict[str, Item]:
    """The same by their names."""
    return {item.name: item for item in (*files.pictures, *files.sounds, *files.clips)}
