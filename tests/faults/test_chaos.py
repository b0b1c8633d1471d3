"""The public tool ckpt-chaos, where it is installed: killed at file events of saves, resumed, compared.

The command is the one that FAULTS.md gives to users.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, write_recipe

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("ckpt-chaos") is None, reason="ckpt-chaos is not installed"),
]

TUNINGS = {"lora": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, "full": {"kind": "full"}}
RESULTS = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}
# What a save does, by the names of the files that its events are about.
OF_A_SAVE = re.compile(
    r"\.saving-|checkpoint-|model\.safetensors|optimizer\.pt|scheduler\.pt|rng_state|trainer_state|log_window|manifest"
    r"|\.latest|config\.json|README\.md"
)


@pytest.mark.fault("A02 A03 A04 A09", "ckpt-chaos: no point of a save loses work, fails, or changes the result")
@pytest.mark.parametrize("kind", TUNINGS)
def test_ckpt_chaos_finds_no_failing_point(tmp_path: Path, kind: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path, model, tuning=TUNINGS[kind], data={"max_tokens": 256}, optimizer={"max_steps": 8},
        output={"save_every_steps": 2},
    )  # fmt: skip
    work = tmp_path / "work"
    command = [
        *("ckpt-chaos", "run", "--work", str(work), "--max-points", "60", "--modes", "before,torn,unsynced"),
        *("--checkpoint-glob", "{out}/checkpoints/step-*", "--ckpt-ignore-size"),
        *("--step-regex", r"resuming .* from step (\d+)", "--result-file", "{out}/" + RESULTS[kind]),
        *("--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK", "--"),
        *(sys.executable, "-m", "qwentune.train", str(recipe), "output.dir={out}", "output.keep=1000"),
    ]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
    points = [json.loads(path.read_text()).get("event") for path in work.glob("pt_*/result.json")]
    in_saves = [event for event in points if event is not None and OF_A_SAVE.search(event[1])]
    assert len(in_saves) >= 20
    print(f"{len(points) - 1} crash points, {len(in_saves)} of them in saves or the publication")
