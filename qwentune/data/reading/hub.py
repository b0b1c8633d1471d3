"""Hub datasets: a split is fetched once and kept as JSON lines, so that its rows have a file and lines."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qwentune.bounded import name_fault
from qwentune.console import say
from qwentune.data.cache import alone, cache_folder, writable_cache
from qwentune.data.reading.tables import json_row
from qwentune.durable import replace_file
from qwentune.errors import DataError, Problem

_NAME = r"[A-Za-z0-9][\w.-]*"
_DATASET = re.compile(  # id, revision, configuration, split
    rf"({_NAME}/{_NAME})(?:@({_NAME}(?:/{_NAME})*))?(?::({_NAME})(?=:))?(?::({_NAME}))?"
)

_DECODED = ("Image(", "Audio(", "Video(")  # features of which `datasets` gives objects in place of bytes


def is_hub_dataset(path: str) -> bool:
    """Whether a path is `owner/name`, with `@revision`, `:split` or `:configuration:split` behind, and no file here."""
    match = _DATASET.fullmatch(path)
    if match is None or name_fault(path) or Path(path).exists() or Path(path).parent.is_dir():
        return False
    # some-data-2.5 is a name, some-data.jsonl a file that is missing
    return not any(Path(name).suffix[1:2].isalpha() for name in (match[1], match[2] or ""))


def kept_file(path: str) -> Path:
    """Where the rows of a hub dataset are kept once they were fetched; there may be no such file yet."""
    owner, name = path.split("/", 1)
    return cache_folder() / "hub" / owner / f"{name.replace('/', '%2F').replace(':', '/')}.jsonl"


def fetched(path: str) -> Path:
    """The JSON lines of a hub dataset's split, `train` where none is named; from the hub only the first time.

    Null fields are left out at every depth, as of a Parquet file. Raises DataError where the hub does not give it.
    """
    file = kept_file(path)
    if not file.exists():
        writable_cache(*file.parent.relative_to(cache_folder()).parts)
        with alone(file):
            if not file.exists():  # another process may have fetched it meanwhile
                _keep(path, file)
                say(f"{path} is kept in {file}; its rows are named by the lines there, delete it to fetch it anew")
    return file


def _rows(path: str, folder: Path) -> Iterable[Any]:
    """The rows as the hub gives them; `folder` may hold what is only needed to read them."""
    match = _DATASET.fullmatch(path)
    assert match is not None
    name, revision, configuration, split = match.groups()
    datasets: Any = import_module("datasets")  # slow to import, and few runs need it
    # Where the hub cannot be reached, datasets takes whatever revision its cache holds.
    cache = str(folder / "datasets") if revision else None
    try:
        rows = datasets.load_dataset(name, configuration, split=split or "train", revision=revision, cache_dir=cache)
        return _as_kept(rows) if any(kind in str(getattr(rows, "features", "")) for kind in _DECODED) else rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        offline, pinned = datasets.config.HF_HUB_OFFLINE, f" --revision {revision}" if revision else ""
        what = f"there is no such file, and as a hub dataset it cannot be fetched: {reason}"
        fix = (
            f"{'Unset HF_HUB_OFFLINE' if offline else 'Check the name and the connection'}, or download it where there "
            f"is one (hf download --repo-type dataset {name}{pinned} --local-dir data) and name its file."
        )
        raise DataError(Problem(path, what, fix)) from None


def _as_kept(rows: Any) -> Iterator[Any]:
    """The rows with the bytes of their files, which `datasets` would decode."""
    for table in rows.with_format("arrow").iter(1):
        yield from table.to_pylist()


def _keep(path: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as folder:
        staging = Path(folder) / file.name
        with staging.open("w", encoding="utf-8") as stream:
            for number, row in enumerate(_rows(path, Path(folder)), start=1):
                try:
                    stream.write(json.dumps(json_row(row), ensure_ascii=False) + "\n")
                except ValueError as error:
                    what = f"the row cannot be kept: {error}"
                    fix = "Write the columns that are trained into a file of your own, and name that."
                    raise DataError(Problem(f"{path}:{number}", what, fix)) from None
        replace_file(staging, file)
