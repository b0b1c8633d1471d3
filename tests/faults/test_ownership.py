"""Whose folder is it? Nothing is removed or replaced that qwentune did not write, whatever its name."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwentune
from qwentune import preview, supervise, train
from qwentune.durable import MARK, mark, move_aside, read_mark, remove, replace_folder
from qwentune.errors import UsageError
from qwentune.training.checkpoints import verify
from qwentune.training.command_line import Request
from qwentune.training.run_folder import RunFolder
from qwentune.training.start import move_aside as fresh
from tests.faults.test_folder import publish, start, trained_run
from tests.faults.test_save import killed_at
from tests.runs import write_recipe

PACKAGE = Path(qwentune.__file__).parent
REMOVES = {"rmtree", "rmdir", "removedirs", "rename", "renames", "move", "unlink"}
OF_OS = {"remove", "replace"}  # texts, and our own door, have these too
STATUS = {"state": "finished", "exit": 0, "reason": "", "step": 6, "resume_command": "qwentune train recipe.yaml"}


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- which folder is a run's


@pytest.mark.fault("K78", "a project with a `status.json`, `.lock` or `model/` of its own: refused, nothing is touched")
@pytest.mark.parametrize(
    "status",
    ["", "{}", "[1]", '{"state": "finished"}', json.dumps({**STATUS, "resume_command": "make"}), json.dumps(7)],
)
def test_a_project_that_looks_like_a_run_is_refused(tmp_path: Path, status: str) -> None:
    for name in (".lock", "README.md", "recipe.yaml", "plan.json", "model/weights", "checkpoints/.trash-1/mine"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("mine")
    (tmp_path / "project" / "status.json").write_text(status)
    before = files(tmp_path)
    run = RunFolder(tmp_path / "project")
    with pytest.raises(UsageError, match=r"holds 7 other things, such as '\.lock', and no run"), run.lock():
        pass
    with pytest.raises(UsageError, match="no run"):
        fresh(run)
    run.mark_lost("the launcher was killed", 1, ["train"])
    assert run.stored_plan() is None
    assert files(tmp_path) == before


@pytest.mark.fault("K78", "refused before anything is planned, rendered or loaded")
@pytest.mark.parametrize(
    "run",
    [
        lambda recipe: train.run(Request(recipe, (), "auto", False, (), False)),
        lambda recipe: supervise.run(Request(recipe)),
    ],
    ids=["train", "supervise"],
)
def test_a_strangers_folder_is_refused_first(tmp_path: Path, run: Callable[[str], int]) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "status.json").write_text("{}")
    recipe = write_recipe(tmp_path, "no/model", output={"dir": str(tmp_path / "project")})  # which is looked for later
    with pytest.raises(UsageError, match="and no run"):
        run(str(recipe))


@pytest.mark.fault("K78", "a folder of files that we wrote, such as an adapter or a checkpoint, is no run's: refused")
def test_what_a_run_wrote_is_no_run_folder(tmp_path: Path) -> None:
    _, checkpoints = trained_run(tmp_path / "run", 6)
    mark(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", checkpoints.published(6), checkpoints.folder):
        with pytest.raises(UsageError, match="no run"), RunFolder(folder).lock():
            pass


@pytest.mark.fault("B16", "the folder of a run by an earlier version is known by its status and taken on")
def test_a_run_of_before_marks_is_taken_on(tmp_path: Path) -> None:
    run, checkpoints = trained_run(tmp_path / "run", 6)
    run.set_status("failed", exit_code=1, reason="", step=6, command=["qwentune", "train", "recipe.yaml"])
    for marked in [*tmp_path.rglob(MARK)]:
        marked.unlink()
    manifest = checkpoints.published(6) / "manifest.json"
    shutil.rmtree(checkpoints.published(6))
    publish(checkpoints, 6)
    (run.path / "tracker_id.txt").write_text("7f3a\n")
    with run.lock():
        assert start(run, checkpoints, num_steps=9).step == 6
    found = read_mark(run.path)
    assert found is not None
    assert (found.what, found.run) == ("run", "7f3a"), "its trackers know it under that name"
    assert manifest.is_file()


@pytest.mark.fault("B16", "the folder of a run by a later version is refused, exit 2")
def test_a_run_of_a_later_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(json.dumps({"written_by": "qwentune", "what": "run", "layout": 99, "run": "1"}))
    with pytest.raises(UsageError, match=r"by a later version \(layout 99; this one writes 1\)"):
        RunFolder(tmp_path).refuse_other_things()


def test_a_first_start_that_was_killed_leaves_a_folder_that_the_next_takes(tmp_path: Path) -> None:
    for operation in count():
        run = RunFolder(tmp_path / str(operation))
        run.path.mkdir()

        def hold(run: RunFolder = run) -> None:
            with run.lock():
                pass

        was_killed = killed_at(operation, hold)
        hold()
        assert read_mark(run.path) is not None
        if not was_killed:
            break


STARTS = """
import sys, time
from pathlib import Path
from qwentune.errors import RunInUseError
from qwentune.training.run_folder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunFolder(Path(sys.argv[1])).lock():
        time.sleep(0.3)
except RunInUseError:
    sys.exit(7)
"""


@pytest.mark.fault("K77", "two first starts in one new folder at once: one runs, the other is refused, exit 7")
def test_two_first_starts_at_once_are_one(tmp_path: Path) -> None:
    for attempt in range(3):
        command = [sys.executable, "-c", STARTS, str(tmp_path / str(attempt))]
        both = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in both:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=300)[1] for process in both]
        assert sorted(process.returncode for process in both) in ([0, 7], [0, 0]), said  # one may come after the other


@pytest.mark.fault("K77", "a folder that another start is marking at this moment is taken for what it becomes")
def test_a_folder_that_is_being_marked_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".qwentune.json.writing").write_text("")
    with pytest.raises(UsageError, match="and no run"):
        RunFolder(tmp_path).refuse_other_things()
    marking = threading.Timer(0.2, mark, [tmp_path, "run"])
    marking.start()
    RunFolder(tmp_path).refuse_other_things()
    marking.join()


@pytest.mark.fault("K78", "a mark or a manifest nested without end is none of ours")
def test_a_mark_that_is_nested_without_end_is_none(tmp_path: Path) -> None:
    for name in (MARK, "manifest.json"):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(UsageError, match="no run"):
            RunFolder(folder).refuse_other_things()
        assert "manifest" in str(verify(folder))
        assert remove(folder) is not None


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    names = set()
    for _ in range(2):
        with run.lock():
            names.add(read_mark(run.path))
    assert len(names) == 1


# --- what may be removed


@pytest.mark.fault("K78", "trees of generic names that no run wrote are moved aside, named, and never removed")
def test_trees_that_no_run_wrote_are_moved_aside(tmp_path: Path) -> None:
    run, checkpoints = trained_run(tmp_path / "run", 6)
    for tree in (".saving-9", ".trash-step-3", "step-7", "step-9"):
        (checkpoints.folder / tree).mkdir()
        (checkpoints.folder / tree / "precious").write_text(tree)
    (checkpoints.folder / ".trash-notes").write_text("mine")
    begun = start(run, checkpoints, num_steps=12)
    assert (checkpoints.folder / ".trash-notes").read_text() == "mine"
    assert sum("which no run wrote, aside" in message for message in begun.messages) == 2
    publish(checkpoints, 9)
    for step in (10, 11, 12):
        publish(checkpoints, step)  # which rotates all older ones away
    kept = [path.read_text() for path in checkpoints.folder.rglob("precious")]
    assert sorted(kept) == [".saving-9", ".trash-step-3", "step-7", "step-9"]
    assert not (checkpoints.published(6)).exists()


@pytest.mark.fault("K78", "weights in the place of the published ones that no run wrote are moved aside")
def test_weights_that_no_run_wrote_are_moved_aside(tmp_path: Path) -> None:
    for name in ("model", ".model.old", ".model.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    moved = remove(tmp_path / ".model.writing")
    assert moved is not None
    assert moved.name.startswith("aside-model.writing-")
    mark(tmp_path / ".model.writing")
    aside = replace_folder(tmp_path / ".model.writing", tmp_path / "model")
    assert aside is not None
    assert files(aside) == {"weights": "model"}
    assert sorted(path.read_text() for path in tmp_path.rglob("weights")) == [".model.old", ".model.writing", "model"]
    assert read_mark(tmp_path / "model") is not None


@pytest.mark.fault("A05", "killed while a folder is removed: what is left is still known as ours, and goes")
def test_what_a_kill_leaves_of_a_removed_folder_is_ours(tmp_path: Path) -> None:
    for operation in count():
        folder = tmp_path / str(operation)
        mark(folder)
        (folder / "shards").mkdir()
        for name in ("a", "shards/b"):
            (folder / name).touch()
        was_killed = killed_at(operation, lambda: remove(folder))  # noqa: B023 - runs at once
        if folder.exists():
            assert remove(folder) is None
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("aside")] == []
        if not was_killed:
            break


names = st.sampled_from(["a", "manifest.json", "config.json", ".qwentune.json", "sub/b", "model/weights", ".lock"])


@given(tree=st.dictionaries(names, st.sampled_from(["", "{}", "[]", "mine", '{"schema": 2}']), min_size=1))
def test_no_unmarked_tree_is_ever_removed(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, str]) -> None:
    folder = tmp_path_factory.mktemp("trees")
    for name, text in tree.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(text)
    aside = remove(folder / "tree")
    assert aside is not None
    assert files(aside) == tree


def test_a_run_folder_is_never_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "adapter").lock():
        pass
    aside = remove(tmp_path / "adapter")
    assert aside is not None
    assert (aside / MARK).is_file()


@pytest.mark.fault("K81", "each moves the run aside under a name of its own")
def test_fresh_starts_within_a_second_have_names_of_their_own(tmp_path: Path) -> None:
    moved = set()
    for _ in range(3):
        run, _ = trained_run(tmp_path / "run", 6)
        moved.add(fresh(run))
        assert not run.path.exists()
    assert len(moved) == 3
    assert all(path is not None and (path / "checkpoints" / "step-6").is_dir() for path in moved)
    (tmp_path / "run").mkdir()
    assert fresh(RunFolder(tmp_path / "run")) is None, "there is nothing to keep"


def test_a_link_is_moved_itself(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert move_aside(tmp_path / "link", "other").is_symlink()
    assert (tmp_path / "target").is_dir()


@pytest.mark.fault("K78", "a preview that would be written over its recipe, template or data: refused, exit 2")
@pytest.mark.parametrize("name", ["recipe.yaml", "./rows.jsonl", "template.jinja", "link.jsonl"])
@pytest.mark.parametrize("option", ["jsonl", "html"])
def test_a_preview_is_not_written_over_what_it_reads(
    tmp_path: Path, name: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3", data={"chat_template": "template.jinja"})
    before = files(tmp_path)
    outputs: dict[str, Path | None] = {"jsonl": None, "html": None, option: Path(name)}
    with pytest.raises(UsageError, match=f"--{option}  '.*{Path(name).name}' is what the preview reads"):
        preview.run(str(recipe), [], None, **outputs, as_json=False, strict=False)
    assert files(tmp_path) == before


# --- one door


def removing_calls(path: Path) -> list[tuple[str, str]]:
    """Function and call, for each call in a file that removes or renames."""
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner, name = ast.unparse(node.func.value), node.func.attr
                    is_path_replace = name == "replace" and len(node.args) == 1 and not node.keywords
                    if name in REMOVES or (name in OF_OS and owner == "os") or is_path_replace:
                        found.append((function.name, f"{owner}.{name}"))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_module_removes_or_renames(path: Path) -> None:
    if path.name != "durable.py":
        assert removing_calls(path) == []
    else:
        of_trees = {function for function, call in removing_calls(path) if call.endswith(("rmtree", "rmdir"))}
        assert of_trees == {"remove"}
        (function,) = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "name", "") == "remove"]
        source = ast.unparse(function)
        assert "if not is_ours(path):\n        return move_aside(path)" in source
        assert source.index("is_ours") < source.index("rmtree")
