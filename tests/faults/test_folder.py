"""The run folder: publication is whole, links are not followed, other people's files and secrets stay out of it."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune import console
from qwentune.durable import mark, replace_folder, write_text
from qwentune.errors import RecipeError, ResumeError, UsageError
from qwentune.exporting.finished import open_run
from qwentune.recipe import load_recipe
from qwentune.redaction import HIDDEN, redact
from qwentune.training.checkpoints import MANIFEST, Checkpoints, verify
from qwentune.training.run_folder import RunFolder
from qwentune.training.start import Start, choose_start
from tests.faults.test_save import killed_at
from tests.runs import write_recipe

FACTS = {"seed": 1}
SECRETS = ("hf_" + "aBcD1234" * 4, "sk-proj-" + "aBcD1234" * 4, "ghp_" + "aBcD1234" * 5)


def publish(checkpoints: Checkpoints, step: int) -> Path:
    checkpoints.begin(step)
    written = checkpoints.staging(step) / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_text(f"weights {step}")
    (written / "trainer_state.json").write_text('{"best_global_step": null, "log_history": []}')
    return checkpoints.publish(written, step, {"run": FACTS, "versions": {"torch": "1"}})


def trained_run(folder: Path, *steps: int) -> tuple[RunFolder, Checkpoints]:
    run, checkpoints = RunFolder(folder), Checkpoints(folder, keep=3)
    with run.lock():
        for step in steps:
            publish(checkpoints, step)
        (folder / "model").mkdir()
        run.set_status("finished", exit_code=0, reason="", step=steps[-1], command=["train"])
    return run, checkpoints


def start(run: RunFolder, checkpoints: Checkpoints, num_steps: int) -> Start:
    return choose_start(
        run,
        checkpoints,
        FACTS,
        resume="auto",
        allowed=[],
        num_steps=num_steps,
        patience=None,
        followed="loss",
        versions={"torch": "2"},
    )


# --- publication


@pytest.mark.fault("E33", "a finished run says that it is complete, exit 0")
def test_a_finished_run_is_complete(tmp_path: Path) -> None:
    begun = start(*trained_run(tmp_path / "run", 6), num_steps=6)
    assert begun.complete
    assert "already complete" in begun.messages[0]


@pytest.mark.fault("A06", "killed before the new weights are published: the old ones are not taken for them")
def test_the_weights_of_a_shorter_run_are_not_taken_for_those_of_the_longer_one(tmp_path: Path) -> None:
    run, checkpoints = trained_run(tmp_path / "run", 6)
    publish(checkpoints, 10)  # the run went on to step 10 and was killed before it published them
    begun = start(run, checkpoints, num_steps=10)
    assert (begun.step, begun.trained, begun.complete) == (10, True, False)


@pytest.mark.fault("A06", "killed at any file operation of a publication: the old weights, the new ones, or none")
def test_a_folder_is_replaced_whole_wherever_the_process_dies(tmp_path: Path) -> None:
    def replace(folder: Path) -> None:
        written = folder / ".adapter.writing"
        mark(written)
        for name in ("a", "b"):
            (written / name).write_text("new")
        replace_folder(written, folder / "adapter")

    seen: set[str | None] = set()
    for operation in count():
        folder = tmp_path / str(operation)
        mark(folder / "adapter")
        for name in ("a", "b"):
            (folder / "adapter" / name).write_text("old")
        was_killed = killed_at(operation, lambda: replace(folder))  # noqa: B023 - runs at once
        content = {path.read_text() for path in folder.glob("adapter/[ab]")}
        assert len(content) <= 1, "half old, half new"
        assert len(list(folder.glob("adapter/[ab]"))) in (0, 2)
        seen |= {content.pop() if content else None}
        if not was_killed:
            break
        shutil.rmtree(folder / ".adapter.writing", ignore_errors=True)  # as the next publication does
        replace(folder)
        assert {path.read_text() for path in folder.glob("adapter/[ab]")} == {"new"}
        assert [path.name for path in folder.iterdir()] == ["adapter"]
    assert {"old", "new"} <= seen


# --- what cannot be resumed


@pytest.mark.fault("F42", "refused: nothing is left to do, exit 5")
def test_fewer_steps_than_are_done_already_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"(?s)step-6.*after the 4 steps.*--fresh"):
        start(*trained_run(tmp_path / "run", 3, 6), num_steps=4)


@pytest.mark.fault("B16", "a checkpoint of another layout names the two versions")
def test_a_checkpoint_of_another_layout_names_both(tmp_path: Path) -> None:
    folder = publish(Checkpoints(tmp_path, keep=3), 10)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    found = verify(folder)
    assert "layout 99" in str(found)
    assert "reads layout 2" in str(found)


@pytest.mark.fault("B16", "a checkpoint of another version of torch is taken, and both versions are said")
def test_other_versions_are_said(tmp_path: Path) -> None:
    begun = start(*trained_run(tmp_path / "run", 6), num_steps=8)
    assert any("written with torch 1, now 2: rounding may differ" in message for message in begun.messages)


@pytest.mark.fault("A04 B11", "the newest is damaged: `latest` names the one that is taken")
def test_latest_names_the_checkpoint_that_is_taken(tmp_path: Path) -> None:
    run, checkpoints = trained_run(tmp_path / "run", 6, 9)
    (checkpoints.published(9) / "model.safetensors").write_text("weights 8")
    assert start(run, checkpoints, num_steps=12).step == 6
    assert (run.path / "latest").read_text() == "checkpoints/step-6\n"


@pytest.mark.fault("B13", "folders and files that only look like checkpoints are passed over")
@pytest.mark.parametrize("name", ["step-99x", "step-", "step--3", "checkpoint-99", "step-30"])
def test_an_empty_folder_or_a_file_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    publish(checkpoints, 10)
    if name == "step-30":
        (checkpoints.folder / name).touch()
    else:
        (checkpoints.folder / name).mkdir()
    newest, skipped = checkpoints.newest()
    assert newest is not None
    assert (newest.step, skipped) == (10, [])


# --- links and other people's files


@pytest.mark.fault("J74", "links in the run folder are replaced, never followed: what they point to stays as it is")
def test_links_are_replaced_and_what_they_point_to_is_untouched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("file", "lock", "status", "latest", "metrics"):
        (outside / name).write_text("precious")
    run, checkpoints = RunFolder(tmp_path / "run"), Checkpoints(tmp_path / "run", keep=1)
    checkpoints.folder.mkdir(parents=True)
    mark(run.path, "1")
    (run.path / ".lock").symlink_to(outside / "lock")
    (run.path / "status.json").symlink_to(outside / "status")
    (run.path / ".status.json.qwentune-new").symlink_to(outside / "status")
    (run.path / "latest").symlink_to(outside)
    (run.path / "metrics.jsonl").symlink_to(outside / "metrics")
    (checkpoints.folder / ".saving-2").symlink_to(outside)
    (checkpoints.folder / ".trash-step-1").symlink_to(outside)

    with run.lock():
        checkpoints.sweep()
        run.rewind(0)
        run.append("metrics.jsonl", {"step": 1})
        run.set_status("running", exit_code=None, reason="", step=0, command=[])
        shutil.copytree(publish(checkpoints, 1), outside / "step-1")
        shutil.rmtree(checkpoints.published(1))
        checkpoints.published(1).symlink_to(outside / "step-1")
        publish(checkpoints, 2)  # rotates step 1, a link, away
    names = {path.name for path in outside.iterdir()}
    assert names == {"file", "lock", "status", "latest", "metrics", "step-1"}
    assert {path.read_text() for path in outside.iterdir() if path.is_file()} == {"precious"}
    assert not [path for path in run.path.rglob("*") if path.is_symlink()]


@pytest.mark.fault("J74", "an export or a publication replaces a link, not its target")
def test_a_link_in_the_place_of_the_weights_is_replaced(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / "adapter").symlink_to(outside)
    written = tmp_path / ".adapter.writing"
    written.mkdir()
    replace_folder(written, tmp_path / "adapter")
    assert not (tmp_path / "adapter").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["precious"]


@pytest.mark.fault("K78", "a folder that holds other things is no run folder: refused, exit 2")
def test_a_folder_of_other_things_is_neither_written_nor_moved(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 1 other thing, such as 'README.md'"), RunFolder(folder).lock():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no folder"), RunFolder(tmp_path / "file").lock():
        pass
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    (tmp_path / "empty").mkdir()
    with RunFolder(tmp_path / "empty").lock():
        pass


@pytest.mark.fault("A09", "a file is on disk before it takes its name")
def test_a_text_is_replaced_whole_wherever_the_process_dies(tmp_path: Path) -> None:
    for operation in count():
        path = tmp_path / str(operation)
        path.write_text("old")
        was_killed = killed_at(operation, lambda: write_text(path, "new"))  # noqa: B023 - runs at once
        assert path.read_text() in ("old", "new")
        if not was_killed:
            assert path.read_text() == "new"
            break


# --- files that are torn or damaged

RECORDS = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
damaged = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(str.encode),
    st.sampled_from(
        ["null", "[]", "{}", "3", '{"step": "x"}', '{"step": null, "state": 5}', '{"state": "running"}', "[" * 9999, ""]
    ).map(str.encode),
    st.integers(0, 150).map(lambda length: "".join(RECORDS).encode()[:length]),
)


@pytest.mark.fault(
    "C90", "a torn or damaged record, status, plan or report: what can be read of it counts, the rest is said"
)
@given(content=damaged, before=st.booleans(), step=st.integers(0, 6))
def test_a_run_folder_with_any_damaged_file_can_be_read_and_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, before: bool, step: int
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    mark(run.path, "1")
    (run.path / "model").mkdir()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run.path / name).write_bytes("".join(RECORDS[:3]).encode() * before + content)
    for name in ("status.json", "plan.json", "data_report.json", "tracker_id.txt"):
        (run.path / name).write_bytes(content)
    assert run.finished_step() is None or isinstance(run.finished_step(), int)
    assert isinstance(run.stored_plan(), dict | None)
    run.reached_step()
    with pytest.raises(UsageError, match=r"data_report\.json"):
        open_run(run.path)
    run.rewind(step)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= step for line in lines)
    assert len(lines) >= min(step, 3) * before
    run.mark_lost("lost", 1, ["qwentune", "train", "r.yaml"])
    assert isinstance(json.loads((run.path / "status.json").read_text()), dict)


def test_lines_of_a_record_that_cannot_be_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(RECORDS[0] + '{"step": 2, "lo\n' + RECORDS[2] + '{"step": 4, "lo')
    assert run.reached_step() == 3
    run.rewind(9)
    assert "1 lines of" in capsys.readouterr().err  # the last was torn as it was written
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


# --- secrets


@pytest.mark.fault("J75", "a token in a recipe is refused by its place, exit 2, and not repeated")
@pytest.mark.parametrize("secret", [*SECRETS, "https://me:pass-word@host/rows.jsonl"])
def test_a_token_in_a_recipe_is_refused_without_being_shown(tmp_path: Path, secret: str) -> None:
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3", data={"system": f"use {secret}"})
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  data.system holds what looks like a secret") as error:
        load_recipe(recipe)
    assert secret not in str(error.value)
    with pytest.raises(RecipeError, match="looks like a secret"):
        load_recipe(write_recipe(tmp_path, "builtin:tiny-qwen3", data={"system": "no"}), [f"model={secret}"])


@pytest.mark.fault("J75", "tokens and the values of HF_TOKEN and its like are left out of screen, log and run folder")
def test_secrets_are_left_out_of_what_is_said_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    run = RunFolder(tmp_path)
    for secret in (*SECRETS, "correct-horse-battery"):
        text = f"401 for {secret} at https://me:pass-word@host"
        assert redact(text) == f"401 for {HIDDEN} at https://{HIDDEN}@host"
        monkeypatch.setattr(console, "_log", tmp_path / "log.txt")
        console.say(text)
        run.write("dropped.jsonl", json.dumps({"reason": text}))
        said = capsys.readouterr().err + "".join(path.read_text() for path in tmp_path.iterdir())
        assert secret not in said
        assert said.count(HIDDEN) >= 4


def test_ordinary_words_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "learning")
    text = "hf_model sk-learn https://host:8080/path@3 learning ghp_short AKIA risk-averse-and-other-long-words"
    assert redact(text) == text
    assert os.environ["TOKENIZERS_PARALLELISM"] == "learning"
