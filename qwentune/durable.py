"""Files and folders that appear whole or not at all, also when the power fails."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

OLD = ".old"


def write_text(path: Path, text: str) -> None:
    """Replaces a file; a link of that name is replaced too, never followed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk needs the room
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_folder(written: Path, target: Path) -> None:
    """Puts a finished folder in the place of `target`; what stood there goes only once the new one is on disk."""
    for path in written.rglob("*"):
        if path.is_file():
            sync(path)
    sync_folders(written)
    old = target.with_name(f".{target.name}{OLD}")
    remove(old)
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(written, target)
    sync(target.parent)
    remove(old)


def remove(path: Path) -> None:
    """Removes a folder with all in it, a file, or a link without what it points to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folder: Path) -> None:
    """Waits until the names in a folder and in all below it are on disk."""
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        sync(path)
    sync(folder)
