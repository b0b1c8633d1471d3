"""What an installed wheel does from an empty folder: it plans the shipped recipes, quickly and without torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU_SECONDS = 2.0
TORCH_WAS_IMPORTED = 99
# Python runs this at its start: a process that has imported torch ends with a code of its own.
GUARD = f"""
import atexit, os, sys
atexit.register(lambda: "torch" in sys.modules and os._exit({TORCH_WAS_IMPORTED}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip("wheel", "--no-deps", *isolation, "-w", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing of the source tree."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", str(folder), str(wheel))
    (folder / "sitecustomize.py").write_text(GUARD)
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "QWENTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def test_the_wheel_holds_every_shipped_file_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "launch", "data_templates"):
        files = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert files
        assert {f"qwentune/{file}" for file in files} <= names
    ours = (file for file in (ROOT / "qwentune").rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert {file.relative_to(ROOT).as_posix() for file in ours} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"qwentune"}


def test_the_guards_of_these_tests_work(site: Path, tmp_path: Path) -> None:
    assert run(site, tmp_path, "-c", "import torch").returncode == TORCH_WAS_IMPORTED
    found = run(site, tmp_path, "-c", "import qwentune; print(qwentune.__file__)").stdout
    assert Path(found.strip()).is_relative_to(site)


def test_a_recipe_that_does_not_fit_is_refused_with_changes_that_do(site: Path, tmp_path: Path) -> None:
    arguments = ["-m", "qwentune.cli", "plan", "recipes/qwen3-8b-full.yaml", "--gpu", "rtx-4090"]
    refused = run(site, tmp_path, *arguments)
    assert (refused.returncode, refused.stderr) == (4, "")
    mends = json.loads(run(site, tmp_path, *arguments, "--json").stdout)["mends"]
    assert mends
    for mend in mends:
        assert mend["change"] in refused.stdout
        mended = run(site, tmp_path, *arguments[:4], *mend["overrides"], *arguments[4:], "--json")
        assert mended.returncode == 0, mend
        assert json.loads(mended.stdout)["fits"] is True


def test_a_recipe_that_fits_is_planned_in_under_two_seconds(site: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    planned = run(
        site, tmp_path, "-m", "qwentune.cli", "plan", "recipes/qwen3-8b-qlora.yaml", "--gpu", "rtx-4090", "--json"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert json.loads(planned.stdout)["fits"] is True
    # Of processor time: other tests may keep the machine busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS


def test_the_console_script_and_the_module_print_the_same_plan(site: Path, tmp_path: Path) -> None:
    arguments = ["plan", "recipes/qwen3-8b-qlora.yaml", "--gpu", "rtx-4090"]
    script, module = (
        run(site, tmp_path, str(site / "bin/qwentune"), *arguments),
        run(site, tmp_path, "-m", "qwentune.plan", *arguments[1:]),
    )
    assert (script.returncode, module.returncode) == (0, 0)
    assert script.stdout == module.stdout != ""


def test_the_shipped_rows_are_previewed_without_torch(site: Path, tmp_path: Path) -> None:
    previewed = run(site, tmp_path, "-m", "qwentune.cli", "preview", "recipes/quickstart.yaml", "--json")
    assert previewed.returncode == 0, previewed.stderr
    assert json.loads(previewed.stdout)["samples"] == 12
