"""Every error a user can meet: what is wrong, where, how to mend it; and the exit code it ends with."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self

LONGEST_WORDS = 5000  # characters, more than a path has: a value that is quoted may be a whole file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    `where` is a place a person can open (`file:line:column`, `file:line` or a key), `what` states the fault with the
    offending value, `fix` says how to mend it. What is longer than `LONGEST_WORDS` is cut.
    """

    where: str
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "fix"):
            words: str = getattr(self, name)
            if len(words) > LONGEST_WORDS:
                cut = f"{words[: LONGEST_WORDS - 200]} … (of {len(words):,} characters) … {words[-100:]}"
                object.__setattr__(self, name, cut)

    def __str__(self) -> str:
        head = f"{self.where}  {self.what}" if self.where else self.what
        return f"{head}\n    {self.fix}" if self.fix else head


class UserError(Exception):
    """A mistake that the user can mend; printed without a traceback, all problems at once."""

    exit_code: ClassVar[int] = 2
    closing: ClassVar[str] = "Nothing was started."

    def __init__(self, problems: Problem | Sequence[Problem], closing: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        lines = grouped(self.problems)
        count = counted(len(self.problems), "problem{|s}")
        lines.append(f"{count}. {self.closing if closing is None else closing}")
        super().__init__("\n".join(lines))
        self._made_of = (self.problems, closing)

    def at(self, placed: Callable[[Problem], Problem]) -> Self:
        """The same error with each problem where `placed` puts it."""
        problems, closing = self._made_of
        return type(self)([placed(problem) for problem in problems], closing)

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...]]:
        return type(self), self._made_of  # ranks tell each other of it


class UsageError(UserError):
    """A command line or an environment that cannot work."""


class RecipeError(UserError):
    """A recipe that cannot be read or contradicts itself."""

    closing = "Nothing was loaded."


class DataError(UserError):
    """Rows that cannot be trained as they are."""

    exit_code = 3
    closing = "Nothing was written."


class DoesNotFitError(UserError):
    """A run that needs more memory or disk than there is."""

    exit_code = 4
    closing = "No weight was read."


class ResumeError(UserError):
    """No usable checkpoint, or one that does not belong to this run."""

    exit_code = 5
    closing = "Nothing was changed."


class NotFiniteError(UserError):
    """A loss, gradient or weight that is NaN or infinite."""

    exit_code = 6
    closing = "The last good checkpoint is kept."


class LostRankError(UserError):
    """Another process of the run has died; what is left cannot go on alone."""

    exit_code = 1
    closing = "The same command continues the run."


class RunInUseError(UserError):
    """A run folder that another process holds."""

    exit_code = 7
    closing = "Nothing was changed."


NUM_PLACES = 10  # shown of each kind of problem
NUM_KINDS = 30  # shown of all
LONGEST_COMPARED, MOST_COMPARED = 100, 10_000  # characters of a name, and known names
_FORMS = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")  # of a word for one and for many
_PARTICULAR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+(?:\.\d+)?")  # a value in a message


def grouped(problems: Iterable[Problem]) -> list[str]:
    """The problems in words, those of a kind in one file together, with one fix; of many the first."""
    kinds: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        kind = problem.where.split(":")[0], _PARTICULAR.sub("*", problem.what), problem.fix
        kinds.setdefault(kind, []).append(problem)
    rest = [problem for kind in list(kinds.values())[NUM_KINDS:] for problem in kind]
    lines = [_kind_in_words(kind) for kind in list(kinds.values())[:NUM_KINDS]]
    return [*lines, f"… and {len(rest)} more, the last at {rest[-1].where}"] if rest else lines


def _kind_in_words(kind: Sequence[Problem]) -> str:
    *heads, last = kind[:NUM_PLACES]
    lines = [str(replace(problem, fix="")) for problem in heads]
    if len(kind) > NUM_PLACES:
        more = f"    … and {len(kind) - NUM_PLACES} more of this kind, the last at {kind[-1].where}"
        lines += [str(replace(last, fix="")), more, *([f"    {last.fix}"] if last.fix else [])]
    else:
        lines.append(str(last))
    return "\n".join(lines)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE),
}
_PLACES = {"QWENTUNE_CACHE": "~/.cache/qwentune", "HF_HOME": "~/.cache/huggingface", "TMPDIR": "/tmp", "HOME": "~"}
_ENDED = "The command has ended."


def machine_error(error: Exception) -> UserError | None:
    """What an error of the system means that no command of ours has foreseen; None for a bug."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this layer does not load
        what = "has no room for it: " + str(error).partition(". GPU")[0]
        return DoesNotFitError(Problem("the GPU", what, "Close what else runs on it, or take a larger one."), _ENDED)
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno == errno.ENOENT and "temporary directory" in str(error):
        problem = Problem("TMPDIR", "there is no folder for temporary files", "Name one that you may write, with room.")
        return (DoesNotFitError if _is_full(os.environ.get("TMPDIR", "/tmp")) else UsageError)(problem, _ENDED)
    if error.errno not in FULL | _REFUSED:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    places = {name: Path(os.path.expanduser(os.environ.get(name) or usual)) for name, usual in _PLACES.items()}
    names = [
        n for n, place in places.items() if where and (place.is_relative_to(where) or place in Path(where).parents)
    ]
    other = f", or name another folder with the variable {names[0]}" if names else ""
    problem = partial(Problem, where, error.strerror or str(error))
    if error.errno in FULL:
        return DoesNotFitError(problem(f"Free some space{other}."), _ENDED)
    return UsageError(problem(f"Mend the folder, its owner or the disk{other}."), _ENDED)


def _is_full(folder: str) -> bool:
    return os.path.isdir(folder) and os.statvfs(folder).f_bavail == 0


EXIT_OK = 0
EXIT_BUG = 1
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence ` Did you mean 'x'?` for the closest known name, in any case, or an empty string."""
    if len(name) > LONGEST_COMPARED:
        return ""
    names = list(islice(known, MOST_COMPARED))
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not matches:
        by_lower_case = {one.lower(): one for one in names}
        matches = [
            by_lower_case[one] for one in difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
        ]
    return f" Did you mean '{matches[0]}'?" if matches else ""


def counted(count: int, words: str) -> str:
    """The count and the words for it, of which `{one|many}` is what differs: `row{|s} follow{s|}`."""
    return f"{count:,} " + _FORMS.sub(lambda match: match[1 if count == 1 else 2], words)
