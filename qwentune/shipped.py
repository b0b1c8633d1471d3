"""Files that come with qwentune: recipes, launch files and data templates, found from any folder."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = ("recipes", "data_templates", "launch")

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the folders inside the package; in a source checkout they stand beside it.
_ROOT = _PACKAGE if (_PACKAGE / FOLDERS[0]).is_dir() else _PACKAGE.parent


def shipped(path: str | Path) -> Path:
    """The path itself where it exists, else the copy of it that ships with qwentune, under any of `FOLDERS`.

    Where neither exists, the path itself: whoever opens it says what is missing.
    """
    own = Path(path)
    if os.path.lexists(own) or own.is_absolute() or not own.parts or own.parts[0] not in FOLDERS:
        return own
    copy = _ROOT / own
    return copy if os.path.exists(copy) else own


def shipped_files(folder: str) -> list[str]:
    """The files shipped under one of `FOLDERS`, as `folder/name`, sorted."""
    files = (file for file in (_ROOT / folder).rglob("*") if file.is_file())
    return sorted(file.relative_to(_ROOT).as_posix() for file in files)
