"""Training processes without the nine seconds of imports: each is forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.runs import ENVIRONMENT, FSDP2

TRAIN = "from qwentune import console, train; console.main(train.train)"
CLI = "from qwentune.cli import main; main()"
# Stops itself after the first step, so that a test may take its time before it does something to it.
PAUSED = """
import os, signal
from qwentune.training.progress import Recorder
logged = Recorder.logged
def logged_then_stopped(self, row):
    logged(self, row)
    if row["step"] == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
Recorder.logged = logged_then_stopped
"""
LAUNCH = "import runpy; runpy.run_module('tests.warm_launch', run_name='__main__')"
SERVER = """
import json, os, signal, sys, traceback
import torch, transformers, peft, bitsandbytes, qwentune.train, qwentune.training.trainer
import qwentune.data.dataset, qwentune.model.loading, qwentune.model.adapters, qwentune.exporting.package
sys.stdout.write("ready\\n"); sys.stdout.flush()
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            output = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = request["arguments"]
            os.environ.update(request["environment"])
            exec(compile(request["code"], "<warm>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    sys.stdout.write(f"{child}\\n"); sys.stdout.flush()
    _, status = os.waitpid(child, 0)
    sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\\n"); sys.stdout.flush()
"""


class Warm:
    """A process that has imported all that training needs, and forks one run after another."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line(300) == "ready"

    def start(
        self,
        recipe: Path,
        *arguments: str,
        code: str = TRAIN,
        given: Sequence[str] = (),
        launch: str | None = None,
        num_ranks: int | None = None,
        **environment: str,
    ) -> Run:
        """Starts training as `python -m qwentune.train` does, or code that takes `given` first; one at a time.

        With the name of a launch file, as accelerate launches it, `num_ranks` or as many as the file says; FSDP2
        really shards.
        """
        number = len(list(recipe.parent.glob("stderr-*")))
        stderr = recipe.parent / f"stderr-{number}.txt"
        stderr.touch()  # the next start takes another one, also where this one is killed at once
        given = ["train", *given]
        if launch is not None:
            script = recipe.parent / f"rank-{number}.py"
            script.write_text(FSDP2 + code if launch == "fsdp2" else code)
            config = ["--config_file", f"launch/{launch}.yaml", "--main_process_port", "0"]
            config += [] if num_ranks is None else ["--num_processes", str(num_ranks)]
            given, code = ["launch", *config, str(script), *given[1:]], LAUNCH
        request = {"arguments": [*given, str(recipe), *arguments], "code": code, "environment": environment}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({**request, "stderr": str(stderr)}) + "\n")
        self.server.stdin.flush()
        return Run(self, int(self._line(300)), stderr)

    def train(
        self,
        recipe: Path,
        *arguments: str,
        code: str = TRAIN,
        given: Sequence[str] = (),
        launch: str | None = None,
        num_ranks: int | None = None,
        **environment: str,
    ) -> Run:
        """A run that has ended."""
        run = self.start(recipe, *arguments, code=code, given=given, launch=launch, num_ranks=num_ranks, **environment)
        run.wait()
        return run

    def close(self) -> None:
        """Ends the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=300)

    def _line(self, seconds: float) -> str:
        assert self.server.stdout is not None
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        assert ready, f"nothing came for {seconds} s"
        return self.server.stdout.readline().strip()


@dataclass
class Run:
    """One forked run: its process id, what it has said so far, and its exit code once it is known."""

    warm: Warm
    pid: int
    stderr: Path
    code: int | None = None

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return self.stderr.read_text() if self.stderr.exists() else ""

    def wait(self, seconds: float = 300) -> int:
        """The exit code; -9 where it was killed."""
        if self.code is None:
            self.code = int(self.warm._line(seconds))
        return self.code

    def until(self, happens: Callable[[], bool], seconds: float = 300) -> None:
        """Waits for something that the run does."""
        deadline = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < deadline, self.said
            assert self.said.find("Traceback") < 0, self.said
            time.sleep(0.01)

    def says(self, text: str) -> None:
        """Waits for a text on stderr."""
        self.until(lambda: text in self.said)

    def pauses(self) -> None:
        """Waits until it has stopped itself; after SIGCONT it goes on."""
        self.until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def kill(self) -> int:
        """Kill -9; the exit code."""
        self.signal(signal.SIGKILL)
        return self.wait()
