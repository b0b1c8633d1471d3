"""The ranks of a machine trace the plan once, and all have the same one."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.memory.judge import judge
from qwentune.memory.run_plan import RunPlan
from qwentune.recipe import BatchOptions, MemoryOptions, OutputOptions, Precision, Tuning
from qwentune.training.once import once
from tests.runs import write_recipe
from tests.warm import Warm

ON_CARDS = """
import os, sys, time
from pathlib import Path
from qwentune import console, train
from qwentune.facts.gpus import gpu_spec
from qwentune.memory.trace import cross_check
from qwentune.memory import judge
folder = Path(sys.argv.pop(1))
judge.device_of = lambda hardware, here: (gpu_spec("rtx-3060"), 2, "auto")
def counted(spec, device, request, plan, tell):
    (folder / f"traced-{time.monotonic_ns()}").write_text(os.environ["CUDA_DEVICE_ORDER"])
    time.sleep(1)
    tell("what the trace says")
    return plan
cross_check.cross_checked = counted
say = console.say
console.say = lambda words, by_any_rank=False: say(f"<{words}>", by_any_rank=True)
def end(code):  # the launcher ends the rank that has not spoken yet, so each waits for the other
    (folder / f"spoken-{os.environ['RANK']}").touch()
    while len(list(folder.glob("spoken-*"))) < 2:
        time.sleep(0.01)
    os._exit(code)
train._end_rank = end
console.main(train.train)
"""


def test_one_rank_of_a_machine_traces_and_all_refuse_alike(tmp_path: Path, warm: Warm) -> None:
    recipe = write_recipe(tmp_path, "Qwen/Qwen3-8B")
    cache = str(tmp_path / "cache")
    ended = warm.train(recipe, code=ON_CARDS, given=[str(tmp_path)], launch="cpu-2", QWENTUNE_CACHE=cache)
    (traced,) = tmp_path.glob("traced-*")
    assert traced.read_text().startswith("PCI_BUS_ID"), "before torch starts CUDA"
    assert ended.said.count("<what the trace says>") == 2
    assert ended.said.count("rtx-3060  the run does not fit") == 2


RANK_OF_ONCE = """
import sys, time
from pathlib import Path
from qwentune.training.once import once
def find():
    with open(sys.argv[1], "a") as file:
        file.write("found\\n")
    time.sleep(0.5)
    if sys.argv[2] == "fails":
        raise SystemExit(3)
    return {"value": [1.5, None]}
print(once("it", find))
"""


@pytest.mark.parametrize(("how", "times"), [("finds", 1), ("fails", 3)])
def test_what_one_rank_finds_the_others_of_its_start_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, times: int
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    found = tmp_path / "found"
    start = partial(subprocess.Popen, [sys.executable, "-c", RANK_OF_ONCE, str(found), how], stdout=subprocess.PIPE)
    ranks = [start() for _ in range(3)]
    said = [rank.communicate(timeout=300)[0].decode().strip() for rank in ranks]
    assert len(found.read_text().splitlines()) == times
    assert said == ([str({"value": [1.5, None]})] * 3 if how == "finds" else [""] * 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start().communicate(timeout=300)
    assert len(found.read_text().splitlines()) == times + 1, "another start finds anew"


def test_what_launchers_that_ended_have_found_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert once("it", lambda: 1) == 1
    (mine,) = tmp_path.glob("once/*/*.json")
    gone = next(pid for pid in range(10**6, 10**7) if not psutil.pid_exists(pid))
    old = mine.with_name(f"{gone}-0.json")
    old.touch()
    assert once("something else", lambda: 2) == 2
    assert mine.exists()
    assert not old.exists()


def test_a_plan_comes_back_from_the_rank_that_made_it(tmp_path: Path) -> None:
    plan = judge(
        model_spec("Qwen/Qwen3-0.6B"), tuning=Tuning(kind="lora"), max_tokens=1024, batch=BatchOptions(),
        precision=Precision(), memory=MemoryOptions(), output=OutputOptions(dir=str(tmp_path)),
        device=gpu_spec("gtx-1650"), num_ranks=1,
    )  # fmt: skip
    assert RunPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
