"""Two machines train one run: two network namespaces that a test makes, each with its own processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from qwentune.errors import UsageError
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.machines import Machines, machines
from qwentune.facts.models import model_spec
from qwentune.memory.judge import judge_recipe
from qwentune.recipe import load_recipe
from qwentune.shipped import shipped
from qwentune.supervise import _is_trainer
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, loss_history, train, write_recipe

SLURM = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "4", "MASTER_ADDR": "node1"}
NAMES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
NETWORK = "10.99.71"


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Machines()),
        (SLURM, Machines(4, 2, "node1", 29500)),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}, Machines()),
        ({"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "0"}, Machines()),  # a batch script that has not come to srun
        (NAMES, Machines(2, 1, "10.0.0.1", 4000)),
        ({f"PET_{name}": value for name, value in NAMES.items()}, Machines(2, 1, "10.0.0.1", 4000)),
        (
            {**{k: v for k, v in NAMES.items() if k != "NODE_RANK"}, "JOB_COMPLETION_INDEX": "0"},
            Machines(2, 0, "10.0.0.1", 4000),
        ),
        ({"MASTER_ADDR": "10.0.0.1", "NNODES": "1", "NODE_RANK": "0"}, Machines()),
    ],
)
def test_the_machines_are_those_that_the_environment_tells(environment: dict[str, str], found: Machines) -> None:
    if "PET_NNODES" in environment:
        names = {"PET_MASTER_ADDR": environment["PET_MASTER_ADDR"], "PET_MASTER_PORT": "4000"}
        environment = {**environment, **names}
    assert machines("auto", environment) == found
    assert machines(1, environment) == Machines(), "the recipe wants this one alone"


@pytest.mark.fault("O104", "which variable says what, and what starts a run on several machines; exit 2")
@pytest.mark.parametrize(
    ("asked", "environment", "said"),
    [
        (2, {}, r"hardware\.machines  2, but nothing says which of them this is"),
        (3, NAMES, r"hardware\.machines  3, but NNODES is 2"),
        ("auto", {**NAMES, "NODE_RANK": "2"}, r"NODE_RANK  2, of 2 machines"),
        ("auto", {**NAMES, "NODE_RANK": "first"}, r"NODE_RANK  is 'first'"),
        ("auto", {**NAMES, "MASTER_ADDR": ""}, r"MASTER_ADDR  is not set"),
        ("auto", {**SLURM, "SLURM_STEP_NUM_TASKS": "32"}, r"srun starts 32 tasks on 4 machines"),
    ],
)
def test_what_is_not_told_or_contradicts_itself_is_named(asked: Any, environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        machines(asked, environment)


def test_a_plan_for_two_machines_counts_all_gpus_and_the_way_between_them() -> None:
    loaded = load_recipe(shipped("recipes/qwen3-8b-full-4xa100.yaml"), ["batch.sequences_per_step=64"])
    spec, device = model_spec(loaded.recipe.model), gpu_spec("a100-80gb")
    one, two = (
        judge_recipe(spec, loaded.recipe, device=device, num_ranks=8 * n, num_machines=n, sharding="fsdp2")
        for n in (1, 2)
    )
    assert (one.gpus, two.gpus) == (8, 16)
    assert two.peak_bytes < one.peak_bytes, "each rank holds half as much"
    assert two.step_seconds > one.step_seconds / 2, "and the network takes its time"
    assert two.host_bytes == pytest.approx(one.host_bytes, rel=0.01), "of one machine, whose ranks are as many"


def test_the_manifest_for_kubernetes_tells_each_pod_its_place() -> None:
    service, job = yaml.safe_load_all(shipped("launch/kubernetes.yml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {row["name"]: row["value"] for row in container["env"]}
    count = job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"  # which sets JOB_COMPLETION_INDEX
    assert job["spec"]["parallelism"] == count
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert told["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    for index in range(count):
        found = machines("auto", {**told, "JOB_COMPLETION_INDEX": str(index)})
        assert found == Machines(count, index, told["MASTER_ADDR"], int(told["MASTER_PORT"]))
    assert container["command"][:2] == ["qwentune", "train"]


@pytest.mark.parametrize(("code", "steps", "queued"), [(75, 3, True), (75, 0, False), (0, 3, False), (3, 0, False)])
def test_a_job_of_slurm_is_queued_again_where_it_was_stopped_and_has_come_on(
    tmp_path: Path, code: int, steps: int, queued: bool
) -> None:
    run, bin = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    bin.mkdir()
    (run / "status.json").write_text('{\n  "step": 5\n}\n')
    stand_ins = {
        "scontrol": 'echo "$@" >> $SAID; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
        "srun": 'shift; echo "$MASTER_ADDR:$MASTER_PORT $@" >> $SAID; exec "$@"',
        "qwentune": f"echo '{{\"step\": {5 + steps}}}' > {run}/status.json; exit {code}",
    }
    for name, script in stand_ins.items():
        (bin / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin / name).chmod(0o755)
    environment = {"PATH": f"{bin}:{os.environ['PATH']}", "SAID": str(tmp_path / "said")}
    environment |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]"}
    script = shipped("launch/slurm.sbatch")
    ended = subprocess.run(["bash", script, run, "recipe.yaml", "seed=2"], env=environment, check=False)
    said = (tmp_path / "said").read_text().splitlines()
    assert ended.returncode == code
    assert said[1] == f"node1:23456 qwentune train recipe.yaml output.dir={run} seed=2"
    assert ("requeue 123456" in said) == queued
    options = {line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--ntasks-per-node=1", "--signal=TERM@300", "--requeue"} <= options


class Place:
    """Two network namespaces that reach each other, and nothing else."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}a", f"{name}b"]

    def __enter__(self) -> Place:
        one, other = self.names
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
        for number, name in enumerate(self.names, 1):
            self._ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", name)
            for link in (name, "lo"):
                self._ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def start(self, index: int, recipe: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`qwentune train` on one of the machines."""
        told = {"NNODES": "2", "NODE_RANK": str(index), "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29511"}
        told |= {"GLOO_SOCKET_IFNAME": self.names[index], **environment}
        command = ["ip", "netns", "exec", self.names[index], sys.executable, "-m", "qwentune.cli", "train"]
        return subprocess.Popen(
            [*command, str(recipe), *arguments],
            env={**ENVIRONMENT, **told},
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def place() -> Iterator[Place]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        with Place(f"qt{os.getpid() % 10**6}") as both:
            yield both
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")


def recipe_of(folder: Path, **sections: Any) -> Path:
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    sections = {"optimizer": {"max_steps": 6}, "output": {"save_every_steps": 3}, **sections}
    return write_recipe(folder, model, batch={"micro_batch": 1}, **sections)


def ended(*both: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit codes, and what was said."""
    try:
        said = [one.communicate(timeout=400)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    return [(one.returncode, words) for one, words in zip(both, said, strict=True)]


@pytest.mark.fault("O103", "all machines save one step, exit 75; the same command on each goes on")
@pytest.mark.parametrize(
    "launch",
    [
        pytest.param("cpu-2", marks=pytest.mark.slow),
        *[pytest.param(name, marks=pytest.mark.soak) for name in ("zero1", "zero2", "zero3", "zero2-offload")],
    ],
)
def test_two_machines_train_like_one_process_and_stop_and_go_on_together(
    tmp_path: Path, place: Place, launch: str
) -> None:
    recipe = recipe_of(tmp_path)
    alone = train(recipe, f"output.dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    overrides = [f"hardware.launch={launch}", "hardware.count=2", "hardware.machines=2", "hardware.gpu=cpu"]
    both = [place.start(index, recipe, *overrides) for index in (0, 1)]
    while not (tmp_path / "run" / "metrics.jsonl").exists() and both[0].poll() is None:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    stopped = ended(*both)
    assert [code for code, _ in stopped] == [75, 75], stopped
    went_on = ended(*[place.start(index, recipe, *overrides) for index in (0, 1)])
    assert [code for code, _ in went_on] == [0, 0], went_on
    assert "resuming" in went_on[0][1]
    found = [row[1] for row in loss_history(tmp_path / "run")]
    assert found == pytest.approx([row[1] for row in loss_history(tmp_path / "alone")], rel=1e-5)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["gpus"] == 4


@pytest.mark.fault("O100", "named on the other machine, which ends within a minute; the same command goes on")
@pytest.mark.parametrize(
    "happens",
    [
        pytest.param("a rank is killed", marks=pytest.mark.slow),
        pytest.param("the link is down", marks=pytest.mark.soak),
        pytest.param("the supervisor is killed", marks=pytest.mark.soak),
        pytest.param("the data is missing", marks=pytest.mark.soak),
    ],
)
def test_what_happens_to_one_machine_is_named_on_the_other_and_the_run_goes_on_afterwards(
    tmp_path: Path, place: Place, happens: str
) -> None:
    recipe = recipe_of(tmp_path, optimizer={"max_steps": 40}, output={"save_every_steps": 2})
    alone = train(recipe, f"output.dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    overrides = ["hardware.launch=cpu-2", "hardware.count=1", "hardware.machines=2", "hardware.gpu=cpu"]
    others = [*overrides, "data.train=missing.jsonl"] if happens == "the data is missing" else overrides
    both = [place.start(0, recipe, *overrides), place.start(1, recipe, *others)]
    if happens != "the data is missing":
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and both[0].poll() is None:
            time.sleep(0.05)
    begun = time.monotonic()
    if happens == "the link is down":
        place._ip("-n", place.names[1], "link", "set", place.names[1], "down")
    elif happens == "the supervisor is killed":
        supervisor = psutil.Process(both[1].pid)
        supervisor.kill()
    elif happens == "a rank is killed":
        ranks = [one for one in psutil.Process(both[1].pid).children(recursive=True) if _is_trainer(one)]
        ranks[-1].kill()
    (code, said), (_, said_there) = ended(*both)
    assert time.monotonic() - begun < 90
    codes = {"the data is missing": 3, "the supervisor is killed": 75}  # whose ranks save and end
    assert code == codes.get(happens, 1), said
    assert "Traceback" not in said + said_there
    named = {
        "a rank is killed": r"machine 1 \(\S+\): Lost rank 1: ended without a word",
        "the link is down": r"Nothing was heard of machine 1 \(\S+\) for 30 s",
        "the supervisor is killed": r"saved step",
        "the data is missing": r"machine 1 \(\S+\) ended with exit code 3",
    }
    assert re.search(named[happens], said), said
    if happens == "the link is down":
        assert "Nothing was heard of machine 0" in said_there
        place._ip("-n", place.names[1], "link", "set", place.names[1], "up")
    went_on = ended(*[place.start(index, recipe, *overrides) for index in (0, 1)])
    assert [code for code, _ in went_on] == [0, 0], went_on
    losses = [[row[1] for row in loss_history(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.fault("O101", "each rank that differs, with host and what differs, before the first step; exit 5")
@pytest.mark.fault("O102", "named before the first step; exit 2")
@pytest.mark.slow
@pytest.mark.parametrize("differs", ["data", "folder"])
def test_machines_that_differ_are_named_before_the_first_step(tmp_path: Path, place: Place, differs: str) -> None:
    recipe = recipe_of(tmp_path)
    overrides = ["hardware.launch=cpu-2", "hardware.count=1", "hardware.machines=2", "hardware.gpu=cpu"]
    others = list(overrides)
    if differs == "data":
        rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "fewer.jsonl").write_text("".join(rows[:-1]))
        others.append(f"data.train={tmp_path / 'fewer.jsonl'}")
    else:
        others.append(f"output.dir={tmp_path / 'elsewhere'}")
    found = ended(place.start(0, recipe, *overrides), place.start(1, recipe, *others))
    if differs == "data":
        assert [code for code, _ in found] == [5, 5], found
        assert "rank 1 on " in found[0][1]
        assert "data is " in found[0][1]
    else:
        assert [code for code, _ in found] == [2, 2], found
        assert "is another folder on" in found[0][1]
    assert "Traceback" not in found[0][1] + found[1][1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
