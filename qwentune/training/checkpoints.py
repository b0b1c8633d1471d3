"""Checkpoints that are whole or not there: staged, synced, described by a manifest, renamed by one rank."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwentune.durable import MANIFEST, is_ours, mark, move_aside, put, read_json, remove, sync, sync_folders, write_text
from qwentune.errors import Problem, ResumeError

MANIFEST_SCHEMA = 2  # since 16-bit weights have exact values behind them
STAGING, TRASH = ".saving-", ".trash-"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest verified; `facts` is what its run wrote beside the files' hashes."""

    folder: Path
    step: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder: `checkpoints/step-<n>`, and `latest`, which names the newest."""

    run: Path
    keep: int

    @property
    def folder(self) -> Path:
        """Where published checkpoints stand."""
        return self.run / "checkpoints"

    def staging(self, step: int) -> Path:
        """The folder that all ranks write step `step` into; no reader ever looks there."""
        return self.folder / f"{STAGING}{step}"

    def begin(self, step: int) -> None:
        """Makes the staging folder of `step`; called by one rank, before any writes."""
        mark(self.staging(step))

    def published(self, step: int) -> Path:
        """Where step `step` stands once it is whole."""
        return self.folder / f"step-{step}"

    def publish(self, written: Path, step: int, facts: dict[str, Any], spared: frozenset[int] = frozenset()) -> Path:
        """Makes the files in `written` the checkpoint of `step`; called by one rank, after all have written.

        Only after the new checkpoint is in place are old ones removed, all but the newest `keep` and those `spared`.
        """
        mark(written)
        files = sorted(path for path in written.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        manifest: dict[str, Any] = {
            "schema": MANIFEST_SCHEMA,
            "step": step,
            "facts": facts,
            "files": {
                str(path.relative_to(written)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in files
            },
        }
        manifest["sha256"] = _sha256_of(manifest)
        write_text(written / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        sync_folders(written)
        target = self.published(step)
        if os.path.lexists(target):  # the same step of an abandoned attempt, which this one replaces
            self._remove(target)
        put(written, target)
        sync(self.run)  # which the folder of checkpoints may be new in, and the records
        remove(self.staging(step))
        self.point_latest_at(target)
        self._rotate(spared | {step})
        return target

    def newest(self) -> tuple[Checkpoint | None, list[Problem]]:
        """The newest checkpoint that verifies, and why each newer one was passed over."""
        skipped: list[Problem] = []
        for step, folder in self._numbered():
            checkpoint = verify(folder)
            if isinstance(checkpoint, Problem):
                skipped.append(checkpoint)
            elif checkpoint.step != step:
                skipped.append(Problem(str(folder), f"its manifest says step {checkpoint.step}"))
            else:
                return checkpoint, skipped
        return None, skipped

    def set_aside(self, step: int) -> list[Path]:
        """Renames the checkpoints of later steps, so that none of them is taken for this run's newest; where to."""
        moved: list[Path] = []
        for later, folder in self._numbered():
            if later > step:
                moved.append(move_aside(folder))
        return moved

    def sweep(self) -> list[Path]:
        """Removes what interrupted saves and removals left, mends `latest`; where what was not ours is moved to."""
        if not self.folder.exists():
            return []
        named = [path for path in self.folder.iterdir() if path.name.startswith((STAGING, TRASH))]
        left = [path for path in named if path.is_dir() or path.is_symlink()]  # a plain file was never ours
        aside = [moved for path in left if (moved := remove(path)) is not None]
        numbered = self._numbered()
        if numbered:
            self.point_latest_at(numbered[0][1])
        return aside

    def point_latest_at(self, folder: Path) -> None:
        """Makes `latest` name a checkpoint of this run."""
        write_text(self.run / "latest", f"checkpoints/{folder.name}\n")

    def _numbered(self) -> list[tuple[int, Path]]:
        if not self.folder.exists():
            return []
        found = [
            (int(path.name.removeprefix("step-")), path)
            for path in self.folder.iterdir()
            if path.is_dir() and path.name.startswith("step-") and path.name.removeprefix("step-").isdigit()
        ]
        return sorted(found, reverse=True)

    def _rotate(self, spared: frozenset[int]) -> None:
        for step, folder in self._numbered()[self.keep :]:
            if step not in spared and (folder.is_symlink() or is_ours(folder)):
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        # Renamed first: a half-deleted folder must never look like a checkpoint.
        trash = folder.with_name(f"{TRASH}{folder.name}")
        remove(trash)
        remove(move_aside(folder, trash.name))


def verify(folder: Path) -> Checkpoint | Problem:
    """The checkpoint in `folder` if every file has the size and hash that its manifest states, else what is wrong."""
    if not (folder / MANIFEST).exists():
        return Problem(str(folder), "has no manifest: it was never finished")
    manifest = read_json(folder / MANIFEST)
    try:
        schema = manifest["schema"]
        if schema != MANIFEST_SCHEMA:
            what = f"was written in layout {schema}, this version reads layout {MANIFEST_SCHEMA}"
            return Problem(str(folder), what, "--fresh moves the run aside and starts anew.")
        if manifest.pop("sha256") != _sha256_of(manifest):
            return Problem(str(folder / MANIFEST), "has been altered: its SHA-256 is not the one in it")
        step, facts = manifest["step"], manifest["facts"]
        files = [(name, expected["bytes"], expected["sha256"]) for name, expected in manifest["files"].items()]
    except (AttributeError, KeyError, TypeError):
        return Problem(str(folder), "its manifest cannot be read")
    for name, num_bytes, sha256 in files:
        path = folder / name
        if not path.is_file():
            return Problem(str(path), "is missing")
        size = path.stat().st_size
        if size != num_bytes:
            return Problem(str(path), f"has {size} bytes instead of {num_bytes}")
        if _sha256(path) != sha256:
            return Problem(str(path), "has been altered: its SHA-256 is not the manifest's")
    return Checkpoint(folder, step, facts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a user named; ResumeError where it does not verify."""
    found = verify(folder)
    if isinstance(found, Problem):
        raise ResumeError(found)
    return found


def _sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
