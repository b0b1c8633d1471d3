"""A newcomer's ten minutes: on a terminal, without a GPU, doing only what the screen says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.terminal import CTRL_C, LINE_END, Screen, on_terminal

LONGEST_SILENCE = 3.0  # seconds in which it runs or sleeps; what it waits for a core does not count
GOOD = [(f"How many are {k} and {k}?", f"{k} and {k} are {2 * k}.") for k in range(30)]
NOISE = ("[transformers]", "kernels-community", "real_accelerator", "UserWarning", "FutureWarning", "Traceback")


def chat(question: str, answer: str, role: str = "assistant") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]})


# Each with what the message says of it, and what doing so makes of the line; None: it is deleted.
WRONG = (
    (chat("a", "b", role="asistant"), "Did you mean 'assistant'", chat("a", "b")),
    (chat("cut", "in the middle")[:60], "delete line {line}", None),
    (chat("c", "d") + ",", "Rows have no comma between them", chat("c", "d")),
    (chat("e", "f").replace('"', "'"), "Write rows with json.dumps", chat("e", "f")),
)


def qwentune(command: str, folder: Path, typed: Sequence[tuple[str, str]] = ()) -> Screen:
    """What `qwentune …` shows on a terminal; it never stands still for long, and only qwentune speaks.

    Measured is how long nothing new is shown while it runs or sleeps: see `Screen`.
    """
    verb, *arguments = shlex.split(command)
    assert verb == "qwentune"
    screen = on_terminal([sys.executable, "-m", "qwentune.cli", *arguments], folder, typed=typed)
    print(f"{verb}: {screen.longest_silence:.1f} s")
    assert screen.longest_silence < LONGEST_SILENCE, screen.raw
    assert not [words for words in NOISE if words in screen.text], screen.text
    return screen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is here")
def test_from_rows_to_a_chat_by_what_the_screen_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    lines: list[str | None] = [chat(*pair) for pair in GOOD]
    for place, (wrong, _, _) in enumerate(WRONG):
        lines.insert(3 * place + 1, wrong)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines))

    init = "qwentune init --model ./model --data rows.jsonl -o mine.yaml"
    refused = qwentune(f"{init} --gpu cpu", tmp_path)
    assert refused.code == 3
    assert f"{len(WRONG)} problems" in refused.text
    for wrong, message, mended in WRONG:
        line = lines.index(wrong) + 1
        assert f"rows.jsonl:{line}" in refused.text
        assert message.format(line=line) in refused.text
        lines[line - 1] = mended
    data.write_text("".join(f"{line}\n" for line in lines if line is not None))

    written = qwentune(init, tmp_path, [("Which one will train?", f"cpu{LINE_END}")])
    assert written.code == 0, written.text
    preview = qwentune(written.find("next: (.+)"), tmp_path)
    assert preview.code == 0
    assert "⟦" in preview.text
    plan = qwentune(preview.find("next: (.+)"), tmp_path)
    assert plan.code == 0
    assert re.search(r"\x1b\[1;32mFITS\x1b", plan.raw), "in green"

    train = plan.find("next: (.+)") + " optimizer.epochs=12"
    stopped = qwentune(train, tmp_path, [("trains ", CTRL_C)])
    assert stopped.code == 130, stopped.text
    for fact in ("transformers ", "parameters", "cpu", f"{len(lines) - 1} rows", "steps", "runs/mine"):
        assert fact in stopped.text
    assert "stopping after this step, saving …" in stopped.text
    resumed = qwentune(stopped.find("continue with: (.+)"), tmp_path)
    assert resumed.code == 0, resumed.text
    assert re.search(r"resuming \S+ from step \d+", resumed.text)
    assert "GiB by phase" in stopped.text
    assert "GiB by phase" not in resumed.text, "the whole plan is shown once"
    assert re.search("loss  [0-9.]+ [▁▂▃▄▅▆▇█]+ [0-9.]+", resumed.text)

    exported = qwentune(resumed.find("(qwentune export .+)"), tmp_path)
    assert exported.code == 0, exported.text
    os.umask(umask := os.umask(0))
    files = [path for path in (tmp_path / exported.find(r"exported to (\S+)")).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    question = [("an empty line ends the chat", f"How many are 3 and 3?{LINE_END}{LINE_END}")]
    assert qwentune(resumed.find("(qwentune chat .+)"), tmp_path, question).code == 0
