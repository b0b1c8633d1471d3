"""What stands around a run: homes, caches and temporary folders of others, disks that do not sync, clocks that jump."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

import qwentune
from qwentune import console
from qwentune.data import cache
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.tokenizing import checkpoint_folder as checkpoint
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.durable import MARK, replace_folder, write_text
from qwentune.errors import UsageError
from qwentune.recipe import load_recipe
from qwentune.training import reports
from qwentune.training.checkpoints import Checkpoints
from qwentune.training.run_folder import METRICS, RunFolder
from tests.checkpoints import add_weights, write_checkpoint
from tests.faults.test_disk import small_disk
from tests.faults.test_save import write_files
from tests.runs import ENVIRONMENT, KILL_AT, KILLED, final_weights, last_states, loss_history, write_recipe
from tests.warm import PAUSED, TRAIN, Warm

SOMEONE = 54321  # a user id without a name, as containers are given
IS_ROOT = os.geteuid() == 0
# Root may write everywhere: it becomes someone who may read everything, the home that Python may stand in among it.
AS_SOMEONE = ["setpriv", f"--reuid={SOMEONE}", f"--regid={SOMEONE}", "--clear-groups"]
AS_SOMEONE += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def command(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command of qwentune, by a user who is not root; None takes a variable away."""
    settled = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [*(AS_SOMEONE if IS_ROOT else ()), sys.executable, "-m", "qwentune.cli", *arguments],
        env={name: value for name, value in settled.items() if value is not None},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps on a CPU, saved after each third; whoever runs it may write beside it."""
    if IS_ROOT and subprocess.run([*AS_SOMEONE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("root cannot become another user here")
    folder = tmp_path_factory.mktemp("surroundings")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    model = add_weights(write_checkpoint(folder / "model", "qwen3"))
    recipe = write_recipe(
        folder, model, data={"max_tokens": 256}, optimizer={"max_steps": 9}, output={"save_every_steps": 3},
        hardware={"gpu": "cpu"},
    )  # fmt: skip
    folder.chmod(0o777)
    return recipe


def surroundings(folder: Path) -> dict[str, tuple[dict[str, str | None], int, str]]:
    """By name: the environment, the exit code of a preview and what it says."""
    mine, read_only, a_file = folder / "mine", folder / "read-only", folder / "file"
    for path in (mine, read_only):
        path.mkdir()
    mine.chmod(0o777)
    read_only.chmod(0o555)
    a_file.touch()
    words = "QWENTUNE_CACHE"
    return {
        "a home that is read-only": ({"HOME": str(read_only), "QWENTUNE_CACHE": None}, 2, words),
        "a user without a home": ({"HOME": None, "QWENTUNE_CACHE": None}, 2, words),
        "a cache that is read-only or another's": ({"QWENTUNE_CACHE": str(read_only)}, 2, words),
        "a cache that is a file": ({"QWENTUNE_CACHE": str(a_file)}, 2, words),
        "a home that is read-only, a cache that is not": (
            {"HOME": str(read_only), "QWENTUNE_CACHE": str(mine / "1"), "HF_HOME": None}, 0, "the whole dataset",
        ),
        "neither home nor temporary folder, but a cache": (
            {"HOME": None, "TMPDIR": str(read_only), "QWENTUNE_CACHE": str(mine / "2")}, 0, "the whole dataset",
        ),
    }  # fmt: skip


@pytest.mark.fault("M91", "exit 2 with the folder and the variable that names another, or it works; never a bug")
@pytest.mark.slow
def test_a_home_or_cache_that_cannot_be_written_is_said(recipe: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name, (environment, code, said) in surroundings(tmp_path).items():
        if name == "a user without a home" and not IS_ROOT:
            continue  # who has a name has a home
        shown = command("preview", str(recipe), "--limit", "1", **environment)
        assert shown.returncode == code, (name, shown.stderr)
        assert said in shown.stdout + shown.stderr, name
        assert "A bug" not in shown.stderr, name
        planned = command("plan", str(recipe), **environment)  # which has no need of a cache
        assert planned.returncode == (2 if name == "a user without a home" else 0), (name, planned.stderr)


@pytest.mark.fault("M91", "with a cache that can be written a run needs no home and no TMPDIR that is there")
@pytest.mark.slow
def test_a_run_needs_no_home(recipe: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    environment = {"HOME": None, "HF_HOME": None, "TMPDIR": "/nowhere", "QWENTUNE_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "run"
    trained = command("train", str(recipe), f"output.dir={run}", "tuning.kind=qlora", **environment)
    assert trained.returncode == 0, trained.stderr
    exported = command("export", str(run), "--verify", "-o", str(tmp_path / "exported"), **environment)
    assert exported.returncode == 0, exported.stderr
    # What was rendered is read from a cache that only another may write.
    (tmp_path / "cache" / "data").chmod(0o555)
    again = command("train", str(recipe), f"output.dir={tmp_path / 'again'}", "tuning.kind=qlora", **environment)
    assert again.returncode == 0, again.stderr
    assert final_weights(tmp_path / "again") == final_weights(run)


@pytest.mark.fault("M91", "a cache on a full disk: exit 4, nothing half-written is left")
@pytest.mark.slow
def test_a_cache_on_a_full_disk_is_said(recipe: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        shown = subprocess.run(
            [sys.executable, "-m", "qwentune.cli", "preview", str(recipe)],
            env={**ENVIRONMENT, "QWENTUNE_CACHE": str(disk / "cache")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert shown.returncode == 4, shown.stderr
        assert "No space left" in shown.stderr
        assert not [path for path in (disk / "cache" / "data").iterdir() if path.is_dir()]


@pytest.mark.fault(
    "M91", "what the system refuses is said with the place and a way out, exit 2 or 4, without traceback"
)
def test_what_the_machine_refuses_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def code_of(error: Exception) -> int:
        def fail() -> int:
            raise error

        return console.run(fail)

    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EMFILE):
        assert code_of(OSError(number, os.strerror(number), str(tmp_path / "cache" / "data"))) == 2
        said = capsys.readouterr().err
        assert os.strerror(number) in said
        assert "QWENTUNE_CACHE" in said
    assert code_of(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "tmp" / "x"))) == 4
    assert "TMPDIR" in capsys.readouterr().err
    assert code_of(OSError(errno.ENOSPC, "No space left on device")) == 4
    assert code_of(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")) == 2
    assert "TMPDIR" in capsys.readouterr().err
    assert code_of(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")) == 1
    assert code_of(ValueError("ours")) == 1


@pytest.mark.fault("M91", "a cache of the hub that cannot be written: exit 2 with HF_HOME, not a lost connection")
def test_a_cache_of_the_hub_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "hub" / "models--Qwen"))

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UsageError, match="Permission denied") as error:
        checkpoint.checkpoint_folder("Qwen/Qwen3-0.6B")
    assert "HF_HOME" in str(error.value)


# --- the cache during a run


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, warm: Warm) -> tuple[object, ...]:
    """Losses, weights and states of a run that nothing disturbs."""
    run = recipe.parent / "undisturbed"
    assert warm.train(recipe, f"output.dir={run}").code == 0
    return result(run)


def result(run: Path) -> tuple[object, ...]:
    return loss_history(run), final_weights(run), last_states(run)


AFTER_STEP_4 = """
import os, shutil
from qwentune.training.progress import Recorder
take = Recorder.logged
def take_and_remove(self, row):
    take(self, row)
    if row["step"] == 4:
        shutil.rmtree(os.environ["QWENTUNE_CACHE"])
Recorder.logged = take_and_remove
"""


@pytest.mark.fault("M92", "removed: the run goes on with what it has open; killed, the next start renders it again")
@pytest.mark.slow
def test_a_cache_that_is_removed_during_a_run_does_not_matter(
    recipe: Path, warm: Warm, undisturbed: tuple[object, ...], tmp_path: Path
) -> None:
    cache, run = str(tmp_path / "cache"), tmp_path / "run"
    whole = warm.train(recipe, f"output.dir={run}", code=AFTER_STEP_4 + TRAIN, QWENTUNE_CACHE=cache)
    assert whole.code == 0, whole.said
    assert not Path(cache).exists()
    assert result(run) == undisturbed

    killed = tmp_path / "killed"
    ended = warm.train(recipe, f"output.dir={killed}", code=AFTER_STEP_4 + KILL_AT, given=["7"], QWENTUNE_CACHE=cache)
    assert ended.code == KILLED
    again = warm.train(recipe, f"output.dir={killed}", QWENTUNE_CACHE=cache)
    assert "from step 6" in again.said
    assert result(killed) == undisturbed


def test_a_crash_names_our_line_that_met_it(tmp_path: Path) -> None:
    """The innermost line may be one of numpy's, which tells nobody which file was read."""
    store, numpy = Path(qwentune.__file__).parent / "data" / "layout" / "store.py", "/opt/numpy/memmap.py"
    fatal = "Fatal Python error: Bus error\n\nCurrent thread 0x1 (most recent call first):\n"
    (tmp_path / "crash-0").write_text(
        f'{fatal}  File "{numpy}", line 5 in __getitem__\n  File "{store}", line 70 in row\n  File "x", line 1 in run\n'
    )
    (tmp_path / "crash-1").write_text(f'{fatal}  File "{numpy}", line 5 in __getitem__\n')
    (tmp_path / "crash-2").write_text(f"{fatal}  <no Python frame>\n")
    said = [reports.crash(tmp_path, rank) for rank in range(4)]
    assert said[0] == f"Bus error in {store}:70 in row"
    assert said[1:] == [f"Bus error in {numpy}:5 in __getitem__", "Bus error in a library", ""]


@pytest.mark.fault(
    "M92",
    "cut short in place under a run: named with the line that met it, exit 1; the same command continues. Bytes "
    "changed in place under a run are found at the next start, not before",
)
@pytest.mark.slow
def test_a_cache_that_is_cut_short_during_a_run_is_named(recipe: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    errors = tmp_path / "errors.txt"
    arguments = [str(recipe), f"output.dir={run}", "optimizer.max_steps=5000"]
    with errors.open("w") as file:
        training = subprocess.Popen(
            [sys.executable, "-m", "qwentune.cli", "train", *arguments],
            env={**ENVIRONMENT, "QWENTUNE_CACHE": str(cache)}, stderr=file,
        )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (run / "latest").exists() and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (tokens,) = cache.glob("data/*/input_ids.bin")
    os.truncate(tokens, 0)
    assert training.wait(timeout=300) == 1, errors.read_text()
    said = errors.read_text()
    assert "Lost rank 0: Bus error in " in said
    assert "qwentune/data/" in said
    assert "A file was cut short or cannot be read any more" in said
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert status["reason"].startswith("Lost rank 0: Bus error")


@pytest.mark.fault("K79", "preview and plan of a recipe that is being trained: as ever, and the run ends as alone")
@pytest.mark.slow
def test_preview_and_plan_beside_a_run_disturb_nothing(
    recipe: Path, warm: Warm, undisturbed: tuple[object, ...], tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", {**ENVIRONMENT, "QWENTUNE_CACHE": str(tmp_path / "cache")}

    def start(verb: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qwentune.cli", verb, str(recipe)],
            env=cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = start("preview")  # both render, or one waits for the other
    running = warm.start(recipe, f"output.dir={run}", code=PAUSED + TRAIN, QWENTUNE_CACHE=cache["QWENTUNE_CACHE"])
    running.pauses()  # for as long as the others need
    beside = [first, start("preview"), start("plan")]
    for process in beside:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    running.signal(signal.SIGCONT)
    assert running.wait() == 0, running.said
    assert result(run) == undisturbed


@pytest.mark.fault(
    "K80", "one that is stopped while it renders: the other says for whom it waits, and goes on after it"
)
def test_who_waits_for_a_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, said = FileLock(tmp_path / "data.lock"), list[str]()
    other.acquire()

    def hear(words: str) -> None:
        said.append(words)
        other.release()

    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(cache, "say", hear)
    with cache.alone(tmp_path / "data"), pytest.raises(Timeout):
        other.acquire(timeout=0)
    assert said == [f"waiting for another process, which is writing {tmp_path / 'data'}; it may be stopped or slow"]


# --- syncs that fail


def fails_at(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether an action met a sync that fails: the one of this number, counted from 0, and all that follow."""
    numbers, sync = count(), os.fsync

    def failing(descriptor: int) -> None:
        if next(numbers) >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        try:
            action()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return True
    return False


@pytest.mark.fault("M93", "in a save: the checkpoint before it stays the newest, or the new one is whole")
def test_a_checkpoint_whose_sync_fails_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    for number in count():
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        checkpoints.publish(write_files(checkpoints, 1), 1, {"run": {}})
        written = write_files(checkpoints, 2)
        if not fails_at(number, lambda c=checkpoints, w=written: c.publish(w, 2, {"run": {}}), monkeypatch):
            break
        named = (checkpoints.run / (checkpoints.run / "latest").read_text().strip()).is_dir()
        checkpoints.sweep()
        newest, skipped = checkpoints.newest()
        assert newest is not None
        assert (named, skipped) == (True, [])
        steps.append(newest.step)
    assert steps == sorted(steps)
    assert steps.count(1) >= 5, "no file, manifest or folder was synced before the rename"


@pytest.mark.fault("M93", "in records, status, export and cache: the old file or folder stays, the reason is said")
def test_files_and_folders_whose_sync_fails_keep_what_was_there(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, target = tmp_path / "status.json", tmp_path / "exported"
    write_text(file, "old")
    assert fails_at(0, lambda: write_text(file, "new"), monkeypatch)
    assert file.read_text() == "old"

    for number in count():
        shutil.rmtree(target, ignore_errors=True)
        for folder, text in ((target, "old"), (tmp_path / "written", "new")):
            folder.mkdir(exist_ok=True)
            (folder / "weights").write_text(text)
        if not fails_at(number, lambda: replace_folder(tmp_path / "written", target), monkeypatch):
            break
        assert (target / "weights").read_text() == ("old" if (tmp_path / "written").exists() else "new")
    assert number >= 2

    run = RunFolder(tmp_path)
    run.append(METRICS, {"step": 1})
    assert fails_at(0, run.sync_records, monkeypatch)

    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    data = load_recipe(write_recipe(tmp_path, "builtin:tiny-qwen3", data={"max_tokens": 256})).recipe.data
    tokenizer = load_tokenizer(qwen3_folder)

    def rendered() -> str:
        try:
            return prepare(data, tokenizer, chat_template(data, tokenizer), seed=1).content
        except Exception as error:  # in words of the cache, or as it came
            if "Input/output error" in str(error):
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
            raise

    for number in (0, 5, 14):
        assert fails_at(number, rendered, monkeypatch)
        assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    assert not fails_at(10**9, rendered, monkeypatch)


SYNC_FAILS_AFTER_STEP_4 = """
import errno, os
from qwentune.training.progress import Recorder
logged = Recorder.logged
def failing(descriptor):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
def logged_and_more(self, row):
    logged(self, row)
    if row["step"] == 4:
        os.fsync = failing
Recorder.logged = logged_and_more
"""


@pytest.mark.fault("M93", "in a run: exit 2 with the reason, and the same command goes on from the checkpoint before")
@pytest.mark.slow
def test_a_run_whose_disk_does_not_sync_ends_in_words(
    recipe: Path, warm: Warm, undisturbed: tuple[object, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    broken = warm.train(recipe, f"output.dir={run}", code=SYNC_FAILS_AFTER_STEP_4 + TRAIN)
    assert broken.code == 2, broken.said
    assert "Input/output error" in broken.said
    assert "A bug" not in broken.said
    again = warm.train(recipe, f"output.dir={run}")
    assert "from step 3" in again.said
    assert result(run) == undisturbed


# --- clocks

# A clock of the day that jumps at every reading: a day on, two years back, to before 1980; the steady clock stays.
JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
static long jump(void) {
    static const long jumps[] = {0, 86400, -63072000, 3601, -1500000000, -3600, 40000000};
    static unsigned calls;
    return jumps[__atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) % (sizeof jumps / sizeof *jumps)];
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}
time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose clock jumps; skipped where nothing compiles C."""
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(JUMPING)
    library = folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c"), "-ldl"], check=True)
    return {**ENVIRONMENT, "LD_PRELOAD": str(library)}


@pytest.mark.fault("M94", "killed and resumed, moved aside and supervised, a run is the same; durations stay true")
@pytest.mark.slow
def test_clocks_that_jump_change_nothing(
    recipe: Path, undisturbed: tuple[object, ...], jumping_clock: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = tmp_path / "kill_at.py"
    script.write_text(KILL_AT)

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        told = [sys.executable, *arguments, f"output.dir={run}", "output.save_every_minutes=1000"]
        return subprocess.run(told, env=jumping_clock, capture_output=True, text=True, timeout=400, check=False)

    jumped = start("-c", "import time; print(sorted({int(time.time()) // 10**6 for _ in range(7)}))")
    assert len(json.loads(jumped.stdout)) >= 4, "the clock does not jump"
    began = time.monotonic()
    assert start(str(script), "5", str(recipe)).returncode == KILLED
    resumed = start("-m", "qwentune.cli", "train", str(recipe))
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 3" in resumed.stderr
    assert result(run) == undisturbed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["seconds"] < time.monotonic() - began for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    for _ in range(2):  # whatever time it is by the clock, the old run finds a name that is free
        fresh = start("-m", "qwentune.cli", "train", str(recipe), "--fresh", "optimizer.max_steps=1")
        assert fresh.returncode == 0, fresh.stderr
    assert len(list(tmp_path.glob("run*"))) == 3


# --- temporary folders


def leave_reports(folder: Path) -> Path:
    """What a supervisor that was killed leaves in a folder for temporary files."""
    code = "import os, signal\nfrom qwentune.training.reports import folder_of_reports as reports\n"
    code += "with reports() as folder:\n (folder / 'exit-0').touch()\n os.kill(os.getpid(), signal.SIGKILL)\n"
    before = set(folder.iterdir())
    killed = subprocess.run([sys.executable, "-c", code], env={**ENVIRONMENT, "TMPDIR": str(folder)}, check=False)
    assert killed.returncode == KILLED
    (left,) = set(folder.iterdir()) - before
    return left


@pytest.mark.fault("M96", "swept by the next supervisor of the same user; another user's, a live one's, a link: never")
def test_what_killed_supervisors_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = leave_reports(tmp_path)
    number = left.name.removeprefix(reports.PREFIX).split("-")[0]
    spared = [tmp_path / f"{reports.PREFIX}{number}-{name}" for name in ("unmarked", "link")]
    spared[0].mkdir()
    (spared[0] / "thesis.txt").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARK).touch()
    spared[1].symlink_to(tmp_path / "elsewhere")
    if IS_ROOT:
        spared.append(tmp_path / f"{reports.PREFIX}{number}-another")
        shutil.copytree(left, spared[-1])
        os.chown(spared[-1], SOMEONE, SOMEONE)
    with reports.folder_of_reports() as first, reports.folder_of_reports() as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first.stat().st_mode & 0o777 == 0o700
        assert not left.exists()
        # One whose process id is known nowhere is held all the same, as one in another container is.
        held = first.rename(tmp_path / f"{reports.PREFIX}{number}-held")
        with reports.folder_of_reports():
            assert held.is_dir()
        held.rename(first)
    assert not first.exists()
    assert all(path.exists() for path in spared)
    assert (tmp_path / "elsewhere" / MARK).exists()


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a folder to another user")
@pytest.mark.fault("M96", "a folder of reports that is another user's: refused, exit 2, nothing is written into it")
def test_reports_of_another_user_are_refused(tmp_path: Path, warm: Warm) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, SOMEONE, SOMEONE)
    refused = warm.train(write_recipe(tmp_path, "builtin:tiny-qwen3"), **{reports.FOLDER: str(theirs)})
    assert refused.code == 2, refused.said
    assert "belongs to another user" in refused.said
    assert list(theirs.iterdir()) == []


# --- a million rows

COUNT_ROWS = """
import json, resource, sys, time
from pathlib import Path
from qwentune.data.layout.batch import TrainBatches
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.schedule import Schedule
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.recipe import load_recipe
recipe = load_recipe(sys.argv[1]).recipe
tokenizer = load_tokenizer(Path(recipe.model))
before = time.process_time()
dataset = prepare(recipe.data, tokenizer, chat_template(recipe.data, tokenizer), recipe.seed)
rows = dataset.train
schedule = Schedule.of(rows.per_epoch, recipe.batch, recipe.optimizer, recipe.seed)
batches = TrainBatches(rows, schedule, 1, recipe.batch.sequences_per_step, 0, 1)
for k in range(200):
    batches[k]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
told = {"seconds": time.process_time() - before, "peak": peak, "report": len(json.dumps(dataset.report))}
print(json.dumps({**told, "examples": len(dataset.examples), "dropped": len(dataset.dropped)}))
"""


def counted(folder: Path, model: Path, num_rows: int) -> dict[str, Any]:
    """What it costs to render so many rows, of which one in fifty is too long, and to begin with them."""
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(num_rows):
            said = f"add {i} and {i % 97}" + " and one" * (100 * (i % 50 == 0))
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"it is {i + i % 97}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    recipe = write_recipe(folder, model, data={"max_tokens": 128, "eval_fraction": 0.01})
    environment = {**ENVIRONMENT, "QWENTUNE_CACHE": str(folder / "cache")}
    told = subprocess.run(
        [sys.executable, "-c", COUNT_ROWS, str(recipe)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.fault("M95", "time for each row as with ten thousand; half a kilobyte of memory for each; a short report")
@pytest.mark.soak
def test_a_million_rows_cost_a_hundred_times_ten_thousand(tmp_path: Path, qwen3_folder: Path) -> None:
    few, many = (counted(tmp_path / str(rows), qwen3_folder, rows) for rows in (10_000, 1_000_000))
    print(f"10,000 rows: {few}\n1,000,000 rows: {many}")
    assert many["examples"] + many["dropped"] == 1_000_000
    assert many["seconds"] / 1e6 < 1.5 * few["seconds"] / 1e4
    assert (many["peak"] - few["peak"]) / 1e6 < 700
    assert many["report"] < few["report"] + 500
