"""The machines of one run: how many, which of them this is, and where the first is reached; free of torch.

Whoever starts `qwentune train` on each of them says so in the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwentune.errors import Problem, UsageError

# What a machine sends to others each second, as the plan takes it: 100 Gb/s, as Google's a2 machines have it; several
# times less than what Amazon's p4d (400) and Azure's ND A100 v4 (1,600) have, by their makers.
NETWORK_BYTES_PER_SECOND = 12.5e9
DEFAULT_PORT = 29500  # torchrun's
MOST = 1024


@dataclass(frozen=True, slots=True)
class Machines:
    """How many machines train together, the number of this one from 0, and where all meet."""

    count: int = 1
    index: int = 0
    address: str = ""
    port: int = DEFAULT_PORT

    @property
    def leads(self) -> bool:
        """Whether this is the machine of rank 0."""
        return self.index == 0

    @property
    def launch_arguments(self) -> list[str]:
        """What accelerate's launcher is told; DeepSpeed's own would go to the others by ssh."""
        if self.count == 1:
            return []
        place = ["--num_machines", str(self.count), "--machine_rank", str(self.index)]
        meeting = ["--main_process_ip", self.address, "--main_process_port", str(self.port)]
        return [*place, *meeting, "--deepspeed_multinode_launcher", "standard"]


# Who says it: by which variables the count, the number of this machine, address and port of the first.
_TOLD = {
    "torchrun's variables": ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    "NNODES": ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "a Kubernetes job": ("NNODES", "JOB_COMPLETION_INDEX", "MASTER_ADDR", "MASTER_PORT"),
    "srun": ("SLURM_STEP_NUM_NODES", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT"),
}
_FIX = "launch/slurm.sbatch and launch/kubernetes.yml start a run on several machines."


def machines(asked: int | Literal["auto"], environment: Mapping[str, str] | None = None) -> Machines:
    """The machines of a run that starts here, `asked` being what the recipe says.

    Raises UsageError where the environment says another number than the recipe, or not all that is needed.
    """
    told = os.environ if environment is None else environment
    if asked == 1:
        return Machines()
    names = next((names for names in _TOLD.values() if told.get(names[0], "1") != "1" and names[1] in told), None)
    if names is None:
        if asked == "auto":
            return Machines()
        what = f"{asked}, but nothing says which of them this is"
        needed = "Set NNODES, NODE_RANK (from 0), MASTER_ADDR (of machine 0) and MASTER_PORT on each."
        raise UsageError(Problem("hardware.machines", what, f"{needed} {_FIX}"))
    count, index, port = (_number(told, name) for name in (names[0], names[1], names[3]))
    problems: list[Problem] = []
    if asked not in ("auto", count):
        problems.append(Problem("hardware.machines", f"{asked}, but {names[0]} is {count}", "Leave it at auto."))
    if not 0 <= index < count <= MOST:
        what = f"{index}, of {count} machines"
        problems.append(Problem(names[1], what, f"It counts from 0; there are at most {MOST} machines."))
    address = told.get(names[2], "")
    if not address:
        problems.append(Problem(names[2], "is not set", f"Set it to the address of machine 0. {_FIX}"))
    tasks = told.get("SLURM_STEP_NUM_TASKS")
    if names[0].startswith("SLURM") and tasks not in (None, str(count)):
        what = (
            f"srun starts {tasks} tasks on {count} machines, but `qwentune train` starts the processes of each itself"
        )
        problems.append(Problem("srun", what, "srun --ntasks-per-node=1"))
    if problems:
        raise UsageError(problems)
    return Machines(count, index, address, port)


def num_machines(asked: int | Literal["auto"]) -> int:
    """How many machines a plan is for: as the recipe says, else as the environment does."""
    return machines("auto").count if asked == "auto" else asked


def _number(told: Mapping[str, str], name: str) -> int:
    text = told.get(name, str(DEFAULT_PORT))  # only the port may be missing
    if not text.isdecimal() or len(text) > 6:
        raise UsageError(Problem(name, f"is {text[:40]!r}", "It is a whole number."))
    return int(text)


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()
