"""`accelerate launch`, whose ranks are forked from this process, which has imported all that they need."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from tests.runs import code_of


class Forked:
    """A rank with what torch's agent asks of a `Popen`; the command is an interpreter, -u, a script and the rest."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the agent's own are not for the rank
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(environment)
            _, _, script, *arguments = command
            sys.argv = [script, *arguments]
            os._exit(code_of(partial(runpy.run_path, script, run_name="__main__")))

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code


if __name__ == "__main__":
    SubprocessHandler._popen = lambda self, args, env: Forked(args, env)  # type: ignore[method-assign, assignment]
    launch.main()
