"""Tiny random models learn to see and to hear: through accelerate, exported, and loaded by transformers alone.

Pictures of colour × shape × place and tones of pitch × rhythm (tests/media/lessons.py): the exported model names what
is in files that it has not seen, and follows the file where only that is another one. With a smaller least size of a
picture, which the checkpoint folder itself says, so that a lesson has few tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from qwentune.errors import EXIT_OK
from qwentune.export import run_export
from tests.media import lessons, oracle
from tests.media.checkpoints import HYBRIDS, MediaType, add_media_weights, let_pictures_be_small, write_media_checkpoint
from tests.media.lessons import Lesson
from tests.media.material import RATE, Item, read_wav
from tests.runs import train

SIDE = 84  # pixels
LEAST_PIXELS = 4096
NUM_TAUGHT, NUM_ASKED = 400, 96
ROWS_PER_STEP, PER_ROW = 4, 7
THETA = 5.0  # with the published one a head of 16 numbers can hardly tell columns apart
ENOUGH = 0.9  # of the words
LONGEST = 3600  # seconds

# Steps and learning rate.
COURSES: dict[MediaType, tuple[int, float]] = {
    "qwen2_5_vl": (140, 2e-3),
    "qwen3_vl": (180, 2e-3),
    "qwen3_5": (500, 2e-3),
    "qwen2_audio": (200, 2e-3),
}
FIRST: MediaType = "qwen2_5_vl"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == FIRST else pytest.mark.soak) for name in COURSES]
)
def test_it_learns_to_see_or_hear(tmp_path: Path, name: MediaType) -> None:
    steps, learning_rate = COURSES[name]
    model = write_media_checkpoint(tmp_path / "model", name, hidden=128, theta=THETA)
    let_pictures_be_small(model, LEAST_PIXELS)
    add_media_weights(model)
    taught, asked = (material(tmp_path, name, count, seed) for seed, count in enumerate((NUM_TAUGHT, NUM_ASKED)))
    recipe = write_lessons(tmp_path, model, taught, name, steps, learning_rate)

    ended = train(recipe, launch="launch/single.yaml", longest=LONGEST)
    assert ended.returncode == 0, ended.stderr
    exported = tmp_path / "exported"
    assert run_export(tmp_path / "run", False, True, exported) == EXIT_OK

    said = answers(exported, name, asked)
    words = [
        (lesson.words[k], text.split()[k : k + 1])
        for lesson, text in zip(asked, said, strict=True)
        for k in range(len(lesson.words))
    ]
    right = sum([word] == given for word, given in words) / len(words)
    assert right >= ENOUGH, f"{right:.2f} of the words: {list(zip([one.answer for one in asked], said, strict=True))}"
    # Every prompt has the same ids: what differs is the file alone, and the answer follows it.
    wanted = {lesson.answer for lesson in asked}
    assert len(wanted & set(said)) >= ENOUGH * len(wanted)


def material(folder: Path, name: MediaType, count: int, seed: int) -> list[Lesson]:
    """Files to be taught or asked for, other ones for each seed."""
    place = folder / f"lessons-{seed}"
    return lessons.sounds(place, count, seed) if name == "qwen2_audio" else lessons.pictures(place, count, seed, SIDE)


def write_lessons(
    folder: Path, model: Path, taught: list[Lesson], name: MediaType, steps: int, learning_rate: float
) -> Path:
    """The recipe that teaches them, everything trained; packed where the model's rows can be."""
    data = folder / "lessons.jsonl"
    data.write_text("".join(json.dumps(lesson.row()) + "\n" for lesson in taught))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    length = len(example_of(taught[0], name, tokenizer).input_ids)
    packing = name not in HYBRIDS
    recipe: dict[str, Any] = {
        "model": str(model),
        "tuning": {"kind": "full", "towers": "trained", "merger": "trained"},
        "data": {"train": str(data), "max_tokens": PER_ROW * (length + 4), "packing": packing},
        "batch": {"sequences_per_step": ROWS_PER_STEP * (1 if packing else PER_ROW), "micro_batch": 1},
        "optimizer": {"max_steps": steps, "learning_rate": learning_rate, "warmup_fraction": 0.05},
        "precision": {"weights": "fp32"},
        "output": {"dir": str(folder / "run"), "save_every_steps": steps, "log_every_steps": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def example_of(lesson: Lesson, name: MediaType, tokenizer: PreTrainedTokenizerFast) -> oracle.Example:
    """The example of a lesson by the oracle, under the folder's smaller limit."""
    rules = replace(oracle.RULES[name], min_pixels=min(LEAST_PIXELS, oracle.RULES[name].min_pixels))
    item = (
        Item(lesson.kind, "", SIDE, SIDE)
        if lesson.kind == "image"
        else Item("audio", "", num_samples=len(read_wav(lesson.path)))
    )
    (example,) = oracle.expected_examples(lesson.row(), tokenizer, name, {str(lesson.path): item}, rules)
    return example


def answers(folder: Path, name: MediaType, asked: list[Lesson]) -> list[str]:
    """What the model of a folder says to each lesson, greedily, by transformers and the folder's own files."""
    import torch
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    examples = [example_of(lesson, name, tokenizer) for lesson in asked]
    prompts = [[*example.input_ids][: example.labels.index(example_target(example))] for example in examples]
    assert len({tuple(prompt) for prompt in prompts}) == 1
    ids = torch.tensor(prompts)
    pad = tokenizer.convert_tokens_to_ids(oracle.RULES[name].pads[asked[0].kind])
    given = features(folder, asked) | ({"mm_token_type_ids": (ids == pad).int()} if asked[0].kind == "image" else {})
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=16, do_sample=False
        )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def example_target(example: oracle.Example) -> int:
    """The first trained token."""
    return next(label for label in example.labels if label != oracle.UNTRAINED)


def features(folder: Path, asked: list[Lesson]) -> dict[str, Any]:
    """What the towers get, by the processors of the folder."""
    from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

    if asked[0].kind == "image":
        from PIL import Image

        pictures = [Image.open(lesson.path) for lesson in asked]
        return dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt"))
    sounds = [read_wav(lesson.path) for lesson in asked]
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    out = extractor(sounds, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, padding="max_length")
    return {"input_features": out["input_features"], "feature_attention_mask": out["attention_mask"]}
