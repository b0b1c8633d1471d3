"""What stands on the screen: the same facts with a terminal and without, in colour only where there is one."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune import console
from qwentune.durable import mark, put
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import MODELS
from qwentune.memory import PlanRequest, make_plan, render_plan
from qwentune.training.progress import HEIGHTS, MetricsRow, Recorder, sparkline
from qwentune.training.run_folder import RunFolder
from tests.terminal import on_terminal, own_seconds


class Stderr(io.StringIO):
    """What is said, on a terminal or without one."""

    def __init__(self, patch: pytest.MonkeyPatch, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal
        for name in ("RANK", "NO_COLOR", "COLUMNS"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setattr("sys.stderr", self)

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("words", "style"),
    [
        ("FITS, 2 GiB spare", "1;32"),
        ("FITS TIGHTLY, 0.1 GiB spare", "1;33"),
        ("DOES NOT FIT, 3 GiB too much", "1;31"),
        ("warning: x", "33"),
    ],
)
def test_a_verdict_has_its_colour_on_a_terminal_only(words: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = Stderr(monkeypatch, is_terminal=True)
    console.say(f"a title\n{words}")
    first = re.split("[,x]", words)[0].rstrip()
    assert f"\x1b[{style}m{first}\x1b[0m" in tty.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    console.say(words)
    assert not re.search(r"\x1b\[[\d;]*3\dm", tty.getvalue().splitlines()[-1]), "no colour"
    plain = Stderr(monkeypatch, is_terminal=False)
    console.say(words)
    assert plain.getvalue() == f"{words}\n"


def test_without_a_terminal_what_takes_long_is_said_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(monkeypatch, is_terminal=False)
    monkeypatch.setattr(console, "FIRST_WORD_SECONDS", 0.05)
    monkeypatch.setattr(console, "NEXT_WORD_SECONDS", 0.05)
    with console.busy("reading"), console.busy("rendering a.jsonl, row") as rendering:
        rendering.done = 1200
        until = time.monotonic() + 120
        while "1,200" not in stderr.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert "rendering a.jsonl, row 1,200 …\n" in stderr.getvalue()
    assert not set("\r\x1b") & set(stderr.getvalue())


def test_what_is_done_at_once_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(monkeypatch, is_terminal=False)
    with console.busy("reading"):
        pass
    assert stderr.getvalue() == ""


def test_a_live_line_leaves_with_what_it_tells_of_and_words_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = Stderr(monkeypatch, is_terminal=True)
    with console.busy("rendering", total=9) as state:
        state.done = 4
        console.say("warning: by the way")
    shown = tty.getvalue()
    assert "rendering" in shown
    assert "by the way" in shown
    assert shown.endswith("\x1b[1A\x1b[2K"), "the line is taken away"


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.integers(1, 40))
def test_a_curve_has_its_lowest_and_its_highest_block(values: list[float], columns: int) -> None:
    drawn = sparkline(values, columns)
    assert len(drawn) == min(columns, len(values))
    assert HEIGHTS[0] in drawn
    if len(values) <= columns and max(values) - min(values) > 1e-3:
        assert drawn[values.index(max(values))] == HEIGHTS[-1]
        assert drawn[values.index(min(values))] == HEIGHTS[0]


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_plan_is_as_wide_as_its_page_and_larger_terms_have_longer_bars(columns: int) -> None:
    request = PlanRequest("full", 8192, 16, micro_batch=8, gradient_checkpointing=False)
    plan = make_plan(MODELS["Qwen/Qwen3-8B"], gpu_spec("t4"), request)
    lines = render_plan(plan, 36, columns=columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert max(map(len, lines)) > columns - 8
    terms = max(plan.phases.values(), key=lambda phase: phase.total).terms
    longer = [name for name, size in terms.items() if size > plan.usable_bytes]
    assert len(longer) > 1, "several terms are larger than the card"
    bars = {name: next(line for line in lines if line.startswith(f"{name} ")).count("█") for name in longer}
    assert sorted(bars, key=bars.__getitem__) == sorted(longer, key=terms.__getitem__)
    assert len(set(bars.values())) > 1, "not all are clipped to one length"
    assert any(re.search(r"\[█*\|█+\]", line) for line in lines), "what is too much stands beyond the mark"


def test_a_gauge_that_fits_has_no_mark() -> None:
    plan = make_plan(MODELS["Qwen/Qwen3-8B"], gpu_spec("h200"), PlanRequest("lora", 2048, 16))
    full = replace(plan, peak_bytes=plan.usable_bytes)
    assert re.search(r"\[█+░+\]", render_plan(plan, 36))
    assert f"[{'█' * 20}]" in render_plan(full, 36)


@pytest.mark.parametrize("work", ["time.sleep(0.4)", "while time.process_time() < 0.4: pass"])
def test_a_silence_is_what_the_command_itself_takes(tmp_path: Path, work: str) -> None:
    """However busy the machine is, what a command sleeps or computes between two outputs counts."""
    program = f"import time\nprint(1, flush=True)\n{work}\nprint(2)"
    screen = on_terminal([sys.executable, "-c", program], tmp_path)
    assert (screen.text, screen.longest_silence > 0.3) == ("1\n2\n", True)


def test_only_waiting_for_a_core_is_no_silence() -> None:
    before, after = {"1": (0.0, 0.0), "2": (0.0, 0.0)}, {"1": (0.02, 0.07), "2": (0.01, 0.09)}
    assert own_seconds(before, after, 0.1) == pytest.approx(0.02)
    assert own_seconds(before, {"1": (0.02, 0.0)}, 0.1) == pytest.approx(0.1)


def test_status_says_how_far_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(monkeypatch, is_terminal=False)
    folder = RunFolder(tmp_path)
    folder.set_status("running", exit_code=None, reason="", step=0, command=["qwentune", "train", "x.yaml"])
    row: MetricsRow = {"loss": 1.5, "learning_rate": 1e-4, "update_ratio": None, "tokens_per_second": 10.0, "step": 2}
    with Recorder(folder, 10, 0) as recorder:
        time.sleep(0.1)
        recorder.logged(row)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"], status["loss"]) == ("running", 2, 10, 1.5)
    assert status["eta_seconds"] > 0
    assert status["resume_command"] == "qwentune train x.yaml"
    assert stderr.getvalue() == "step 2/10  loss 1.5000  lr 1.00e-04  10 tokens/s\n"


def test_files_that_a_library_wrote_for_its_user_alone_are_published_for_all(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    mark(staging)
    (staging / "inner").mkdir()
    secretive = staging / "inner" / "model.safetensors"
    secretive.touch(0o600)
    secretive.chmod(0o600)
    put(staging, tmp_path / "model")
    os.umask(umask := os.umask(0))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
