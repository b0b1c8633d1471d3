"""What a disk's refusal means for a run: words and an exit code instead of a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwentune.errors import FULL, DoesNotFitError, Problem, UsageError, UserError

# The libraries that write weights raise errors of their own, with the system's words in them.
# torch names its archive's writer, or only the file in which it noticed that less was written than it asked for.
SIGNS_OF_A_FULL_DISK = (
    *("No space left", "File too large", "Disk quota exceeded"),
    *("PytorchStreamWriter", "enforce fail at inline_container"),
)
SIGNS_OF_A_BROKEN_DISK = ("Input/output error", "Read-only file system", "Permission denied", "No such file or")
AGAIN = "the same command continues from the last checkpoint."


def is_about(error: Exception, run: Path) -> bool:
    """Whether an error is about a file of the run, or a full disk's that names none."""
    if not isinstance(error, OSError):
        return False
    names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    return any(name.is_relative_to(run) for name in names) or (error.errno in FULL and not names)


def disk_error(error: Exception, run: Path, what: str) -> UserError | None:
    """What to tell the user of an error that a disk caused while `what` was done; None for any other error."""
    text = str(error)
    if getattr(error, "errno", None) in FULL or any(sign in text for sign in SIGNS_OF_A_FULL_DISK):
        problem = Problem(str(run), f"{what}, {_free(run)} are free: {text}", f"Free some space; {AGAIN}")
        return DoesNotFitError(problem, "The run has ended.")
    if isinstance(error, OSError) or any(sign in text for sign in SIGNS_OF_A_BROKEN_DISK):
        problem = Problem(str(run), f"{what}: {text}", f"Mend the disk or the folder; {AGAIN}")
        return UsageError(problem, "The run has ended.")
    return None


def _free(run: Path) -> str:
    try:
        return f"{shutil.disk_usage(run).free / 2**30:.2f} GiB"
    except OSError:
        return "0 GiB"
