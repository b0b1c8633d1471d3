"""The `fim` format: code to be cut, or cut already.

`{"prefix", "suffix", "middle"}`, `{"text", "path"?, "repo"?}` or `{"repo", "files": [{"path", "text"}]}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.data.reading.faults import described
from qwentune.data.reading.loss import refuse_other_weight
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Code, File, Json, Source
from qwentune.errors import Problem
from qwentune.row_formats import ROW_FORMATS

CUT = ("prefix", "middle", "suffix")
FILE_KEYS = {"path", "text"}
KINDS = {"cut": frozenset(CUT), "text": frozenset({"text"}), "files": frozenset({"files"})}


def parse(row: dict[str, Json], source: Source) -> Code | list[Problem]:
    """The code of a row, or what is wrong with it."""
    reader = RowReader(source)
    refuse_other_weight(row, reader)
    reader.leave_unread(reader.other_keys(row, ROW_FORMATS["fim"].keys, "row"))
    kinds = [name for name, keys in KINDS.items() if keys & row.keys()]
    if len(kinds) != 1:
        what = f"the row has the keys {', '.join(map(repr, row))}"
        reader.refuse(what, "It needs prefix, middle and suffix; or text; or repo and files: one of the three.")
        return reader.problems
    repo = reader.read_text(row, "repo") or ""
    if kinds == ["cut"]:
        prefix, middle, suffix = (reader.read_text(row, key, required=True) or "" for key in CUT)
        if not prefix + middle + suffix and not reader.problems:
            reader.refuse("prefix, middle and suffix are empty", "Give the code, or leave the row out.")
        reader.leave_unread(key for key in ("repo", "path") if row.get(key) is not None)
        return reader.problems or Code(source, (), cut=(prefix, middle, suffix), unread=tuple(reader.unread))
    if kinds == ["text"]:
        files: list[File] = [_file(reader, row, "", path_needed=bool(repo))]
    else:
        if not repo and not reader.problems:
            reader.refuse("repo is missing", "Give the name of the repository that the files are of.")
        files = []
        listed = reader.read_list(row, "files", required=True)
        for i, file in enumerate(listed):
            if isinstance(file, dict):
                files.append(_file(reader, file, f"files[{i}].", path_needed=True))
            else:
                reader.refuse(f"files[{i}] is {described(file)}", 'A file is an object: {"path": …, "text": …}.')
        if not listed and not reader.problems:
            reader.refuse("files is empty", "Give at least one file, or leave the row out.")
    return reader.problems or Code(source, tuple(files), repo, unread=tuple(reader.unread))


def _file(reader: RowReader, row: Mapping[str, Json], place: str, *, path_needed: bool) -> File:
    if place:
        reader.leave_unread(row.keys() - FILE_KEYS, place[:-1])
    text = reader.read_text(row, "text", f"{place}text", required=True)
    path = reader.read_text(row, "path", f"{place}path", required=path_needed)
    if text is not None and not text.strip():
        reader.refuse(f"{place}text is empty", "Give the code, or leave the file out.")
    return File(path or "", text or "")
