"""Dialogues with media are rendered as the published processors and vLLM have them.

The oracle (tests/media/oracle.py) is held against the processors that construct here and the models' own positions;
then `preview --jsonl` and the rows that a trainer gets are held against the oracle, dialogue by dialogue.
`-m soak` holds it against the full processors too, which need torchvision (tests/media/with_torchvision.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwentune import preview as preview_command
from qwentune.errors import EXIT_OK
from tests.media import material, oracle
from tests.media.checkpoints import TYPES, MediaType
from tests.media.material import Item, Material
from tests.media.oracle import RULES, UNTRAINED, Class, Example
from tests.media.with_torchvision import environment, needs_torchvision

MAX_TOKENS = 32768  # more than any generated dialogue needs
NUM_FAST, NUM_SLOW = 20, 200  # dialogues of each class
WITH_PICTURES = [name for name in TYPES if "image" in RULES[name].pads]
WITH_SOUNDS = [name for name in TYPES if "audio" in RULES[name].pads]


# --- the oracle, held against what is published


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_omni_moe_thinker"])
def test_the_oracle_sizes_pictures_as_the_processor_of_the_folder(classes: dict[str, Class], name: MediaType) -> None:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(classes[name].folder)

    @settings(max_examples=100)
    @given(st.integers(1, 6000), st.integers(1, 6000))
    def agrees(width: int, height: int) -> None:
        if max(width, height) > 200 * min(width, height):
            return
        seen = oracle.shown(Item("image", "", width, height), RULES[name])
        assert int(np.prod(seen.grid)) == processor.get_number_of_image_patches(height, width, {})
        assert seen.num_tokens * 4 == int(np.prod(seen.grid))

    agrees()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_the_oracle_has_the_grids_of_the_processor(classes: dict[str, Class], files: Material, name: MediaType) -> None:
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(classes[name].folder)
    pictures = [Image.open(files.folder / item.name) for item in files.pictures]
    grids = processor(images=pictures, return_tensors="np")["image_grid_thw"].tolist()
    assert grids == [list(oracle.shown(item, RULES[name]).grid) for item in files.pictures]


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_the_oracle_places_pictures_as_the_model_does(
    classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    one, position_of = classes[name], positions_by_the_model(classes[name])
    kinds = [kind for kind in RULES[name].kinds if kind != "video"]
    rows = oracle.generated(3, name, files, 20, kinds)
    examples = [example for row in rows for example in oracle.expected_examples(row, one.tokenizer, name, items)]
    assert sum(len(example.media) > 1 for example in examples) > 10
    for example in examples:
        assert example.positions.tolist() == position_of(example)


def positions_by_the_model(one: Class) -> Callable[[Example], list[list[int]]]:
    """The model's own positions of an example without videos; the model has no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM

    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(one.folder))
    rules = RULES[one.name]
    pads = {kind: one.tokenizer.convert_tokens_to_ids(pad) for kind, pad in rules.pads.items()}

    def positions(example: Example) -> list[list[int]]:
        ids = torch.tensor([example.input_ids])
        grids = [medium.grid for medium, _ in example.media if medium.item.kind == "image"]
        given: dict[str, Any] = {"image_grid_thw": torch.tensor(grids) if grids else None}
        if "audio" in pads:
            frames = [medium.grid[0] for medium, _ in example.media if medium.item.kind == "audio"]
            given["audio_seqlens"] = torch.tensor(frames) if frames else None
            return model.get_rope_index(ids, attention_mask=torch.ones_like(ids), **given)[0][:, 0].long().tolist()
        given["mm_token_type_ids"] = (ids == pads["image"]).int()
        return model.model.get_rope_index(ids, **given)[0][:, 0].tolist()

    return positions


def test_the_oracle_counts_sounds_as_the_published_processors_do(classes: dict[str, Class], files: Material) -> None:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths

    one = classes["qwen2_audio"]
    extractor = WhisperFeatureExtractor.from_pretrained(one.folder)
    processor = Qwen2AudioProcessor(extractor, one.tokenizer)
    sounds = [material.read_wav(files.folder / item.name) for item in files.sounds if item.name != "media/slow.wav"]
    text = one.tokenizer.decode(one.tokenizer.convert_tokens_to_ids(["<|AUDIO|>"]))
    ids = processor(text=[text] * len(sounds), audio=sounds, sampling_rate=material.RATE)["input_ids"]
    seen = [oracle.shown(item, RULES["qwen2_audio"]) for item in files.sounds[: len(sounds)]]
    assert [len(row) for row in ids] == [medium.num_tokens for medium in seen]

    counts = _get_feat_extract_output_lengths(np.arange(1, 2000)).tolist()
    assert counts == [oracle.num_audio_tokens(frames, RULES["qwen3_omni_moe_thinker"]) for frames in range(1, 2000)]


def test_a_whole_dialogue_with_sounds_is_that_of_the_processor(
    classes: dict[str, Class], files: Material, items: dict[str, Item]
) -> None:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    one = classes["qwen2_audio"]
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor.from_pretrained(one.folder), one.tokenizer)
    names = ["media/2.wav", "media/0.wav"]
    asked = [
        {"type": "audio", "audio": names[0]},
        {"type": "text", "text": "and"},
        {"type": "audio", "audio": names[1]},
    ]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Two tones."}]
    (example,) = oracle.expected_examples({"messages": messages}, one.tokenizer, one.name, items)
    text = str(one.tokenizer.apply_chat_template(messages, tokenize=False))
    sounds = [material.read_wav(files.folder / name) for name in names]
    whole = processor(text=[text], audio=sounds, sampling_rate=material.RATE)["input_ids"][0]
    assert [*example.input_ids, *one.tokenizer.encode("\n")] == list(whole)


@pytest.mark.parametrize("name", TYPES)
def test_generated_dialogues_hold_what_they_are_to_hold(
    classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    one, rules = classes[name], RULES[name]
    rows = oracle.generated(0, name, files, 25)
    assert rows == oracle.generated(0, name, files, 25) != oracle.generated(1, name, files, 25)
    assert json.loads(json.dumps(rows)) == rows
    examples = [example for row in rows for example in oracle.expected_examples(row, one.tokenizer, name, items)]
    pads = {one.tokenizer.convert_tokens_to_ids(pad) for pad in rules.pads.values()}
    assert not any(label in pads for example in examples for label in example.labels)
    assert {medium.item.kind for example in examples for medium, _ in example.media} == set(rules.kinds)
    text = json.dumps(rows)
    assert "<|image_pad|>" in text
    assert ('"role": "tool"' in text) == rules.in_tools
    assert any(not example.media for example in examples)
    for example in examples:
        assert sum(token in pads for token in example.input_ids) == sum(m.num_tokens for m, _ in example.media)
        assert all(example.input_ids[place] in pads for _, place in example.media)
        assert (np.diff(example.positions.max(0), prepend=-1) <= max(1, example.positions.max())).all()


# --- the project, held against the oracle


@pytest.mark.parametrize("name", TYPES)
def test_dialogues_with_media_are_rendered_as_the_oracle_has_them(
    tmp_path: Path, classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    compare(tmp_path, classes[name], files, items, seed=0, count=NUM_FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_many_dialogues_with_media_are_rendered_as_the_oracle_has_them(
    tmp_path: Path, classes: dict[str, Class], files: Material, items: dict[str, Item], name: MediaType
) -> None:
    compare(tmp_path, classes[name], files, items, seed=1, count=NUM_SLOW)


def compare(folder: Path, one: Class, files: Material, items: dict[str, Item], *, seed: int, count: int) -> None:
    """Holds `preview --jsonl` of generated dialogues against the oracle."""
    rows = oracle.generated(seed, one.name, files, count)
    shown = previewed(recipe_of(folder, one, files, rows))
    for line, row in enumerate(rows, start=1):
        expected = [as_previewed(e) for e in oracle.expected_examples(row, one.tokenizer, one.name, items)]
        assert shown.pop(line, []) == expected, f"row {line}: {json.dumps(row, ensure_ascii=False)}"
    assert shown == {}


def recipe_of(folder: Path, one: Class, files: Material, rows: list[dict[str, Any]], **data: Any) -> Path:
    """A recipe over the rows, which are written beside their media."""
    data_file = files.folder / f"{folder.name}.jsonl"
    data_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(one.folder),
        "tuning": {"kind": "lora"},
        "data": {"train": str(data_file), "max_tokens": MAX_TOKENS, "packing": False, **data},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def previewed(recipe: Path) -> dict[int, list[dict[str, Any]]]:
    """What `preview --jsonl` writes, by the line of the row; the media's paths are left out."""
    file = recipe.with_name("preview.jsonl")
    assert preview_command.run(str(recipe), [], None, file, None, False, False) == EXIT_OK
    shown: dict[int, list[dict[str, Any]]] = {}
    for line in file.read_text("utf-8").splitlines():
        example = json.loads(line)
        media = [{key: medium[key] for key in ("kind", "start", "tokens", "grid")} for medium in example["media"]]
        assert all(Path(medium["path"]).is_file() for medium in example["media"])
        weights = example["weights"] or [float(label != UNTRAINED) for label in example["labels"]]
        kept = {key: example[key] for key in ("turns", "input_ids", "labels")}
        shown.setdefault(example["source"]["line"], []).append({**kept, "weights": weights, "media": media})
    return shown


def as_previewed(example: Example) -> dict[str, Any]:
    """An example of the oracle's in the shape of a line of `preview --jsonl`."""
    media = [
        {"kind": medium.item.kind, "start": place, "tokens": medium.num_tokens, "grid": list(medium.grid)}
        for medium, place in example.media
    ]
    kept = {name: getattr(example, name) for name in ("turns", "input_ids", "labels", "weights")}
    return {**kept, "media": media}


# --- with torchvision, the full processors

WITH_TORCHVISION = """
import json, sys
import av
import torch
from PIL import Image
import transformers
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

request = json.load(sys.stdin)
folder, steps_apart = request["folder"], request["steps_apart"]
images = Qwen2VLImageProcessor.from_pretrained(folder)
videos = (Qwen3VLVideoProcessor if steps_apart else Qwen2VLVideoProcessor).from_pretrained(folder)
answers = {"grids": [], "videos": []}
for name in request["pictures"]:
    answers["grids"].append(images(images=[Image.open(name)], return_tensors="pt")["image_grid_thw"][0].tolist())
for name, frames, fps, taken in request["clips"]:
    with av.open(name) as file:
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    metadata = VideoMetadata(total_num_frames=frames, fps=fps)
    if steps_apart:
        taken = videos.sample_frames(metadata, fps=2).tolist()
    chosen = torch.stack([torch.from_numpy(decoded[place]) for place in taken]).permute(0, 3, 1, 2)
    out = videos(videos=[chosen], do_sample_frames=False, return_tensors="pt")
    answers["videos"].append([taken, out["video_grid_thw"][0].tolist()])
json.dump(answers, sys.stdout)
"""


@pytest.mark.soak
@needs_torchvision
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_full_processors_agree(classes: dict[str, Class], files: Material, name: MediaType, tmp_path: Path) -> None:
    rules = RULES[name]
    clips = [(item, oracle.shown(item, rules)) for item in files.clips]
    request = {
        "folder": str(classes[name].folder),
        "steps_apart": rules.steps_apart,
        "pictures": [str(files.folder / item.name) for item in files.pictures],
        "clips": [(str(files.folder / i.name), i.num_frames, i.fps, shown.frames) for i, shown in clips],
    }
    run = subprocess.run(
        [sys.executable, "-c", WITH_TORCHVISION],
        input=json.dumps(request),
        env=environment(tmp_path / "start"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert answers["grids"] == [list(oracle.shown(item, rules).grid) for item in files.pictures]
    assert answers["videos"] == [[list(shown.frames), list(shown.grid)] for _, shown in clips]
