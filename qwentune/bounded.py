"""Small files read whole and names that a file system takes: what is beyond its bound is refused in words."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qwentune.errors import Problem, UsageError

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of Linux: PATH_MAX without its null character, and NAME_MAX

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MADE_UP = ("/proc", "/sys")  # by the kernel, file by file, without a size, and some of them without an end


class UnreadableError(Exception):
    """A file that is not read; `str` of it says why, in words that follow its name."""


def name_fault(name: str) -> str:
    """Why no file can have this path, in words; empty where one can."""
    if "\0" in name:
        return "a path holds no null character"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "a path is UTF-8 text, and this one holds a lone surrogate or a byte that is none"
    longest = max(map(len, encoded.split(b"/")))
    if longest > LONGEST_NAME:
        return f"a name too long: a part of a path has at most {LONGEST_NAME} bytes, this one has {longest:,}"
    if len(encoded) > LONGEST_PATH:
        return f"a name too long: a path has at most {LONGEST_PATH:,} bytes, this one has {len(encoded):,}"
    return ""


def refuse_name(where: str, path: str | Path) -> None:
    """Raises UsageError where no file can have this path; `where` names the argument that gives it."""
    if fault := name_fault(str(path)):
        raise UsageError(Problem(where, fault, "Name another one."))


def refuse_half_characters(where: str, text: str) -> None:
    """Raises UsageError where a text of the command line was no UTF-8; `where` names its argument."""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise UsageError(Problem(where, "is no UTF-8: it holds half a character", "Give it in UTF-8."))


def kind_fault(file: Path) -> str:
    """Why an existing file is none to read from its first byte to its last, in words; empty where it is one.

    Raises OSError where nothing can be said of it.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        return f"this is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, no regular file"
    if os.path.realpath(file).startswith(tuple(f"{folder}/" for folder in _MADE_UP)):
        return "this is made up by the kernel while it is read, no regular file"
    return ""


def read_bytes(file: Path, most_bytes: int) -> bytes:
    """The content of a regular file. Raises UnreadableError where it is none, or larger; never reads more."""
    try:
        if fault := name_fault(str(file)) or kind_fault(file):
            raise UnreadableError(fault)
        with open(file, "rb", opener=_without_waiting) as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise UnreadableError(f"this file cannot be read: {error.strerror}") from None
    if len(content) > most_bytes:
        size = max(file.stat().st_size, len(content))
        raise UnreadableError(f"{size:,} bytes are too many; such a file has at most {most_bytes:,}")
    return content


def read_text(file: Path, most_bytes: int) -> str:
    """The text of a regular file in UTF-8. Raises UnreadableError where it is none, or larger."""
    content = read_bytes(file, most_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise UnreadableError(f"line {line}, byte {column}: 0x{content[error.start]:02x} is not UTF-8") from None


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)
