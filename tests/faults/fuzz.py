"""What the fuzzers of data share: their seed, and rows to begin with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from tests.dialogues import random_rows


def new_seed() -> int:
    """The seed of `FUZZ_SEED`, else a new one; it is printed, so that a failure shows it."""
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32))
    print(f"FUZZ_SEED={seed}")
    return seed


def write_rows(path: Path, count: int = 12) -> None:
    """Dialogues with tools and reasoning, as JSON lines."""
    rows = random_rows(5, count, reasoning=True, hostile=False)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
