"""Media that change, break, come and go: what is trained is what was rendered, or it is told with its row."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.layout.batch import collated
from qwentune.data.media import pixels
from qwentune.data.media.hashed import hashed
from qwentune.data.media.load import colours
from qwentune.data.media.look import look
from qwentune.data.sample import RowError
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError, DoesNotFitError, ResumeError
from qwentune.recipe import DataOptions
from tests.media.checkpoints import MediaType
from tests.media.files import picture, picture_bytes, sound_bytes, write_cut_video, write_video
from tests.media.oracle import Class
from tests.media.test_media_rows import limits, medium

KINDS = ["picture", "video", "frames", "sound"]


class Rows:
    """Two dialogues, of which the second shows a medium, for a class that takes it."""

    def __init__(self, folder: Path, classes: dict[str, Class], kind: str) -> None:
        self.folder = folder
        self.name: MediaType = "qwen2_audio" if kind == "sound" else "qwen2_5_vl"
        self.model = classes[self.name].folder
        self.file = folder / {"picture": "a.bmp", "video": "a.mp4", "frames": "1.png", "sound": "a.wav"}[kind]
        self.part: dict[str, Any] = {"type": "image", "image": "a.bmp"}
        if kind == "video":
            write_video(self.file, 8, 4)
            self.part = {"type": "video", "video": "a.mp4"}
        elif kind == "sound":
            self.file.write_bytes(sound_bytes(0.5))
            self.part = {"type": "audio", "audio": "a.wav"}
        elif kind == "frames":
            for k in range(3):
                (folder / f"{k}.png").write_bytes(picture_bytes(picture(56, 56, k)))
            self.part = {"type": "video", "video": ["0.png", "1.png", "2.png"]}
        else:
            self.file.write_bytes(picture_bytes(picture(56, 56), "BMP"))

    def prepared(self, part: dict[str, Any] | None = None, **data: Any) -> Dataset:
        """The rows as a command renders them, or finds them rendered."""
        texts = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It."}
        shown = {"role": "user", "content": [part or self.part, {"type": "text", "text": "What?"}]}
        rows = [{"messages": list(texts)}, {"messages": [shown, texts[1]]}]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = [{"path": str(self.folder / "rows.jsonl")}]
        options = DataOptions.model_validate({"train": train, "max_tokens": 4096, "max_dropped_fraction": 0.9, **data})
        tokenizer = load_tokenizer(self.model)
        return prepare(options, tokenizer, chat_template(options, tokenizer), 0)


@pytest.fixture
def rows_of(tmp_path: Path, classes: dict[str, Class], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Rows]:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    return lambda kind: Rows(tmp_path, classes, kind)


def flip(file: Path, *, quietly: bool) -> bytes:
    """Changes one byte in the middle of a file, which keeps its size, and its time where `quietly`; what it held."""
    before, state = file.read_bytes(), file.stat()
    changed = bytearray(before)
    changed[len(before) // 2] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + (0 if quietly else 10**9)))
    return before


def step(dataset: Dataset) -> Any:
    return collated(dataset.train, range(len(dataset.train)), 1.0)


@pytest.mark.fault("N97", "changed between two starts, told by its time: rendered again, and said with the row")
@pytest.mark.parametrize("kind", ["picture", "frames"])
def test_a_file_that_is_written_between_two_starts_is_rendered_again(
    rows_of: Callable[[str], Rows], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(kind)
    before = rows.prepared()
    content = picture_bytes(picture(56, 56, seed=9), "BMP" if kind == "picture" else "PNG")
    rows.file.write_bytes(content)
    after = rows.prepared()
    said = capsys.readouterr().err
    assert f"rows.jsonl:2: {rows.file} was written" in said
    assert after.content != before.content
    step(after)


@pytest.mark.fault("N97", "other bytes of the same size and time: the step that reads it names the row; exit 5")
@pytest.mark.parametrize("kind", KINDS)
def test_other_bytes_of_the_same_size_and_time_are_never_trained(
    rows_of: Callable[[str], Rows], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(kind)
    before = rows.prepared()
    held = flip(rows.file, quietly=True)
    found = rows.prepared()  # opens what was rendered: nothing tells yet
    with pytest.raises(ResumeError, match=r"rows\.jsonl:2 .*has changed since the data was rendered"):
        step(found)
    # The next start knows, and is not stuck with what was rendered: with the old file it goes on, with a new one it is
    # other data.
    state = rows.file.stat()
    rows.file.write_bytes(held)
    os.utime(rows.file, ns=(state.st_atime_ns, state.st_mtime_ns))
    capsys.readouterr()
    after = rows.prepared()
    assert "rows.jsonl:2: " in capsys.readouterr().err
    assert after.content == before.content
    step(after)
    assert capsys.readouterr().err == ""


@pytest.mark.fault("N98", "bytes of rows kept in the cache, damaged: the step names the row, the next start mends them")
@pytest.mark.parametrize("kind", ["picture", "frames"])
def test_what_the_cache_keeps_of_media_is_proved_and_mended(rows_of: Callable[[str], Rows], kind: str) -> None:
    rows = rows_of(kind)
    part = rows.part
    if kind == "picture":
        part = {"type": "image", "image": "data:;base64," + base64.b64encode(rows.file.read_bytes()).decode()}
    before = rows.prepared(part)
    (kept,) = (rows.folder / "cache" / "media").iterdir()
    flip(kept, quietly=True)
    found = rows.prepared(part)
    if kind == "picture":  # a list of frames is looked at when it is opened
        with pytest.raises(ResumeError, match=r"rows\.jsonl:2"):
            step(found)
    for damage in (lambda: None, lambda: kept.write_bytes(b"x"), kept.unlink):
        damage()
        again = rows.prepared(part)
        assert again.content == before.content
        step(again)


def test_a_file_that_is_written_while_it_is_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"before")
    reading = hashed(file)
    opened, _ = reading.__enter__()
    opened.read()
    file.write_bytes(b"after, longer")
    with pytest.raises(RowError, match="was written while it was read"):
        reading.__exit__(None, None, None)


@pytest.mark.fault("N99", "missing when a step reads it: its row, and that it is gone; exit 3")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_gone_before_a_step_is_told_with_its_row(rows_of: Callable[[str], Rows], kind: str) -> None:
    rows = rows_of(kind)
    dataset = rows.prepared()
    rows.file.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl:2 .*cannot be read: No such file"):
        step(dataset)


def test_threads_that_read_pictures_leave_the_warnings_of_the_process_alone(
    rows_of: Callable[[str], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = rows_of("picture").prepared()
    monkeypatch.setattr(warnings, "catch_warnings", None)
    step(dataset)


# ---------------------------------------------------------------------------------------------- left out, and mended


@pytest.mark.fault("N99", "rows left out for a file that is missing or broken are read when it is mended")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_row_that_was_left_out_comes_back_when_its_file_is_mended(
    rows_of: Callable[[str], Rows], kind: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(kind)
    whole = rows.file.read_bytes()
    if fault == "missing":
        rows.file.unlink()
    else:
        rows.file.write_bytes(whole[:20])
    without = rows.prepared(bad_rows="skip")
    assert len(without.examples) == 1
    capsys.readouterr()
    assert rows.prepared(bad_rows="skip").content == without.content
    assert capsys.readouterr().err == "", "found in the cache"
    rows.file.write_bytes(whole)
    mended = rows.prepared(bad_rows="skip")
    assert len(mended.examples) == 2
    assert "rows.jsonl:2 was left out" in capsys.readouterr().err
    step(mended)


def test_a_missing_file_may_come_where_it_is_looked_for_second(
    rows_of: Callable[[str], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, elsewhere = rows_of("picture"), rows_of("picture").folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    whole = rows.file.read_bytes()
    rows.file.unlink()
    assert len(rows.prepared(bad_rows="skip").examples) == 1
    (elsewhere / "a.bmp").write_bytes(whole)
    assert len(rows.prepared(bad_rows="skip").examples) == 2


@pytest.mark.fault("N99", "rows left out for an extra are read when it is installed")
@pytest.mark.parametrize(("kind", "module"), [("picture", "PIL.Image"), ("video", "av"), ("sound", "soundfile")])
def test_a_row_that_was_left_out_comes_back_when_the_extra_is_there(
    rows_of: Callable[[str], Rows], kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(kind)
    with monkeypatch.context() as without:
        for name in {module, module.partition(".")[0]}:
            without.setitem(sys.modules, name, None)
        assert len(rows.prepared(bad_rows="skip").examples) == 1
        assert len(rows.prepared(bad_rows="skip").examples) == 1
    assert len(rows.prepared(bad_rows="skip").examples) == 2


# ------------------------------------------------------------------------------------------------------- kept pixels


@pytest.mark.parametrize("kind", KINDS)
def test_kept_pixels_give_the_same_batches_and_are_decoded_once(
    rows_of: Callable[[str], Rows], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(kind)
    plain, kept = rows.prepared(), rows.prepared(media={"cache": "pixels"})
    assert kept.fingerprint == plain.fingerprint
    expected = as_bytes(step(plain))
    assert as_bytes(step(kept)) == expected
    if kind != "sound":
        monkeypatch.setattr(pixels, "colours", None)
    assert as_bytes(step(kept)) == expected


@pytest.mark.fault("N98", "kept pixels that are damaged, cut or removed: decoded again, with the same batches")
def test_kept_pixels_are_proved(rows_of: Callable[[str], Rows]) -> None:
    dataset = (rows := rows_of("video")).prepared(media={"cache": "pixels"})
    expected = as_bytes(step(dataset))
    (kept,) = (rows.folder / "cache" / "media").iterdir()
    whole = kept.read_bytes()
    for damage in (lambda: flip(kept, quietly=True), lambda: kept.write_bytes(whole[:-9]), kept.unlink):
        damage()
        assert as_bytes(step(dataset)) == expected
        assert kept.read_bytes() == whole


@pytest.mark.fault("C17", "a disk too small for the pixels that a recipe keeps: what they take, before a step; exit 4")
def test_what_kept_pixels_take_is_said_and_judged_before(
    rows_of: Callable[[str], Rows], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("frames")
    dataset = rows.prepared(media={"cache": "pixels"})
    assert "will hold 0.00 GiB of pixels, 0.00 of them there already" in capsys.readouterr().err
    state = shutil.disk_usage(rows.folder)._replace(free=9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: state)
    with pytest.raises(DoesNotFitError, match=r"data\.media\.cache .*GiB are free"):
        rows.prepared(media={"cache": "pixels"})
    step(dataset)
    rows.prepared(media={"cache": "pixels"})  # nothing is missing now


def as_bytes(batch: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------------------------------ damage


def mutated(content: bytes, random: Random) -> bytes:
    """The content with other bytes behind its header, as a bad disk or a download leaves it."""
    changed = bytearray(content)
    for _ in range(random.choice([1, 4, 40])):
        changed[random.randrange(len(changed) // 4, len(changed))] = random.randrange(256)
    return bytes(changed)


def opens_and_breaks(file: Path) -> bool:
    """Whether a decoder reads the header of a file, and fails at what follows."""
    try:
        if file.suffix == ".mp4":
            frames = av.open(str(file)).decode(video=0)
            next(frames)
            return fails(lambda: list(frames))
        return fails(Image.open(file).load)
    except Exception:
        return False


def fails(decode: Callable[[], object]) -> bool:
    try:
        decode()
    except Exception:
        return True
    return False


@pytest.mark.fault("N96", "damage inside a file that opens: a data error with its row while rendering, not at a step")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff", "jp2", "mp4"])
def test_damage_behind_the_header_is_said_while_a_file_is_looked_at(tmp_path: Path, ending: str) -> None:
    formats = {"jpg": "JPEG", "jp2": "JPEG2000"}
    if ending == "mp4":
        whole = write_video(tmp_path / "whole.mp4", 20, 10, noisy=True).read_bytes()
    else:
        options = {"compression": "tiff_lzw"} if ending == "tiff" else {"progressive": True} if ending == "jpg" else {}
        whole = picture_bytes(picture(60, 40), formats.get(ending, ending.upper()), **options)
    random, bound, num_found = Random(1), limits("qwen3_vl"), 0
    for _ in range(300):
        file = tmp_path / f"damaged.{ending}"
        file.write_bytes(mutated(whole, random))
        if opens_and_breaks(file):
            num_found += 1
            frames = [medium((file,), "video")] if ending != "mp4" else []
            for shown in (medium(file, "video" if ending == "mp4" else "image"), *frames):
                with pytest.raises(RowError):
                    look(shown, bound)
        if num_found == 5:
            return
    assert num_found, "no damage that a decoder notices"


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_of_a_clip_with_an_edit_list_the_frames_that_are_shown_are_seen(
    tmp_path: Path, codec: str, family: str
) -> None:
    """`ffmpeg -ss` and phones keep what stands before the cut, for the frames after it are made of it."""
    file = write_cut_video(tmp_path / "cut.mp4", 40, 10, first=7, codec=codec)
    assert b"elst" in file.read_bytes()
    with av.open(str(file)) as container:
        shown = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(shown) == 33
    bound = limits(family)
    seen = look(medium(file, "video"), bound)
    assert max(seen.frames) < 33
    found = colours(seen, bound).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, [shown[k] for k in seen.frames], atol=2)
    assert seen.frames[0] == 0
    assert found[0] == pytest.approx(255 * 7 / 39, abs=4)


def test_a_clip_with_an_edit_list_that_breaks_off_is_said(tmp_path: Path) -> None:
    content = write_cut_video(tmp_path / "cut.mp4", 40, 10, first=7, index_first=True).read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(RowError, match=r"breaks off|no video that can be read"):
        look(medium(tmp_path / "half.mp4", "video"), limits())
