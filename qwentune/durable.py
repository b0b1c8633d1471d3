"""Files and folders that appear whole or not at all, also when the power fails; and which of them are ours.

Only what carries our mark is ever removed; anything else in the way is moved aside. Nothing else in the package removes
or renames: a test reads the calls.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwentune.bounded import UnreadableError, read_bytes

MARK = ".qwentune.json"  # in every folder that we may remove or replace
LAYOUT = 1  # of a run folder
MANIFEST = "manifest.json"  # of checkpoints, which carried no other mark before there were marks
MANIFEST_KEYS = {"schema", "step", "facts", "files", "sha256"}
OLD = ".old"
LARGEST_JSON_BYTES = 2**26


@dataclass(frozen=True)
class Mark:
    """Who wrote a folder, what it is, in which layout, and a run's id."""

    written_by: str
    what: str  # "run", which is never removed, or "files", which can be made again
    layout: int
    run: str


def mark(folder: Path, run: str = "") -> None:
    """Makes a folder ours, new or there already: that of a run with its id, or files that can be made again.

    Those carry no id: of two runs that are the same the files are too.
    """
    made = Mark("qwentune", "run" if run else "files", LAYOUT, run)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK, json.dumps(asdict(made)) + "\n")


def read_mark(folder: Path) -> Mark | None:
    """The mark in a folder; None where it has none of ours."""
    try:
        found = Mark(**read_json(folder / MARK))
    except TypeError:
        return None
    is_ours = found.written_by == "qwentune" and isinstance(found.layout, int) and isinstance(found.run, str)
    return found if is_ours else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; an empty one where there is none that can be read."""
    try:
        value = json.loads(read_bytes(path, LARGEST_JSON_BYTES))
    except (UnreadableError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def run_id(folder: Path) -> str:
    """The id of the run whose folder this is; empty where it has no mark."""
    found = read_mark(folder)
    return "" if found is None else found.run


def is_empty(folder: Path, *, besides: str = "") -> bool:
    """Whether nothing else is in a folder, or no more than a mark that was being written when its writer was killed."""
    return {file.name for file in folder.iterdir()} <= {_temporary(folder / MARK).name, besides}


def is_ours(folder: Path) -> bool:
    """Whether a folder may be removed: we marked its files, or it has a checkpoint's manifest, or nothing in it."""
    found = read_mark(folder)
    if found is not None:
        return found.what == "files"
    return set(read_json(folder / MANIFEST)) == MANIFEST_KEYS or is_empty(folder)


def remove(path: Path) -> Path | None:
    """Removes a folder of ours, a file, or a link without what it points to; another folder is moved aside: where to.

    Marks go last, so that what a kill leaves of a folder is still ours.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return None
    if not is_ours(path):
        return move_aside(path)
    marks = {MARK, MANIFEST}
    for child in sorted(path.iterdir(), key=lambda child: child.name in marks):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    path.rmdir()
    return None


def move_aside(path: Path, name: str | None = None) -> Path:
    """Renames a file or folder, by default to `aside-<its name>-<time>` beside it; where to.

    A number is added to a name that is taken.
    """
    name = name or f"aside-{path.name.lstrip('.')}-{time.strftime('%Y%m%d-%H%M%S')}"
    target, count = path.with_name(name), 1
    while os.path.lexists(target):
        count += 1
        target = path.with_name(f"{name}-{count}")
    os.rename(path, target)
    return target


def write_text(path: Path, text: str) -> None:
    """Replaces a file; a link of that name is replaced too, never followed."""
    temporary = _temporary(path)
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


def replace_file(written: Path, target: Path) -> None:
    """Puts a finished file in the place of `target`, on the same file system."""
    sync(written)
    os.replace(written, target)


def put(written: Path, target: Path) -> None:
    """Gives a finished folder, whose files are on disk, its name, which is free."""
    _open_to_readers(written)
    os.rename(written, target)
    sync(target.parent)


def settle(written: Path, target: Path) -> None:
    """Gives a finished folder its name, unless another process has put its own there: then this one goes."""
    try:
        os.rename(written, target)
    except OSError:
        if not target.is_dir():
            raise
        remove(written)


def replace_folder(written: Path, target: Path) -> Path | None:
    """Puts a finished folder in the place of `target`; what stood there goes only once the new one is on disk.

    Where to, if what stood there was not ours.
    """
    for path in written.rglob("*"):
        if path.is_file():
            sync(path)
    sync_folders(written)
    old = target.with_name(f".{target.name}{OLD}")
    aside = remove(old)
    if target.is_dir() and not target.is_symlink() and not is_ours(target):
        aside = move_aside(target)
    elif os.path.lexists(target):
        os.rename(target, old)
    put(written, target)
    remove(old)
    return aside


def _open_to_readers(written: Path) -> None:
    """Gives files that a library wrote for its user alone, as safetensors does, the mode that Python gives."""
    usual = next((path for path in (written / MARK, written / MANIFEST) if path.is_file()), None)
    if usual is not None:
        mode = usual.stat().st_mode & 0o666
        for path in written.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(path.stat().st_mode & 0o777 | mode)


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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.qwentune-new")
