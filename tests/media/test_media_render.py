"""Media on their way from a dialogue to a batch: their pads, positions and places in rows, and what a preview says."""

from __future__ import annotations

import base64
import io
import json
import os
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from qwentune import preview as preview_command
from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.layout.batch import Ahead, EvalBatches, TrainBatches, collate, collated
from qwentune.data.layout.schedule import Schedule
from qwentune.data.layout.trie import Packed
from qwentune.data.media.thumbnails import thumbnails
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import EXIT_OK, DataError, ResumeError
from qwentune.facts.models import model_spec
from qwentune.memory.closed_form.host_memory import ahead_bytes
from qwentune.memory.settings import TowerUse
from qwentune.recipe import DataOptions, load_recipe
from tests.media import material, oracle
from tests.media.checkpoints import MediaType, write_media_checkpoint
from tests.media.files import picture, picture_bytes
from tests.media.material import Item, Kind, Material
from tests.test_trace import SETTINGS

SMALL: list[MediaType] = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_audio"]


@dataclass(frozen=True)
class Place:
    """A folder with media in which rows are written, and tiny checkpoints."""

    files: Material
    items: dict[str, Item]
    folders: dict[MediaType, Path]

    def prepared(self, name: MediaType, rows: list[dict[str, Any]], **data: Any) -> Dataset:
        """The rows rendered for a class."""
        tokenizer = load_tokenizer(self.folders[name])
        options = self.options(rows, **data)
        return prepare(options, tokenizer, chat_template(options, tokenizer), 0)

    def options(self, rows: list[dict[str, Any]], **data: Any) -> DataOptions:
        """The section `data` of a recipe over the rows, which are written."""
        path = self.files.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataOptions.model_validate({"train": [{"path": str(path)}], "max_tokens": 4096, **data})


@pytest.fixture(scope="module")
def place(session_folder: Path) -> Place:
    files = material.make(session_folder / "seen")
    items = {item.name: item for item in (*files.pictures, *files.sounds, *files.clips)}
    folders = {name: write_media_checkpoint(session_folder / "seen" / f"model_{name}", name) for name in SMALL}
    return Place(files, items, folders)


def user(*parts: str) -> dict[str, Any]:
    """A message of the user in parts: names of pictures, and texts."""
    return {
        "role": "user",
        "content": [
            {"type": "image", "image": part} if part.endswith(".png") else {"type": "text", "text": part}
            for part in parts
        ],
    }


def dialogue(*messages: dict[str, Any] | str) -> dict[str, Any]:
    """A row; texts are what the assistant says."""
    return {"messages": [{"role": "assistant", "content": m} if isinstance(m, str) else m for m in messages]}


def paths_of(row: Packed) -> list[list[int]]:
    """The places of the tokens of each example in a row, read off what each token may see."""
    last = [k for k in range(len(row.input_ids)) if row.visible_until[k] == k + 1]
    return [[k for k in range(leaf + 1) if row.visible_until[k] > leaf] for leaf in last]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_rows_have_the_ids_positions_and_media_of_each_example_alone(
    place: Place, name: MediaType, packing: bool
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place.folders[name])
    rows = oracle.generated(5, name, place.files, 6)
    expected = {
        tuple(example.input_ids): example
        for row in rows
        for example in oracle.expected_examples(row, tokenizer, name, place.items)
    }
    dataset = place.prepared(name, rows, packing=packing, max_tokens=16384)
    assert dataset.media is not None
    pads = set(dataset.media.pad_ids.values())
    met: set[tuple[int, ...]] = set()
    for row in (dataset.train[k] for k in range(len(dataset.train))):
        ids = dataset.media.in_model(row.input_ids)
        assert row.positions is not None
        assert not pads & set(row.target.tolist())
        for path in paths_of(row):
            example = expected[tuple(ids[path].tolist())]
            assert row.positions[:, path].tolist() == example.positions.tolist()
            met.add(tuple(example.input_ids))
            seen = [dataset.media.seen[number] for number in dataset.media.order(row.input_ids[path])]
            assert [one.grid for one in seen] == [medium.grid for medium, _ in example.media]
            files = [place.files.folder / medium.item.name for medium, _ in example.media]
            assert [Path(one.path).read_bytes() for one in seen] == [file.read_bytes() for file in files]
        shown = np.repeat(row.media, [dataset.media.seen[number].num_tokens for number in row.media])
        assert (-row.input_ids[row.input_ids < 0] - 1).tolist() == shown.tolist()
    assert met == set(expected)


def test_a_trie_shares_a_picture_and_never_merges_two(place: Place) -> None:
    one, other = (item.name for item in place.files.pictures[:2])
    same_size = "media/same.png"
    copy_with_one_other_pixel(place.files.folder, one, same_size)
    rows = [dialogue(user(picture, "What is it?"), "It is.") for picture in (one, same_size, one, other)]
    dataset = place.prepared("qwen2_5_vl", [*rows, dialogue(user(one, one, "Alike?"), "Yes.")])
    assert dataset.media is not None
    assert len(dataset.media.seen) == 3
    ids = [tuple(dataset.examples.ids(i).tolist()) for i in range(5)]
    assert ids[0] == ids[2] != ids[1]
    assert [-1 in example for example in ids] == [True, False, True, False, True]
    assert dataset.report["duplicates"] == 1  # one, not two: the pictures of one size differ

    thinks = [
        dialogue(user(one, "a"), "b", user(same_size, "c"), {**answer("d"), "reasoning_content": "so"}, user("e"), "f")
    ]
    (row,) = [place.prepared("qwen3_5", thinks).train[0]]
    assert len(paths_of(row)) > 1
    assert len(row.media) == len(set(row.media)) == 2


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def copy_with_one_other_pixel(folder: Path, name: str, copy: str) -> None:
    from PIL import Image

    with Image.open(folder / name) as picture:
        changed = picture.convert("RGB")
    changed.putpixel((0, 0), tuple(255 - value for value in changed.getpixel((0, 0))))  # type: ignore[arg-type, union-attr]
    changed.save(folder / copy)


def test_swapped_pictures_are_other_data(place: Place) -> None:
    one = place.files.pictures[0].name
    other = "media/swapped.png"
    copy_with_one_other_pixel(place.files.folder, one, other)
    first, second = (
        place.prepared("qwen3_vl", [dialogue(user(*pictures, "Which?"), "The first.")])
        for pictures in ((one, other), (other, one))
    )
    assert (first.examples.input_ids == second.examples.input_ids).all()
    assert first.content != second.content
    assert first.fingerprint != second.fingerprint


def test_the_same_rows_beside_other_pictures_are_other_data(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(place.folders["qwen2_5_vl"])
    options = DataOptions.model_validate({"train": [{"path": "rows.jsonl"}], "max_tokens": 4096})
    found: list[Dataset] = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("a.png").write_bytes((place.files.folder / place.files.pictures[number].name).read_bytes())
        Path("rows.jsonl").write_text(json.dumps(dialogue(user("a.png", "what?"), "that")) + "\n", encoding="utf-8")
        found.append(prepare(options, tokenizer, chat_template(options, tokenizer), 0))
    media = [dataset.media for dataset in found]
    assert [Path(one.seen[0].path) for one in media if one is not None] == [tmp_path / "0/a.png", tmp_path / "1/a.png"]
    assert found[0].content != found[1].content


def test_a_picture_that_changes_is_told_with_its_row_and_rendered_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    one = place.files.folder / "media/edited.png"
    copy_with_one_other_pixel(place.files.folder, place.files.pictures[0].name, "media/edited.png")
    rows = [dialogue(user("Hello"), "Hi."), dialogue(user("media/edited.png", "What?"), "It.")]
    before = place.prepared("qwen3_vl", rows)
    assert place.prepared("qwen3_vl", rows).content == before.content
    copy_with_one_other_pixel(place.files.folder, place.files.pictures[1].name, "media/edited.png")
    with pytest.raises(ResumeError, match=r"rows\.jsonl:2 .*edited\.png"):
        collated(before.train, range(len(before.train)), 1.0)
    capsys.readouterr()
    after = place.prepared("qwen3_vl", rows)
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert after.content != before.content
    one.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl:2 .*edited\.png"):
        place.prepared("qwen3_vl", rows)


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("qwen2_5_vl", dialogue(user("a"), {**user("media/0.png"), "role": "assistant"}), "assistant says"),
        ("qwen3_vl", dialogue({**user("media/0.png", "s"), "role": "system"}, user("a"), "b"), r"content\[0\].*system"),
        ("qwen3_5", dialogue({**user("media/0.png", "s"), "role": "system"}, user("a"), "b"), "System message cannot"),
        ("qwen2_audio", dialogue(user("media/0.png", "a"), "b"), "an image"),
    ],
)
def test_a_medium_that_is_not_shown_to_the_model_is_refused_by_name(
    place: Place, name: MediaType, row: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says) as refused:
        place.prepared(name, [row])
    assert "rows.jsonl:1" in str(refused.value)


def test_old_turns_go_with_their_pictures(place: Place) -> None:
    first, second = (item.name for item in place.files.pictures[:2])
    row = dialogue(user(first, "one " * 40), "two", user(second, "three"), "four")
    whole = place.prepared("qwen2_5_vl", [row], turns="last")
    size = int(whole.examples.lengths.max())
    cut = place.prepared("qwen2_5_vl", [row], turns="last", too_long="drop_old_turns", max_tokens=size - 1)
    assert cut.media is not None
    assert [Path(seen.path).name for seen in cut.media.seen] == [Path(second).name]
    assert len(whole.media.seen) == 2 if whole.media else False


def test_batches_hold_each_medium_in_the_order_of_its_pads(place: Place) -> None:
    names = [item.name for item in place.files.pictures[:3]]
    rows = [dialogue(user(names[0], name, "Which?"), "Both.") for name in names]
    dataset = place.prepared("qwen3_vl", rows, packing=False)
    assert dataset.media is not None
    batch = collated(dataset.train, [0, 1, 2], 1.0)
    order = [number for k in range(3) for number in dataset.train[k].media]
    assert batch["image_grid_thw"].tolist() == [list(dataset.media.seen[number].grid) for number in order]
    patches = np.concatenate([dataset.media.load(number) for number in order])
    assert batch["pixel_values"].numpy().tobytes() == patches.tobytes()
    num_pads = int((batch["input_ids"] == dataset.media.pad_ids["image"]).sum())
    assert num_pads * 4 == len(patches)
    assert int(batch["input_ids"].min()) >= 0
    assert batch["position_ids"].shape == (3, *batch["depths"].shape)
    assert "pixel_values_videos" not in batch
    assert "input_features" not in batch


def test_batches_made_ahead_are_those_asked_for_in_any_order(place: Place) -> None:
    rows = [dialogue(user(item.name, "What?"), "It is one.") for item in place.files.pictures]
    dataset = place.prepared("qwen3_vl", rows, packing=False)
    schedule = Schedule(dataset.train.per_epoch, 1, 0, 1.0, None)
    batches = TrainBatches(dataset.train, schedule, 1, 1, 0, 1)
    ahead = Ahead(batches)
    for k in (0, 1, 2, 5, 3, len(batches) - 1):
        assert {name: t.tolist() for name, t in ahead[k].items()} == {n: t.tolist() for n, t in batches[k].items()}


def test_batches_made_ahead_take_the_host_memory_that_the_plan_counts(place: Place, tmp_path: Path) -> None:
    for k in range(8):
        (tmp_path / f"{k}.bmp").write_bytes(picture_bytes(picture(560, 560, k), "BMP"))
    rows = [dialogue(user(str(tmp_path / f"{k}.bmp"), "Which?"), "It.") for k in range(8)]
    for row in rows:
        row["messages"][0]["content"][0] = {"type": "image", "image": row["messages"][0]["content"][0]["text"]}
    dataset = place.prepared("qwen2_5_vl", rows, packing=False)
    use = TowerUse(patches=max(shown.patches for shown in dataset.train.shown))
    planned = ahead_bytes(model_spec("Qwen/Qwen2.5-VL-3B-Instruct"), replace(SETTINGS, micro_batch=1, towers=use))
    batches = Ahead(EvalBatches(dataset.train, 0, 1))
    tracemalloc.start()
    try:
        for k in range(len(batches)):
            batches[k]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.4 * planned["train_step"] < most < planned["train_step"]


def test_rows_of_text_alone_carry_nothing_of_media(place: Place) -> None:
    dataset = place.prepared("qwen3_vl", [dialogue({"role": "user", "content": "a <|image_pad|>"}, "b")])
    assert dataset.media is None
    assert "media" not in dataset.report
    batch = collate([dataset.train[0]], 1.0, dataset.train.media)
    assert set(batch) == {
        *("input_ids", "position_ids", "visible_until", "predict_from", "target", "weight", "trees"),
    }
    folder = Path(os.environ["QWENTUNE_CACHE"], "data", dataset.fingerprint)
    assert not (folder / "media.json").exists()


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("qwen2_5_vl", "image", 1), ("qwen3_vl", "video", 2), ("qwen2_audio", "audio", 1)]
)
def test_thumbnails_are_small_pictures_of_what_the_model_is_given(
    place: Place, name: MediaType, kind: Kind, count: int
) -> None:
    from PIL import Image

    item = place.files.of(kind)[0]
    part = {"type": kind, kind: item.name}
    row = dialogue({"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, "It.")
    media = place.prepared(name, [row]).media
    assert media is not None
    urls = thumbnails(media.seen[0], media.load(0), media.limits)
    assert len(urls) == count
    for url in urls:
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            drawn = np.asarray(picture.convert("RGB"), dtype=float)
        assert max(drawn.shape) <= 128
    if kind == "image":
        with Image.open(place.files.folder / item.name) as picture:
            whole = np.asarray(picture.convert("RGB").resize(drawn.shape[1::-1]), dtype=float)
        assert np.abs(drawn - whole).mean() < 40 < np.abs(drawn - 255 + whole).mean()


def test_the_preview_shows_media(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    large = place.files.folder / "media/large.png"
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(large)
    rows = [dialogue(user("media/large.png", "What?"), "Black."), dialogue(user("Hello"), "Hi.")]
    path = place.options(rows).train[0].path
    recipe = {
        "model": str(place.folders["qwen2_5_vl"]),
        "tuning": {"kind": "lora"},
        "data": {"train": path, "media": {"max_pixels": 200_000}},
        "output": {"dir": str(tmp_path / "run")},
    }
    file, page, lines = tmp_path / "recipe.yaml", tmp_path / "page.html", tmp_path / "rows.jsonl"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_recipe(str(file)).recipe.data.train[0].path == path
    assert preview_command.run(str(file), [], None, None, None, False, False) == EXIT_OK
    said = capsys.readouterr()
    assert "⟨image 640×480 → 234⟩" in said.out
    assert "1 × image → 234 tokens; 1 scaled down, to 60% of the pixels at least" in said.err
    assert preview_command.run(str(file), [], None, lines, page, False, False) == EXIT_OK
    first, second = map(json.loads, lines.read_text("utf-8").splitlines())
    (medium,) = first["media"]
    start, ids = medium.pop("start"), first["input_ids"]
    assert medium == {"kind": "image", "path": str(large), "tokens": 234, "grid": [1, 26, 36]}
    assert [k for k, token in enumerate(ids) if token == ids[start]] == [*range(start, start + 234)]
    assert second["media"] == []
    text = page.read_text("utf-8")
    assert text.count("<img ") == text.count('src="data:image/jpeg;base64,') == 1
    assert len(text) < 60_000
