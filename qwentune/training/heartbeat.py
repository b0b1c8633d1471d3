"""What the machines of a run tell each other while it goes on: that they live, and how they ended.

The supervisor of each writes into a store that the first one's keeps, beside the port where the ranks meet.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from qwentune.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from qwentune.facts.machines import Machines, host

BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0  # without a beat
LATEST_START = timedelta(hours=1)  # of the other machines: as long as ranks wait to be joined
GRACE_SECONDS = 20.0  # for our ranks to end by themselves where others have failed
FAREWELL_SECONDS = 10.0  # until the others have read how this machine ended
AS_ASKED = (EXIT_OK, EXIT_PREEMPTED, EXIT_INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Lost:
    """Why the run cannot go on here: what happened elsewhere, and the exit code that it had there, if any."""

    reason: str
    code: int | None = None


class Heartbeat:
    """The word of this machine to the others, and theirs; used from one thread, while another one talks."""

    def __init__(self, together: Machines) -> None:
        self.together = together
        self._end: dict[str, Any] = {}
        self._heard: dict[int, tuple[float, dict[str, Any]]] = {}  # of each other machine: when it was new, and what
        self._has_said_farewell = threading.Event()
        threading.Thread(target=self._talk, daemon=True).start()

    def lost(self) -> Lost | None:
        """A machine that was not heard of for too long, or that has failed a while ago; None where all is well."""
        now = time.monotonic()
        for index, (when, word) in sorted(self._heard.items()):
            where = f"machine {index} ({word['host']})"
            if "code" in word:
                if word["code"] not in AS_ASKED and now - when > GRACE_SECONDS:
                    return Lost(f"{where} ended with exit code {word['code']}: {word['reason']}", word["code"])
            elif now - when > LOST_SECONDS:
                return Lost(f"Nothing was heard of {where} for {LOST_SECONDS:.0f} s")
        return None

    def cause(self) -> Lost | None:
        """Why another machine failed, where one says so soon: it is nearer to the cause than ranks that lost it."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < deadline:
            for index, (_, word) in sorted(self._heard.items()):
                if word.get("code", EXIT_OK) not in AS_ASKED and word["reason"]:
                    return Lost(f"machine {index} ({word['host']}): {word['reason']}", word["code"])
            time.sleep(BEAT_SECONDS / 2)
        return None

    def end(self, code: int, reason: str) -> None:
        """Tells the others how this machine ended; returns once the first one's store is not needed any more."""
        self._end = {"code": code, "reason": reason}
        self._has_said_farewell.wait(FAREWELL_SECONDS)

    def _talk(self) -> None:
        """Beats until all machines have ended."""
        import torch.distributed

        stores: Any = torch.distributed  # whose types leave out the store
        together = self.together
        with suppress(RuntimeError):  # the first machine is not there, or is not any more: nothing more is heard
            store = stores.TCPStore(
                together.address,
                together.port + 1,
                is_master=together.leads,
                wait_for_workers=False,
                timeout=LATEST_START,
            )
            others = [index for index in range(together.count) if index != together.index]
            for beat in count():
                own = {"host": host(), "beat": beat, **self._end}
                store.set(f"machine/{together.index}", json.dumps(own))
                for index in others:
                    if store.check([f"machine/{index}"]):
                        word = json.loads(store.get(f"machine/{index}"))
                        if index not in self._heard or self._heard[index][1] != word:
                            self._heard[index] = time.monotonic(), word
                ended = [index for index, (_, word) in self._heard.items() if "code" in word]
                if "code" in own and (not together.leads or len(ended) == len(others)):
                    self._has_said_farewell.set()
                    return
                time.sleep(BEAT_SECONDS)
