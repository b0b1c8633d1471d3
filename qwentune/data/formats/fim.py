"""The `fim` format: code to be cut, or cut already.

`{"prefix", "suffix", "middle"}`, `{"text", "path"?, "repo"?}` or `{"repo", "files": [{"path", "text"}]}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.data.reading.faults import Faults, described
from qwentune.data.sample import Code, File, Json, Source
from qwentune.errors import Problem

KEYS = ("prefix", "suffix", "middle", "text", "path", "repo", "files")
CUT = ("prefix", "middle", "suffix")
KINDS = {"cut": frozenset(CUT), "text": frozenset({"text"}), "files": frozenset({"files"})}


def parse(row: dict[str, Json], source: Source) -> Code | list[Problem]:
    """The code of a row, or what is wrong with it."""
    faults = Faults(source)
    faults.misspelt(row, KEYS, (), "the row has ")
    kinds = [name for name, keys in KINDS.items() if keys & row.keys()]
    if len(kinds) != 1:
        what = f"the row has the keys {', '.join(map(repr, row))}"
        faults.add(what, "It needs prefix, middle and suffix; or text; or repo and files: one of the three.")
        return faults.problems
    repo = faults.text(row, "repo", "repo") or ""
    if kinds == ["cut"]:
        prefix, middle, suffix = (faults.text(row, key, key, required=True) or "" for key in CUT)
        if not prefix + middle + suffix and not faults.problems:
            faults.add("prefix, middle and suffix are empty", "Give the code, or leave the row out.")
        return faults.problems or Code(source, (), cut=(prefix, middle, suffix))
    if kinds == ["text"]:
        files: list[File] = [_file(faults, row, "", path_needed=bool(repo))]
    else:
        if not repo and not faults.problems:
            faults.add("repo is missing", "Give the name of the repository that the files are of.")
        files = []
        listed = faults.listed(row, "files", "files", required=True)
        for i, file in enumerate(listed):
            if isinstance(file, dict):
                files.append(_file(faults, file, f"files[{i}].", path_needed=True))
            else:
                faults.add(f"files[{i}] is {described(file)}", 'A file is an object: {"path": …, "text": …}.')
        if not listed and not faults.problems:
            faults.add("files is empty", "Give at least one file, or leave the row out.")
    return faults.problems or Code(source, tuple(files), repo)


def _file(faults: Faults, row: Mapping[str, Json], place: str, *, path_needed: bool) -> File:
    text = faults.text(row, "text", f"{place}text", required=True)
    path = faults.text(row, "path", f"{place}path", required=path_needed)
    if text is not None and not text.strip():
        faults.add(f"{place}text is empty", "Give the code, or leave the file out.")
    return File(path or "", text or "")
