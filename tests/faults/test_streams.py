"""Standard streams that are ASCII, closed, full or unread: no traceback, and data that is lost is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import add_weights, write_checkpoint
from tests.dialogues import random_rows
from tests.runs import ENVIRONMENT, final_weights, loss_history, write_recipe

QUICK, SLOW = ("keys", "oops"), ("models", "gpus", "--help", "plan --help", "plan", "plan --json")
PREVIEWS = ("preview", "preview --json")
VERBS = [*QUICK, *(pytest.param(verb, marks=pytest.mark.slow) for verb in (*SLOW, *PREVIEWS))]
CLOSED = ((1,), (2,), (0, 1, 2))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for one that trains, with data, keys and a folder beyond ASCII."""
    folder = tmp_path_factory.mktemp("läuft")
    rows = [{"messages": [{"role": "user", "content": "äöü 🙂 你好"}, {"role": "assistant", "content": "ß"}]}] * 9
    rows += random_rows(3, 20, hostile=False, lists=False)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    return write_recipe(folder, model, data={"system": "Größe"}, optimizer={"max_steps": 4})


def command(words: str, recipe: Path, *arguments: str) -> list[str]:
    """`qwentune WORDS`, with the recipe where one is taken."""
    verb, *flags = words.split()
    takes = verb in ("preview", "plan", "train") and "--help" not in flags
    return [sys.executable, "-m", "qwentune.cli", verb, *([str(recipe)] if takes else []), *flags, *arguments]


def run(
    command: list[str], closed: tuple[int, ...] = (), stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The command with descriptors that are closed; it must end without a traceback or a word of the interpreter's."""
    words = " ".join(f"{number}>&-" for number in closed)
    given = {**ENVIRONMENT, "PYTHONUNBUFFERED": "", **environment}
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {words}', "sh", *command],
        env=given, stdout=stdout, stderr=subprocess.PIPE, timeout=300, check=False,
    )  # fmt: skip
    for word in (b"Traceback", b"A bug in", b"Exception ignored"):
        assert word not in ended.stderr, ended.stderr.decode()
    return ended


@pytest.mark.fault("C91", "a full stdout: what could not be written, and why; exit 4")
@pytest.mark.parametrize("words", [verb for verb in VERBS if verb != "oops"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_an_error_in_words(recipe: Path, words: str, unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        ended = run(command(words, recipe), stdout=full.fileno(), PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == 4
    assert b"stdout  cannot be written: No space left on device" in ended.stderr


@pytest.mark.fault(
    "C91", "closed or full streams for messages, a reader that goes (`| head`): the command's own exit code"
)
@pytest.mark.parametrize("words", VERBS)
def test_no_other_stream_changes_an_exit_code(recipe: Path, words: str) -> None:
    expected = 2 if words == "oops" else 0
    for closed in CLOSED:
        assert run(command(words, recipe), closed).returncode == expected
    with open("/dev/full", "wb") as full:
        silent = subprocess.run(
            command(words, recipe), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=full, check=False
        )
        assert silent.returncode == expected
    reading, writing = os.pipe()
    os.close(reading)
    assert run(command(words, recipe), stdout=writing).returncode == expected
    os.close(writing)


@pytest.mark.fault("C91", "an ASCII terminal: characters that it lacks are written as escapes, JSON stays JSON")
@pytest.mark.parametrize("words", [pytest.param(verb, marks=pytest.mark.slow) for verb in ("plan", *PREVIEWS)])
def test_what_an_ascii_stream_lacks_is_written_as_escapes(recipe: Path, words: str) -> None:
    ended = run(command(words, recipe), PYTHONIOENCODING="ascii")
    assert ended.returncode == 0
    assert ended.stdout.isascii()
    if "--json" in words:
        utf8 = run(command(words, recipe), PYTHONIOENCODING="utf-8")
        assert json.loads(ended.stdout) == json.loads(utf8.stdout)
    else:
        assert b"\\xb7" in ended.stdout


@pytest.mark.slow
@pytest.mark.fault("C91", "a run without any stream, and one that has only full ones, train as any other")
def test_a_run_needs_no_streams(recipe: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("spoken", "closed", "full")]
    for folder in folders:
        words = command("train", recipe, f"output.dir={folder}")
        if folder.name == "full":
            with open("/dev/full", "wb") as full:
                ended = subprocess.run(words, env=ENVIRONMENT, stdout=full, stderr=full, timeout=300, check=False)
        else:
            ended = run(words, (0, 1, 2) if folder.name == "closed" else ())
        assert ended.returncode == 0
    assert len({str(loss_history(folder)) for folder in folders}) == 1
    assert len({str(final_weights(folder)) for folder in folders}) == 1
    for folder in folders[1:]:
        names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (folders[0], folder)]
        assert names[0] == names[1]
    chat = [*command("chat", recipe), str(folders[1])]
    with open("/dev/full", "wb") as full:
        assert run([*chat, "--message", "ä", "--json"], stdout=full.fileno()).returncode == 4
        assert run([*command("export", recipe), str(folders[1])], (2,), stdout=full.fileno()).returncode == 0
    assert run(chat, (0,)).returncode == 0
    for message in (b"\xff\xfe\n", "你好\n".encode()):  # the first is no text of any encoding
        given = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
        talk = subprocess.run(chat, env=given, input=message, capture_output=True, timeout=300, check=False)
        assert talk.returncode == 0, talk.stderr
        assert talk.stdout.isascii()
