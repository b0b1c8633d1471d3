"""What the ranks of one machine need do only once: the first to come does it, the others read what it found."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import psutil
from filelock import FileLock

from qwentune.data.cache import cache_folder
from qwentune.durable import remove, write_text

# What tells apart the starts of one launcher. The ranks of a machine are its children; where a script stands between,
# each finds for itself, as it also does where the first one fails.
OLDEST_SECONDS = 60.0  # before a rank began: who launches without torchrun may start again under the same names
OF_A_START = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def once(what: str, find: Callable[[], Any]) -> Any:
    """The JSON value that `find` gives on the first rank of this machine to come here; the others wait for it.

    Ranks have not joined yet, so this goes through a file of the user's own cache. Who dies with the lock leaves it.
    `what` tells apart what is found, and must hold all that it depends on.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return find()
    try:
        launcher = psutil.Process(os.getppid())
        start = [what, launcher.create_time(), *(os.environ.get(name) for name in OF_A_START)]
        folder = cache_folder() / "once" / socket.gethostname()  # machines may share a home
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, psutil.Error):  # a cache that is not to be written, a launcher in another container
        return find()
    if not os.access(folder, os.W_OK):
        return find()
    file = folder / f"{launcher.pid}-{sha256(json.dumps(start).encode()).hexdigest()[:16]}.json"
    with FileLock(f"{file}.lock"):
        oldest = psutil.Process().create_time() - OLDEST_SECONDS
        if not file.exists() or file.stat().st_mtime < oldest:
            for old in folder.glob("[0-9]*-*.json*"):
                launched_by = old.name.partition("-")[0]
                if launched_by.isdigit() and not psutil.pid_exists(int(launched_by)):  # its launcher has ended
                    remove(old)
            write_text(file, json.dumps(find()))
        return json.loads(file.read_text(encoding="utf-8"))
