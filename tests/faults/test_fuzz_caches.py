"""Every file of a data cache damaged in every way: the same data, rendered again and said, or an error in words.

pytest -m soak tests/faults/test_fuzz_caches.py tries thousands; FUZZ_SEED=N repeats what a printed seed did.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from qwentune.data.dataset import Dataset, chat_template, prepare, prepared
from qwentune.data.layout.store import DTYPES, seal
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.durable import remove
from qwentune.errors import UserError
from qwentune.recipe import DataOptions, load_recipe
from tests.checkpoints import add_weights, write_checkpoint
from tests.faults.fuzz import new_seed, write_rows
from tests.runs import write_recipe
from tests.warm import Warm

FILES = ("description.json", "manifest.json", *(f"{name}.bin" for name in DTYPES))


@dataclass(frozen=True)
class Cache:
    """A rendered dataset and what renders or opens it."""

    data: DataOptions
    tokenizer: Tokenizer
    whole: bytes
    folder: Path
    kept: Path  # a copy of the folder as it was written

    def restored(self) -> None:
        for path in self.folder.parent.iterdir():
            if not path.name.endswith(".lock"):
                remove(path)
        shutil.copytree(self.kept, self.folder)

    def opened(self) -> bytes:
        return all_of(prepare(self.data, self.tokenizer, chat_template(self.data, self.tokenizer), 0))


def all_of(dataset: Dataset) -> bytes:
    """Everything that a run takes of its data, as bytes."""
    arrays = [np.asarray(getattr(dataset.examples, name)).tobytes() for name in DTYPES]
    rest = (dataset.report, dataset.dropped, dataset.content, dataset.control_ids_used, dataset.examples.file_names)
    return b"|".join([*arrays, repr(rest).encode()])


@pytest.fixture
def cache(tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    write_rows(Path("rows.jsonl"))
    data = DataOptions.model_validate(
        {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.2, "max_tokens": 300, "max_dropped_fraction": 1.0}
    )
    tokenizer = load_tokenizer(qwen3_folder)
    whole = all_of(prepare(data, tokenizer, chat_template(data, tokenizer), 0))
    (folder,) = (path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir())
    shutil.copytree(folder, tmp_path / "kept")
    return Cache(data, tokenizer, whole, folder, tmp_path / "kept")


def flip(path: Path, random: Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def cut(path: Path, random: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data)) if data else 0])


def lengthen(path: Path, random: Random) -> None:
    path.write_bytes(path.read_bytes() + random.randbytes(random.choice((1, 2, 4, 8, 4096))))


def scramble(path: Path, random: Random) -> None:
    path.write_bytes(random.randbytes(path.stat().st_size))


def swap(path: Path, random: Random) -> None:
    other = path.with_name(random.choice([name for name in FILES if name != path.name]))
    path.rename(path.with_name("between"))
    other.rename(path)
    path.with_name("between").rename(other)


def empty(path: Path, _: Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, _: Random) -> None:
    path.unlink()


def replaced(make: Callable[[Path], object]) -> Callable[[Path, Random], None]:
    def damage(path: Path, _: Random) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    "flipped": flip,
    "cut": cut,
    "longer": lengthen,
    "scrambled": scramble,
    "swapped": swap,
    "emptied": empty,
    "missing": missing,
    "a folder": replaced(Path.mkdir),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a link to nothing": replaced(lambda path: path.symlink_to("nothing")),
    "a link to zeros": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a pipe": replaced(os.mkfifo),
}


@pytest.mark.fault(
    "L81",
    "the file and what is wrong with it in one line; the folder is moved aside, the same data rendered again",
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_and_rendered_again(
    damage: str, cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    random = Random(damage)
    for name in ("description.json", "manifest.json", "input_ids.bin", random.choice(FILES)):
        cache.restored()
        before = (cache.folder / name).read_bytes()
        DAMAGES[damage](cache.folder / name, random)
        path = cache.folder / name
        is_same = path.is_file() and path.stat().st_size == len(before) and path.read_bytes() == before
        assert cache.opened() == cache.whole, name
        said = capfd.readouterr().err
        if is_same:  # it was empty before
            assert said == ""
            continue
        assert said.count("\n") == 1, said
        assert f"the rendered data in {cache.folder} is damaged: " in said
        assert "It was moved to " in said
        if damage != "swapped":
            assert name in said or name == "manifest.json"
        assert (cache.folder.parent / f"{cache.folder.name}.damaged").is_dir()
        assert cache.opened() == cache.whole
        assert capfd.readouterr().err == ""


@pytest.mark.soak
def test_thousands_of_damaged_caches(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    seed = new_seed()
    for number in range(3000):
        random = Random(f"{seed}-{number}")
        cache.restored()
        done = [(random.choice(list(DAMAGES)), random.choice(FILES)) for _ in range(random.randint(1, 3))]
        for damage, name in done:
            if (cache.folder / name).is_file() and all((cache.folder / other).is_file() for other in FILES):
                DAMAGES[damage](cache.folder / name, random)
        began = time.monotonic()
        assert cache.opened() == cache.whole, (seed, number, done)
        assert time.monotonic() - began < 60, (seed, number, done)
        capfd.readouterr()


@pytest.mark.fault("L81", "a folder that is no cache at all, or that of other data, is moved aside as well")
@pytest.mark.parametrize("kind", ["file", "link", "empty", "other"])
def test_what_stands_in_the_place_of_a_cache_is_moved_aside(
    kind: str, cache: Cache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    remove(cache.folder)
    if kind == "file":
        cache.folder.write_text("mine")
    elif kind == "link":
        cache.folder.symlink_to(tmp_path / "nothing")
    elif kind == "empty":
        cache.folder.mkdir()
    else:
        other = cache.data.model_copy(update={"max_tokens": 200})
        prepare(other, cache.tokenizer, chat_template(other, cache.tokenizer), 0)
        (folder,) = (path for path in cache.folder.parent.iterdir() if path.is_dir())
        shutil.copytree(folder, cache.folder)
    assert cache.opened() == cache.whole
    assert "It was moved to " in capfd.readouterr().err
    aside = cache.folder.with_name(f"{cache.folder.name}.damaged")
    assert os.path.lexists(aside)
    assert kind != "file" or aside.read_text() == "mine"


@pytest.mark.fault("L81", "a plan says so and is made without the data, which a preview renders again")
def test_a_plan_passes_over_a_damaged_cache(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    template = chat_template(cache.data, cache.tokenizer)
    assert prepared(cache.data, cache.tokenizer, template, 0) is not None
    flip(cache.folder / "input_ids.bin", Random(0))
    assert prepared(cache.data, cache.tokenizer, template, 0) is None
    said = capfd.readouterr().err
    assert said.startswith(f"the rendered data in {cache.folder} is damaged: input_ids.bin is not what was written.")


@pytest.mark.fault("L81", "of several processes that find the damage one renders again, and all have the same")
def test_processes_that_find_the_damage_at_once_agree(cache: Cache) -> None:
    flip(cache.folder / "input_ids.bin", Random(0))
    with get_context("fork").Pool(4) as pool:
        assert pool.map(Cache.opened, [cache] * 4) == [cache.whole] * 4
    names = [path.name for path in cache.folder.parent.iterdir() if path.is_dir()]
    assert sorted(names) == [cache.folder.name, f"{cache.folder.name}.damaged"]


@pytest.mark.fault("L81", "who has the data open goes on with what it opened")
def test_an_open_dataset_stays_whole_while_the_cache_is_moved_and_removed(cache: Cache) -> None:
    dataset = prepare(cache.data, cache.tokenizer, chat_template(cache.data, cache.tokenizer), 0)
    (cache.folder / "manifest.json").unlink()
    assert cache.opened() == cache.whole  # moved aside and rendered again
    shutil.rmtree(cache.folder.parent)
    assert all_of(dataset) == cache.whole


@pytest.mark.fault("L81", "a cache that cannot be moved aside or written, or reads back otherwise, is named; exit 2")
def test_a_cache_that_cannot_be_mended_is_an_error_in_words(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(cache.folder / "starts.bin", Random(0))

    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    def sealed_then_damaged(folder: Path, description: dict[str, Any]) -> None:
        seal(folder, description)
        flip(folder / "starts.bin", Random(0))

    with monkeypatch.context() as patch:
        patch.setattr("qwentune.data.dataset.os.rename", refuses)
        with pytest.raises(UserError, match=r"(?s)cannot be written: Permission denied.*QWENTUNE_CACHE"):
            cache.opened()
    monkeypatch.setattr("qwentune.data.dataset.seal", sealed_then_damaged)
    with pytest.raises(UserError, match=r"reads back otherwise: starts\.bin is not what was written"):
        cache.opened()


@pytest.mark.fault("L81", "a run says so on screen and in its log, and trains the same data, rendered again")
def test_a_run_renders_a_damaged_cache_again(tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 1})
    data, tokenizer = load_recipe(str(recipe)).recipe.data, load_tokenizer(model)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), load_recipe(str(recipe)).recipe.seed)
    folder = tmp_path / "cache" / "data" / dataset.fingerprint
    flip(folder / "input_ids.bin", Random(0))
    trained = warm.train(recipe, QWENTUNE_CACHE=str(tmp_path / "cache"))
    assert trained.code == 0, trained.said
    words = f"the rendered data in {folder} is damaged: input_ids.bin is not what was written"
    assert words in trained.said
    assert words in (tmp_path / "run" / "log.txt").read_text()
    assert (folder / "input_ids.bin").read_bytes() != Path(f"{folder}.damaged", "input_ids.bin").read_bytes()
