"""That all ranks train the same thing, and that their machines share the run folder: asked before the first step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qwentune.durable import read_mark
from qwentune.errors import Problem, ResumeError, UsageError
from qwentune.facts.machines import host
from qwentune.training.ranks import Ranks
from qwentune.training.run_folder import RunFolder

LONGEST_DELAY = 60.0  # seconds until a file of another machine is seen: three times what NFS remembers of a folder


def refuse_other_facts(ranks: Ranks, facts: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Raises ResumeError, on every rank, naming each rank whose facts or libraries are others than those of rank 0."""
    own = {**facts, **{f"version of {name}": version for name, version in versions.items()}}
    found = ranks.gather((host(), own))
    leading_host, leading = found[0]
    problems = [
        Problem(
            f"rank {rank} on {name}", f"{key} is {_short(other.get(key))}, but {_short(leading.get(key))} on rank 0"
        )
        for rank, (name, other) in enumerate(found)
        for key in sorted({*leading, *other})
        if other.get(key) != leading.get(key)
    ]
    if problems:
        fix = f"Give every machine the files and the environment of {leading_host}; then start again."
        raise ResumeError(problems, fix)


def refuse_folder_that_is_not_shared(ranks: Ranks, folder: RunFolder) -> None:
    """Raises UsageError, on every rank, where another machine sees another run folder than rank 0 has opened."""
    if ranks.num_machines == 1:
        return
    mark = ranks.agree(lambda: read_mark(folder.path))
    deadline = time.monotonic() + LONGEST_DELAY
    while not (sees := read_mark(folder.path) == mark) and time.monotonic() < deadline:
        time.sleep(1.0)
    without = list(dict.fromkeys(name for name, is_there in ranks.gather((host(), sees)) if not is_there))
    if without:
        what = f"{folder.path} is another folder on {', '.join(without)} than where rank 0 writes"
        raise UsageError(Problem("output.dir", what, "Name a folder of a disk that all machines share."))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "…"
