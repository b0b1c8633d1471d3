"""accelerate's launcher, which ends without a traceback of its own: what failed, the trainers have said.

`python -m qwentune.training.launcher` takes what `accelerate launch` takes.
"""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Launches; exits with 1 where a trainer has failed."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each failure as well
    try:
        launch()
    except ChildFailedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
