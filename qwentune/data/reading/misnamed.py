"""Whether a file is what its name says, by its first bytes: read as something else, it would only give riddles."""

from __future__ import annotations

from pathlib import Path

from qwentune.errors import Problem

# What files of a kind begin with, and the ending that says so; none where no such file is read.
BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"PK\x03\x04", "a ZIP archive, such as an Excel workbook", ""),
    (b"ARROW1", "an Arrow file", ""),
)
ALWAYS_SO = {".gz": "gzip data", ".parquet": "Parquet file"}  # such files begin in no other way
COMPRESSIONS = (".gz", ".zst")


def misnamed(path: str, file: Path) -> Problem | None:
    """What a file holds that does not fit its name; None where it fits, is empty, or cannot be opened."""
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
    except OSError:
        return None
    bare = file.with_suffix("").name if file.suffix in COMPRESSIONS else file.name
    for beginning, what, ending in BEGINNINGS:
        if not first.startswith(beginning):
            continue
        if ending == file.suffix:
            return None
        name = f"{Path(bare).stem}{ending}" if ending == ".parquet" else f"{bare}{ending}"
        fix = f"Rename it to {name!r}." if ending else "Save it as CSV in UTF-8, as JSON Lines or as Parquet."
        return Problem(path, f"it holds {what}, but its name ends in {file.suffix!r}", fix)
    if first and file.suffix in ALWAYS_SO:
        fix = f"Rename it to {bare!r}." if file.suffix == ".gz" else "Write the file again, or name it as what it is."
        return Problem(path, f"it holds no {ALWAYS_SO[file.suffix]}, but its name ends in {file.suffix!r}", fix)
    return None
