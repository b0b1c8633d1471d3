"""Standard streams that cannot fail a command: closed, full, unread, or without the characters that it writes."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Stream(io.FileIO):
    """A descriptor that takes whatever is written; the first error is kept in `error`, not raised.

    Where `of_data`, nothing is written after a gap; messages go on.
    """

    def __init__(self, descriptor: int, *, of_data: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.of_data = of_data
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes what can be written; all counts as written."""
        left = memoryview(data).cast("B")
        while left and not (self.of_data and self.error):
            try:
                written: int | None = super().write(left)
            except OSError as error:
                self.error = self.error or error
                break
            if written is None:  # another program has made it one that does not wait
                select.select([], [self], [])
            left = left[written or 0 :]
        return len(data)


def run_program(program: Callable[[], object]) -> tuple[Any, OSError | None]:
    """The code with which a program exits, and why its data did not all reach stdout."""
    for descriptor in range(3):  # the next file that is opened would take the number of a closed one, and its output
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # it has been read from already
            sys.stdin.reconfigure(errors="replace")
    data = Stream(1, of_data=True)
    sys.stdout, sys.stderr = _text(sys.stdout, data), _text(sys.stderr, Stream(2, of_data=False))
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code, data.error


def _text(old: Any, stream: Stream) -> Any:
    """The stream for texts in the old one's encoding; characters that it lacks are written as escapes.

    Something else that was put in the place of the old one stays.
    """
    settings: dict[str, Any] = {"encoding": "utf-8"}
    if old is not None:
        with suppress(OSError, AttributeError):
            if old.fileno() == stream.fileno():
                old.flush()
                settings = {name: getattr(old, name) for name in ("encoding", "line_buffering", "write_through")}
                old = None
    if old is not None:
        return old
    buffer: Any = stream if settings.get("write_through") else io.BufferedWriter(stream)
    return io.TextIOWrapper(buffer, errors="backslashreplace", **settings)
