"""The GPU script is ready: every piece runs end to end on a CPU, writes its row, and is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "bench" / "gpu_day.py"


def rehearsed(out: Path, *pieces: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--minutes", "25", "--out", str(out), "--only", *pieces]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ran.returncode == 0, [row for row in rows if "error" in row["found"]]
    return rows


@pytest.mark.slow
def test_pieces_have_a_row_each_predictions_first_and_are_not_run_again(tmp_path: Path) -> None:
    pieces = ["rates", "attention-2048", "waits-0.6b-lora", "8b-lora-eager", "8b-qlora-eager", "8b-full-eager"]
    rows = rehearsed(tmp_path / "day.jsonl", *pieces)
    assert [row["piece"] for row in rows] == ["rates", "predictions", *pieces[1:]]
    for row in rows:
        assert row["rehearsal"] is True
        assert row["card"] == "cpu"
        assert row["versions"]["torch"]
        assert row["commit"]
    found = {row["piece"]: row["found"] for row in rows}
    assert found["waits-0.6b-lora"]["waits"] == []
    assert found["8b-lora-eager"]["predicted"] == found["predictions"]["lora"]
    assert rehearsed(tmp_path / "day.jsonl", "rates", "attention-2048") == rows


@pytest.mark.soak
def test_peers_begin_with_the_same_loss_in_both_orders(tmp_path: Path) -> None:
    *_, row = rehearsed(tmp_path / "day.jsonl", "peers")
    found = row["found"]
    assert not found["void"], found
    assert {name: len(turns) for name, turns in found["turns"].items() if name != "unsloth"} == dict.fromkeys(
        ("ours", "bare", "trl", "trl-tuned"), 2
    )
    assert all(turn["tokens_per_second"] > 0 for turns in found["turns"].values() for turn in turns)


@pytest.mark.soak
def test_compiled_steps_and_tests_are_found(tmp_path: Path) -> None:
    rows = rehearsed(tmp_path / "day.jsonl", "8b-lora-compiled", "correctness")
    assert [row["piece"] for row in rows] == ["predictions", "8b-lora-compiled", "correctness"]
