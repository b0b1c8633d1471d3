"""What a server is given of a run: the run's own folder where it takes that, else one in the cache, made once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qwentune import __version__
from qwentune.console import busy, say
from qwentune.data.cache import alone, writable_cache
from qwentune.durable import mark, read_json, remove, replace_folder, write_text
from qwentune.errors import ResumeError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.folder import write_folder
from qwentune.exporting.whole import is_part
from qwentune.facts.weight_files import ADAPTER_WEIGHTS, read_adapter, read_weights
from qwentune.model.fingerprint import weights_fingerprint
from qwentune.model.loading import weights_folder

MADE_OF = "made_of.json"  # in such a folder: what it was made of


def served_folder(run: FinishedRun, *, merge: bool) -> Path:
    """A folder of the run as `export` writes it; one is kept per run, and made anew when the run was trained on.

    Raises DoesNotFitError where the cache's disk has no room for it.
    """
    base = weights_folder(run.model, run.revision)
    merges = merge and run.has_adapter
    if not run.has_adapter and not is_part(run.trained, base):
        return run.trained
    made_of = {"version": __version__, "merged": merges, "of": _fingerprint(run.trained, base)}
    place = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:12]
    target = writable_cache("served") / f"{place}-{'merged' if merges else 'export'}"
    with alone(target):
        if read_json(target / MADE_OF) == made_of and _is_whole(target):
            say(f"served from {target}")
            return target
        remove(target)
        staging = target.with_name(f".{target.name}.writing")
        remove(staging)
        mark(staging)
        say(f"{'merging the adapter into its base' if merges else 'writing what is served'}, once, in {target}")
        with busy("writing the package"):
            write_folder(run, staging, merges=merge, elsewhere="the variable QWENTUNE_CACHE")
            write_text(staging / MADE_OF, json.dumps(made_of) + "\n")
            replace_folder(staging, target)
    return target


def _is_whole(folder: Path) -> bool:
    try:
        return bool(read_adapter(folder) if (folder / ADAPTER_WEIGHTS).exists() else read_weights(folder))
    except ResumeError:
        return False


def _fingerprint(trained: Path, base: Path) -> str:
    digest = hashlib.sha256(f"{weights_fingerprint(trained)}:{weights_fingerprint(base)}".encode())
    for path in sorted(trained.iterdir()):
        if path.is_file() and path.suffix != ".safetensors":
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()
