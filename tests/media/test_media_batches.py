"""What a trainer gets of packed rows and tries: every example of the oracle, whole, with its positions and its media.

An example is found in a row as what the last of its tokens sees. Pictures and sounds are compared bit by bit with what
the published processors make of them, in the order of their pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.batch import TrainBatches
from qwentune.data.layout.schedule import Schedule
from qwentune.data.layout.tower_inputs import stays_on_cpu
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.recipe import load_recipe
from tests.media import oracle
from tests.media.checkpoints import HYBRIDS, TYPES, MediaType
from tests.media.material import RATE, Item, Material, read_wav
from tests.media.oracle import RULES, Class, Example
from tests.media.test_media_oracle import recipe_of

TOKENS_PER_ROW = 8192
Batch = dict[str, Any]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_audio"])
def test_rows_hold_every_example_with_its_media(
    tmp_path: Path, classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    compare(tmp_path, classes[name], files, items, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_many_rows_hold_every_example_with_its_media(
    tmp_path: Path, classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    compare(tmp_path, classes[name], files, items, 40)


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_features_go_to_the_device_once_as_the_tower_reads_them(
    tmp_path: Path, classes: dict[str, Class], files: Material, name: MediaType
) -> None:
    rows = oracle.generated(2, name, files, 6)
    given = batches(recipe_of(tmp_path, classes[name], files, rows, packing=False, max_tokens=TOKENS_PER_ROW))
    heard = next(batch for batch in given if "input_features" in batch)
    moved = {key for key in heard if not stays_on_cpu(key, heard)}
    assert len(moved & {"input_features", "audio_padded_feature"}) == 1


def compare(folder: Path, one: Class, files: Material, items: dict[str, Item], count: int) -> None:
    """Holds the micro-batches of generated dialogues against the oracle."""
    rows = oracle.generated(2, one.name, files, count)
    expected = [e for row in rows for e in oracle.expected_examples(row, one.tokenizer, one.name, items)]
    expected = [example for example in expected if len(example.input_ids) <= TOKENS_PER_ROW]
    packing = one.name not in HYBRIDS
    given = batches(recipe_of(folder, one, files, rows, packing=packing, max_tokens=TOKENS_PER_ROW, too_long="drop"))
    published, wanted = Published(one, files), sum(sum(w > 0 for w in example.weights) for example in expected)
    assert sum(len(batch["target"]) for batch in given) == wanted
    found = [Found.of(batch, leaf, RULES[one.name], one) for batch in given for leaf in leaves(batch)]
    for example in expected:
        assert any(holds(path, example, published) for path in found), one.tokenizer.decode(example.input_ids)


def batches(recipe: Path) -> list[Batch]:
    """The micro-batches of one epoch, a row in each."""
    loaded = load_recipe(str(recipe), ["batch.sequences_per_step=1", "optimizer.epochs=1"]).recipe
    tokenizer = load_tokenizer(Path(loaded.model))
    dataset = prepare(loaded.data, tokenizer, chat_template(loaded.data, tokenizer), loaded.seed)
    schedule = Schedule.of(dataset.train.per_epoch, loaded.batch, loaded.optimizer, loaded.seed)
    train = TrainBatches(dataset.train, schedule, 1, 1, 0, 1)
    return [train[k] for k in range(len(train))]


def leaves(batch: Batch) -> list[int]:
    """The tokens that no other sees as its past but themselves."""
    visible = batch["visible_until"][0].numpy()
    return np.flatnonzero(visible == np.arange(len(visible)) + 1).tolist()


@dataclass(frozen=True)
class Found:
    """What one token sees: ids, positions (3, n), from where the tokens are predicted, and its media as the towers get
    them, each once for each run of its pads.
    """

    ids: list[int]
    positions: NDArray[np.int64]
    trained: dict[int, float]  # weight by place, of those predicted from the token before
    media: list[tuple[int, bytes]]  # the place of the first pad, and what is seen or heard

    @classmethod
    def of(cls, batch: Batch, last: int, rules: oracle.Rules, one: Class) -> Found:
        ids = batch["input_ids"][0].numpy()
        visible = batch["visible_until"][0].numpy()
        path = np.flatnonzero((np.arange(len(ids)) <= last) & (visible > last))
        positions = batch["position_ids"].numpy().reshape(-1, len(ids))[:, path]
        at = {int(node): place for place, node in enumerate(path)}
        triples = zip(*(batch[key].tolist() for key in ("predict_from", "target", "weight")), strict=True)
        total = batch["weight"].numpy().sum()
        trained: dict[int, float] = {}
        for before, target, weight in triples:
            place = at.get(before, len(path)) + 1
            if place < len(path) and ids[path[place]] == target:
                trained[place] = weight / total
        media = [(at[node], content) for node, content in first_pads(batch, ids, rules, one) if node in at]
        return cls(ids[path].tolist(), np.broadcast_to(positions, (3, len(path))), trained, media)


def first_pads(batch: Batch, ids: NDArray[np.int64], rules: oracle.Rules, one: Class) -> list[tuple[int, bytes]]:
    """Where the first pad of each medium of a batch stands, and what the tower gets of it."""
    out: list[tuple[int, bytes]] = []
    for kind, pad in rules.pads.items():
        places = np.flatnonzero(ids == one.tokenizer.convert_tokens_to_ids(pad)).tolist()
        contents = list(contents_of(batch, kind, rules))
        assert len(places) == sum(count for count, _ in contents)
        start = 0
        for count, content in contents:
            out.append((places[start], content))
            start += count
    return out


def contents_of(batch: Batch, kind: str, rules: oracle.Rules) -> list[tuple[int, bytes]]:
    """The pads and the content of each medium of a kind in a batch."""
    if kind == "audio":
        if "input_features" not in batch:
            return []
        lengths = batch["feature_lengths"].tolist()
        features = [one[:, :length] for one, length in zip(batch["input_features"].numpy(), lengths, strict=True)]
        return [(oracle.num_audio_tokens(one.shape[1], rules), one.tobytes()) for one in features]
    values, name = ("pixel_values", "image") if kind == "image" else ("pixel_values_videos", "video")
    if values not in batch:
        return []
    counts = [int(np.prod(grid)) for grid in batch[f"{name}_grid_thw"].tolist()]
    pieces = np.split(batch[values].numpy(), np.cumsum(counts)[:-1])
    return [(count // 4, piece.tobytes()) for count, piece in zip(counts, pieces, strict=True)]


class Published:
    """What the published processors make of files."""

    def __init__(self, one: Class, files: Material) -> None:
        self.one, self.files, self.known = one, files, dict[str, bytes | None]()

    def content(self, item: Item) -> bytes | None:
        """Pixels or features; None of a video, whose processor needs torchvision."""
        if item.name not in self.known:
            self.known[item.name] = self._content(item)
        return self.known[item.name]

    def _content(self, item: Item) -> bytes | None:
        from PIL import Image
        from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

        path = self.files.folder / item.name
        if item.kind == "video" or item.name == "media/slow.wav":
            return None
        if item.kind == "image":
            processor = Qwen2VLImageProcessorPil.from_pretrained(self.one.folder)
            return processor(images=[Image.open(path)], return_tensors="np")["pixel_values"].tobytes()
        extractor = WhisperFeatureExtractor.from_pretrained(self.one.folder)
        whole = self.one.name == "qwen2_audio"  # it pads to 30 seconds, the others do not
        padding = {"padding": "max_length"} if whole else {"padding": True, "truncation": False}
        out = extractor(read_wav(path), sampling_rate=RATE, return_tensors="np", return_attention_mask=True, **padding)
        return out["input_features"][0][:, : int(out["attention_mask"].sum())].tobytes()


def holds(path: Found, example: Example, published: Published) -> bool:
    """Whether a path of a row begins with the example: the same ids, positions, loss and media."""
    length = len(example.input_ids)
    if path.ids[:length] != example.input_ids:
        return False
    if RULES[published.one.name].axes == 3 and not np.array_equal(path.positions[:, :length], example.positions):
        return False
    wanted = [place for place, weight in enumerate(example.weights) if weight]
    if not set(wanted) <= path.trained.keys():
        return False
    scales = {round(path.trained[place] / example.weights[place], 7) for place in wanted}
    seen = [medium for medium in path.media if medium[0] < length]
    return len(scales) == 1 and same_media(seen, example, published)


def same_media(seen: Sequence[tuple[int, bytes]], example: Example, published: Published) -> bool:
    """Whether the media stand where the example has them and are the same bit for bit."""
    wanted = {place: published.content(medium.item) for medium, place in example.media}
    given = dict(seen)
    return given.keys() == wanted.keys() and all(
        content is None or content == given[place] for place, content in wanted.items()
    )
