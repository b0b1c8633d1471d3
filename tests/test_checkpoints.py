"""A checkpoint is whole or not there; a damaged one is named and an older one taken."""

from pathlib import Path

import pytest

from qwentune.errors import Problem, ResumeError, RunInUseError
from qwentune.training.checkpoints import MANIFEST, Checkpoint, Checkpoints, open_checkpoint, verify
from qwentune.training.run_folder import RunFolder
from qwentune.training.start import move_aside


def publish(checkpoints: Checkpoints, step: int, content: str = "weights") -> Path:
    written = checkpoints.staging(step) / f"checkpoint-{step}"
    (written / "shards").mkdir(parents=True)
    (written / "model.safetensors").write_text(f"{content} {step}")
    (written / "shards" / "rank0").write_text("state")
    return checkpoints.publish(written, step, {"run": {"seed": 1}})


def test_a_published_checkpoint_verifies_and_is_latest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    folder = publish(checkpoints, 10)
    assert verify(folder) == Checkpoint(folder, 10, {"run": {"seed": 1}})
    assert (tmp_path / "latest").read_text() == "checkpoints/step-10\n"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10"]


def test_only_the_newest_are_kept_and_the_spared_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        publish(checkpoints, step)
    written = checkpoints.staging(4) / "checkpoint-4"
    written.mkdir(parents=True)
    (written / "a").write_text("a")
    checkpoints.publish(written, 4, {}, spared=frozenset({2}))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-2", "step-3", "step-4"]


@pytest.mark.fault("B10 B11 B12", "the damaged file is named with sizes or hash, and the checkpoint before it is taken")
@pytest.mark.parametrize("name", ["model.safetensors", "shards/rank0", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    publish(checkpoints, 10)
    victim = publish(checkpoints, 20) / name
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        victim.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    newest, skipped = checkpoints.newest()
    assert newest is not None
    assert newest.step == 10
    assert len(skipped) == 1
    assert "step-20" in skipped[0].where


@pytest.mark.fault("B11", "one bit of a manifest flips: the checkpoint is passed over, whatever the bit stood for")
def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path: Path) -> None:
    manifest = publish(Checkpoints(tmp_path, keep=3), 10) / MANIFEST
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        for bit in (1, 2, 16):  # another digit, another letter, another kind of character
            manifest.write_bytes(content[:place] + bytes([byte ^ bit]) + content[place + 1 :])
            assert isinstance(verify(manifest.parent), Problem), (place, bit)


@pytest.mark.fault("B13", "folders and files that only look like checkpoints are passed over")
def test_what_is_no_checkpoint_is_ignored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    publish(checkpoints, 10)
    (checkpoints.folder / "step-99x").mkdir()
    (checkpoints.folder / "step-30").write_text("a file")
    newest, skipped = checkpoints.newest()
    assert newest is not None
    assert (newest.step, skipped) == (10, [])


@pytest.mark.fault("B15", "passed over: its manifest says another step")
def test_a_checkpoint_under_another_step_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    publish(checkpoints, 10).rename(checkpoints.published(50))
    newest, skipped = checkpoints.newest()
    assert newest is None
    assert "step 10" in skipped[0].what


def test_later_checkpoints_are_set_aside_where_a_run_goes_on_from_an_older_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (20, 30, 40):
        publish(checkpoints, step)
    moved = checkpoints.set_aside(30)
    assert [folder.name.startswith("aside-step-40") for folder in moved] == [True]
    publish(checkpoints, 35, "another attempt")
    newest, _ = checkpoints.newest()
    assert newest is not None
    assert newest.step == 35
    assert moved[0].is_dir()


def test_what_was_just_published_is_never_rotated_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (20, 30, 25):
        publish(checkpoints, step)
    assert checkpoints.published(25).is_dir()


def test_a_run_folder_in_use_is_not_moved_aside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.lock(), pytest.raises(RunInUseError):
        move_aside(run)
    moved = move_aside(run)
    assert moved is not None
    assert moved.is_dir()
    assert not run.path.exists()


@pytest.mark.fault("A04 A05", "leftovers are swept, `latest` is mended")
def test_leftovers_are_swept_and_latest_is_mended(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    publish(checkpoints, 10)
    checkpoints.staging(20).mkdir()
    (checkpoints.folder / ".trash-step-5").mkdir()
    (tmp_path / "latest").write_text("checkpoints/step-5\n")
    checkpoints.sweep()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10"]
    assert (tmp_path / "latest").read_text() == "checkpoints/step-10\n"


def test_a_named_checkpoint_must_verify(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="never finished"):
        open_checkpoint(tmp_path)
